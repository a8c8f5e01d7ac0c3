"""What a strategy is, and the plan it becomes: data, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which layers of a model are recomputed, and which of them together.

    Attributes:
        num_layers: layers the model can checkpoint.
        groups: ordered, disjoint groups of consecutive layer numbers (0-based, in `modules()` order); the layers
            of one group are recomputed together, a layer in no group keeps everything.

    Raises ValueError when groups overlap, run backwards, skip layers inside a group or leave the model.
    """

    num_layers: int
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        following = 0
        for group in self.groups:
            if not group or group != tuple(range(group[0], group[0] + len(group))):
                raise ValueError(f"a group holds consecutive layers in rising order, not {list(group)}")
            if group[0] < following:
                raise ValueError(f"layer {group[0]} comes after layer {following - 1}; groups are ordered and disjoint")
            following = group[-1] + 1
        if following > self.num_layers:
            raise ValueError(f"layer {following - 1} is beyond a model of {self.num_layers} layers")

    @property
    def layers_checkpointed(self) -> int:
        return sum(len(group) for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A named way to checkpoint; `plan_for(num_layers)` raises ValueError when the model has too few layers."""

    spec: str
    plan_for: Callable[[int], Plan]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A family of strategies: what `gcbench strategies` lists, and the parser of its argument.

    `parse` takes what stands after the colon (None without one) and raises ValueError with the remedy.
    """

    syntax: str
    kept: str
    recomputed: str
    elsewhere: str
    parse: Callable[[str | None], Strategy]

    @property
    def name(self) -> str:
        return self.syntax.partition(":")[0]


def without_argument(syntax: str, plan_for: Callable[[int], Plan]) -> Callable[[str | None], Strategy]:
    """The parser of a strategy that takes no argument."""

    def parse(argument: str | None) -> Strategy:
        if argument is not None:
            raise ValueError(f"strategy {syntax!r} takes no argument; write {syntax}")
        return Strategy(spec=syntax, plan_for=plan_for)

    return parse
