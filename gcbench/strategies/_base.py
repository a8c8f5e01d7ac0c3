"""Define strategies, plans and policies as plain data, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gcbench.core.units import counted


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How one group of layers is recomputed.

    Attributes:
        keep: operators whose outputs are saved inside the group instead of recomputed, as torch names them (`mm`,
            `addmm`, `aten::mm`, `flash_attn::_flash_attn_forward`); `mm#2` names only the third call of `mm`.
        skip: operators that are not recomputed, because nothing needs their outputs once those of `keep` are saved.
        offload: the group's saved inputs are in host memory until the backward pass needs them.
        reentrant: torch's old variant (use_reentrant=True), which runs the group's forward pass without gradients.

    Raises ValueError for fields that torch cannot combine.
    """

    keep: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    offload: bool = False
    reentrant: bool = False

    def __post_init__(self) -> None:
        if self.reentrant and (self.keep or self.skip):
            raise ValueError("the reentrant variant recomputes all of a layer and cannot save outputs; leave one out")
        if self.reentrant and self.offload:
            raise ValueError("offload works only with the variant that is not reentrant; leave one out")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which layers of a model are checkpointed, in which groups, and with which policies.

    Attributes:
        num_layers: number of layers of the model that can be checkpointed.
        groups: ordered, disjoint groups of consecutive layer numbers (0-based, in `modules()` order); the layers
            of one group are recomputed together, a layer in no group saves all its activations.
        policies: one for each group; an empty tuple means the default policy for all groups.
        compiled: each layer is compiled with `torch.compile`.
        memory_budget: torch's `activation_memory_budget` while compiling, from 0 (recompute all that can be) to 1.
        own: the model's own code checkpoints, switched on by its flag; `groups` records which layers it recomputes.

    Raises ValueError when groups overlap, are out of order, skip layers inside a group or name layers that the model
    does not have, when policies do not match them, and for fields that torch cannot combine.
    """

    num_layers: int
    groups: tuple[tuple[int, ...], ...] = ()
    policies: tuple[Policy, ...] = ()
    compiled: bool = False
    memory_budget: float | None = None
    own: bool = False

    def __post_init__(self) -> None:
        if self.own and (self.compiled or any(policy != Policy() for policy in self.policies)):
            raise ValueError("the model's own checkpointing cannot be changed by policies or compiled; leave them out")
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
                f"a model of {counted(self.num_layers, 'layer')} has no layer {following - 1}; the first is layer 0"
            )
        if self.policies and len(self.policies) != len(self.groups):
            policies = "1 policy" if len(self.policies) == 1 else f"{len(self.policies)} policies"
            raise ValueError(
                f"there are {counted(len(self.groups), 'group')} and {policies}; write one policy per group"
            )
        several = any(len(group) > 1 for group in self.groups)
        if any(len(group) > 1 and policy.reentrant for group, policy in self.treated()):
            raise ValueError("the reentrant variant recomputes layers one by one; use groups of one layer")
        if self.compiled and (several or self.any_policy("reentrant") or self.any_policy("offload")):
            raise ValueError(
                "compiled layers can only be recomputed one by one, and without reentrant or offload; leave one out"
            )
        if self.compiled and self.any_policy("skip"):
            raise ValueError(
                "the compiler chooses which operators of a layer are recomputed; leave skip or compiled out"
            )
        if self.memory_budget is not None and (not self.compiled or self.groups):
            raise ValueError("a memory budget works only with compiled layers that are not checkpointed; leave one out")

    @property
    def layers_checkpointed(self) -> int:
        return sum(len(group) for group in self.groups)

    def treated(self) -> tuple[tuple[tuple[int, ...], Policy], ...]:
        """Return (group, policy) pairs."""
        return tuple(zip(self.groups, self.policies or [Policy()] * len(self.groups), strict=True))

    def any_policy(self, name: str) -> bool:
        """Whether any policy has the field `name` set."""
        return any(getattr(policy, name) for policy in self.policies)

    def with_policies(self, **changes: object) -> Plan:
        """Return the plan with these fields of every group's policy replaced."""
        changed = tuple(replace(policy, **changes) for _, policy in self.treated())  # type: ignore[arg-type]
        return replace(self, policies=changed)

    def renumbered(self, order: tuple[int, ...], num_layers: int) -> Plan:
        """Return the plan with layers renumbered from execution order to `modules()` order: 0 becomes `order[0]`.

        Raises ValueError when the layers of a group are not adjacent in the model.
        """
        pairs = [(tuple(order[layer] for layer in group), policy) for group, policy in self.treated()]
        for group, _ in pairs:
            if group != tuple(range(group[0], group[0] + len(group))):
                raise ValueError(
                    f"layers {list(group)} run one after the other but are not adjacent in this model; "
                    "use groups of one layer"
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
    """A named choice of what is checkpointed.

    Attributes:
        spec: its name, in the canonical spelling that tables show.
        plan_for: number of layers -> plan; raises ValueError when the model has too few layers.
        counts_run: True when layers are numbered in execution order, without those that training never runs; False
            when they are numbered in `modules()` order, as transformers' `every_n_layers` does.
        content: the text of the file, for a strategy that is read from one.
    """

    spec: str
    plan_for: Callable[[int], Plan]
    counts_run: bool = False
    content: str | None = None
    operators: tuple[str, ...] = ()
    """Operators that it names: those whose outputs it saves, then those it skips."""
    is_own: bool = False
    """The model's own checkpointing: which layers it recomputes is known only once the model is built."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a strategy such as `selective:matmul` changes in any choice of layers.

    Attributes:
        to: plan -> changed plan.
        alone: the choice of layers that is changed when the spec names none.
    """

    spec: str
    to: Callable[[Plan], Plan]
    alone: str = "per-layer"
    operators: tuple[str, ...] = ()
    """Operators whose outputs it saves."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A family of strategies: the texts that `gcbench strategies` lists, and the parser of its argument.

    Attributes:
        syntax: how it is written, such as `every:K`.
        kept: what is saved for the backward pass.
        recomputed: what is recomputed in the backward pass.
        elsewhere: its name in other tools.
        parse: argument after the colon (None without one) -> strategy or change; raises ValueError with the remedy.
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
    """Return the parser of a strategy that takes no argument."""

    def parse(argument: str | None) -> Strategy:
        if argument is not None:
            raise ValueError(f"strategy {syntax!r} takes no argument; write {syntax}")
        return Strategy(spec=syntax, plan_for=plan_for)

    return parse


def number(name: str, argument: str | None, *, example: str) -> int:
    """Parse the argument as a number of layers; raises ValueError."""
    if argument is None or not argument.isdecimal() or int(argument) < 1:
        shown = name if argument is None else f"{name}:{argument}"
        raise ValueError(f"{shown!r} needs a whole number of layers, 1 or more; write it like {example}")
    return int(argument)


def check_depth(spec: str, needed: int, num_layers: int, *, use: str) -> None:
    """Raise ValueError when a model has fewer layers than a strategy needs; `use` begins the remedy (`groups of`)."""
    if needed > num_layers:
        fitting = f"{use} 1 to {num_layers}" if num_layers > 1 else f"{spec.partition(':')[0]}:1"
        remedy = f"use {fitting}" if num_layers else "use off"
        raise ValueError(f"{spec} needs at least {counted(needed, 'layer')} and the model has {num_layers}; {remedy}")


def singles(layers: range) -> tuple[tuple[int, ...], ...]:
    """Return groups of one layer each."""
    return tuple((layer,) for layer in layers)
