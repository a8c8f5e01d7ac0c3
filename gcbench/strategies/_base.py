"""What a strategy is, and the plan it becomes: data, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gcbench.core.units import counted


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How one group of layers is recomputed.

    Attributes:
        keep: operators whose outputs are kept inside the group, as torch names them (`mm`, `addmm`, `aten::mm`,
            `flash_attn::_flash_attn_forward`); `mm#2` is the third call of `mm` in the group alone.
        skip: operators that are not run again, since with what is kept nothing needs their outputs.
        offload: what the group keeps of its inputs lies in the host's memory until it is needed.
        reentrant: torch's old variant, which runs the group without gradients first.

    Raises ValueError for what torch cannot do together.
    """

    keep: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    offload: bool = False
    reentrant: bool = False

    def __post_init__(self) -> None:
        if self.reentrant and (self.keep or self.skip):
            raise ValueError("the reentrant variant recomputes all of a layer and cannot keep outputs; leave one out")
        if self.reentrant and self.offload:
            raise ValueError("offload is for the variant that is not reentrant; leave one out")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which layers of a model are recomputed, which of them together, and how.

    Attributes:
        num_layers: layers the model can checkpoint.
        groups: ordered, disjoint groups of consecutive layer numbers (0-based, in `modules()` order); the layers
            of one group are recomputed together, a layer in no group keeps everything.
        policies: one for each group; none at all stands for the plain one everywhere.
        compiled: each layer goes through `torch.compile`.
        memory_budget: torch's `activation_memory_budget` while compiling, from 0 (recompute all that can be) to 1.
        own: the model's own code checkpoints, by the flag on its body; the groups tell what it recomputes.

    Raises ValueError when groups overlap, run backwards, skip layers inside a group or leave the model, when policies
    do not match them, and for what torch cannot do together.
    """

    num_layers: int
    groups: tuple[tuple[int, ...], ...] = ()
    policies: tuple[Policy, ...] = ()
    compiled: bool = False
    memory_budget: float | None = None
    own: bool = False

    def __post_init__(self) -> None:
        if self.own and (self.compiled or any(policy != Policy() for policy in self.policies)):
            raise ValueError("the model's own way to checkpoint is taken as it is; leave the rest out")
        following = 0
        for group in self.groups:
            if not group or group != tuple(range(group[0], group[0] + len(group))):
                raise ValueError(
                    f"a group holds consecutive layers in rising order, not {list(group)}; write it like [0, 1]"
                )
            if group[0] < 0:
                raise ValueError(f"there is no layer {group[0]}; the first is layer 0")
            if group[0] < following:
                raise ValueError(f"layer {group[0]} comes after layer {following - 1}; groups are ordered and disjoint")
            following = group[-1] + 1
        if following > self.num_layers:
            raise ValueError(
                f"layer {following - 1} is beyond a model of {counted(self.num_layers, 'layer')}; the first is layer 0"
            )
        if self.policies and len(self.policies) != len(self.groups):
            given = "1 policy" if len(self.policies) == 1 else f"{len(self.policies)} policies"
            raise ValueError(f"there are {counted(len(self.groups), 'group')} and {given}; give each one")
        several = any(len(group) > 1 for group in self.groups)
        if any(len(group) > 1 and policy.reentrant for group, policy in self.treated()):
            raise ValueError("the reentrant variant recomputes layers one by one; take groups of one layer")
        if self.compiled and (several or self.any_policy("reentrant") or self.any_policy("offload")):
            raise ValueError(
                "compiled layers can be recomputed one by one only, and without reentrant or offload; leave one out"
            )
        if self.compiled and self.any_policy("skip"):
            raise ValueError("a compiled layer decides by itself what to run again; leave skip or compiled out")
        if self.memory_budget is not None and (not self.compiled or self.groups):
            raise ValueError("a memory budget is for compiled layers that are not checkpointed; leave one out")

    @property
    def layers_checkpointed(self) -> int:
        return sum(len(group) for group in self.groups)

    def treated(self) -> tuple[tuple[tuple[int, ...], Policy], ...]:
        """Each group with its policy."""
        return tuple(zip(self.groups, self.policies or [Policy()] * len(self.groups), strict=True))

    def any_policy(self, name: str) -> bool:
        """Whether a policy has that field set."""
        return any(getattr(policy, name) for policy in self.policies)

    def with_policies(self, **changes: object) -> Plan:
        """The same groups, each with its policy changed."""
        changed = tuple(replace(policy, **changes) for _, policy in self.treated())  # type: ignore[arg-type]
        return replace(self, policies=changed)

    def renumbered(self, order: tuple[int, ...], num_layers: int) -> Plan:
        """The plan for a model of `num_layers` whose layers run in this order: number 0 becomes `order[0]`.

        Raises ValueError where layers of one group do not lie side by side in the model.
        """
        pairs = [(tuple(order[layer] for layer in group), policy) for group, policy in self.treated()]
        for group, _ in pairs:
            if group != tuple(range(group[0], group[0] + len(group))):
                raise ValueError(
                    f"layers {list(group)} run one after the other but do not lie side by side in this model; "
                    "take groups of one layer"
                )
        pairs.sort(key=lambda pair: pair[0])
        return replace(
            self,
            num_layers=num_layers,
            groups=tuple(group for group, _ in pairs),
            policies=tuple(policy for _, policy in pairs) if self.policies else (),
        )


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A named way to checkpoint.

    Attributes:
        spec: its name, in the one spelling that tables use.
        plan_for: number of layers -> plan; raises ValueError when the model has too few layers.
        counts_run: layers are counted in the order in which they run, and those that training never runs are not; else
            all of them in `modules()` order, as transformers' `every_n_layers` does.
        content: what a file said, for a strategy that is read from one.
    """

    spec: str
    plan_for: Callable[[int], Plan]
    counts_run: bool = False
    content: str | None = None
    operators: tuple[str, ...] = ()
    """Those whose outputs it keeps."""
    is_own: bool = False
    """The model's own way to checkpoint: what it recomputes is seen at the model alone."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a strategy such as `selective:matmul` changes in any choice of layers.

    Attributes:
        to: plan -> changed plan.
        alone: the strategy that is changed where none is named.
    """

    spec: str
    to: Callable[[Plan], Plan]
    alone: str = "per-layer"
    operators: tuple[str, ...] = ()
    """Those whose outputs it keeps."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A family of strategies: what `gcbench strategies` lists, and the parser of its argument.

    `parse` takes what stands after the colon (None without one) and raises ValueError with the remedy.
    """

    syntax: str
    kept: str
    recomputed: str
    elsewhere: str
    parse: Callable[[str | None], Strategy | Change]

    @property
    def name(self) -> str:
        return self.syntax.partition(":")[0].partition("[")[0]


