"""Parse a strategy's name, such as `every:2+offload`, into the plan it makes for a model. One file per kind."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import reduce

from gcbench.core.plugins import modules
from gcbench.strategies._base import Change, Kind, Plan, Policy, Strategy

__all__ = ["OFF", "OWN", "Change", "Kind", "Plan", "Policy", "Strategy", "kinds", "parse"]

OFF = "off"
OWN = "own"
_FILE = "plan:"
_OFFLOAD = "offload:"
_ORDER = ("selective", "offload", "reentrant", "compile")
"""Order in which changes are written in a spec and applied."""


def kinds() -> tuple[Kind, ...]:
    """Return every kind of strategy: choices of layers (`off` first), then changes of a choice."""
    found: list[Kind] = [module.KIND for module in modules(__name__)]
    return tuple(sorted(found, key=lambda kind: (kind.name in _ORDER, kind.name != OFF, kind.syntax)))


def parse(spec: str) -> Strategy:
    """Return the strategy that a spec such as `off`, `every:2` or `every:2+selective:matmul` names.

    Raises ValueError, with the legal forms, when there is no such strategy, its argument is malformed, or its parts
    contradict each other.
    """
    text = spec.strip()
    if text.lower().startswith(_FILE):
        return _as_strategy(_part(text))
    if text.lower().startswith(_OFFLOAD):  # offload:every:2 is every:2+offload
        if not text[len(_OFFLOAD) :].strip():
            raise ValueError(f"{spec!r} names no layers; write offload, or a choice like offload:every:2")
        text = f"{text[len(_OFFLOAD) :]}+offload"
    parts = [_part(part.strip()) for part in text.split("+")]
    choices = [part for part in parts if isinstance(part, Strategy)]
    changes = [part for part in parts if isinstance(part, Change)]
    if len(choices) > 1:
        raise ValueError(f"{spec!r} chooses layers twice ({choices[0].spec} and {choices[1].spec}); leave one out")
    names = [_name(change.spec) for change in changes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{spec!r} names {twice} twice; leave one out")
    if not changes:
        return choices[0]
    changes.sort(key=lambda change: _ORDER.index(_name(change.spec)))
    return _changed(spec, choices[0] if choices else None, changes)


def _part(text: str) -> Strategy | Change:
    name, colon, argument = text.partition(":")
    for kind in kinds():
        if kind.name == name.lower():
            return kind.parse((argument if kind.name == _FILE[:-1] else argument.lower()) if colon else None)
    legal = ", ".join(kind.syntax for kind in kinds())
    near = difflib.get_close_matches(name.lower(), [kind.name for kind in kinds()], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no strategy {text!r}; {hint}legal are {legal}")


def _as_strategy(part: Strategy | Change) -> Strategy:
    assert isinstance(part, Strategy)
    return part


def _name(spec: str) -> str:
    return spec.partition(":")[0]


def _changed(spec: str, choice: Strategy | None, changes: list[Change]) -> Strategy:
    default = "off" if all(change.alone == OFF for change in changes) else "per-layer"
    base = choice or _as_strategy(_part(default))
    if base.spec == OFF and default != OFF:
        raise ValueError(
            f"{spec!r} is contradictory: off recomputes nothing; combine {changes[0].spec} with a choice of layers"
        )
    if base.is_own:
        raise ValueError(
            f"{spec!r} is contradictory: own runs the model's own checkpointing unchanged; combine {changes[0].spec} "
            "with another choice of layers"
        )
    if base.content is not None:
        raise ValueError(
            f"{spec!r} is contradictory: {base.spec} sets the policy of every layer; change it in that file"
        )
    to: Callable[[Plan], Plan] = lambda plan: reduce(lambda changed, change: change.to(changed), changes, plan)  # noqa: E731
    try:
        to(base.plan_for(_enough_layers(base.spec)))  # whether the parts can be combined does not depend on the model
    except ValueError as err:
        raise ValueError(f"{spec!r} is contradictory: {err}") from None
    # The choice of layers that the changes imply is left out of the name.
    named = [] if base.spec == default else [base.spec]
    return Strategy(
        spec="+".join([*named, *(change.spec for change in changes)]),
        plan_for=lambda num_layers: to(base.plan_for(num_layers)),
        counts_run=base.counts_run,
        operators=tuple(op for change in changes for op in change.operators),
    )


def _enough_layers(spec: str) -> int:
    """Return a number of layers that is enough for a strategy: the largest number in its spec, 2 at least."""
    return max([2, *map(int, re.findall(r"\d+", spec))])