def without_argument(syntax: str, plan_for: Callable[[int], Plan]) -> Callable[[str | None], Strategy]:
    """The parser of a strategy that takes no argument."""

    def parse(argument: str | None) -> Strategy:
        if argument is not None:
            raise ValueError(f"strategy {syntax!r} takes no argument; write {syntax}")
        return Strategy(spec=syntax, plan_for=plan_for)

    return parse


def number(name: str, argument: str | None, *, example: str) -> int:
    """The argument as a number of layers; raises ValueError."""
    if argument is None or not argument.isdecimal() or int(argument) < 1:
        shown = name if argument is None else f"{name}:{argument}"
        raise ValueError(f"{shown!r} needs a whole number of layers, 1 or more; write it like {example}")
    return int(argument)


def check_depth(spec: str, needed: int, num_layers: int, *, take: str) -> None:
    """Raises ValueError when a model has fewer layers than a strategy needs; `take` begins what would fit."""
    if needed > num_layers:
        fitting = f"{take} 1 to {num_layers}" if num_layers > 1 else f"{spec.partition(':')[0]}:1"
        what = f"take {fitting}" if num_layers else "take off"
        raise ValueError(f"{spec} needs at least {counted(needed, 'layer')} and the model has {num_layers}; {what}")


def singles(layers: range) -> tuple[tuple[int, ...], ...]:
    """Groups of one layer each."""
    return tuple((layer,) for layer in layers)
