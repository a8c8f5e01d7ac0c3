"""Strategies: from the name a person types to the plan a model gets. One file per kind."""

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
"""In which changes stand in a spec and are made."""


def kinds() -> tuple[Kind, ...]:
    """Every kind of strategy: choices of layers first, `off` before all, then what changes a choice."""
    found: list[Kind] = [module.KIND for module in modules(__name__)]
    return tuple(sorted(found, key=lambda kind: (kind.name in _ORDER, kind.name != OFF, kind.syntax)))


def parse(spec: str) -> Strategy:
    """The strategy that a spec such as `off`, `every:2` or `every:2+selective:matmul` names.

    Raises ValueError, with the legal forms, when there is no such strategy, its argument is malformed, or its parts
    make no sense together.
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
        raise ValueError(f"{spec!r} chooses layers twice ({choices[0].spec} and {choices[1].spec}); keep one of them")
    names = [_name(change.spec) for change in changes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{spec!r} says {twice} twice; keep one of them")
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
            f"{spec!r} makes no sense: off recomputes nothing; join {changes[0].spec} to a choice of layers"
        )
    if base.is_own:
        raise ValueError(
            f"{spec!r} makes no sense: own is the model's own way, as it is; join {changes[0].spec} to another choice "
            "of layers"
        )
    if base.content is not None:
        raise ValueError(f"{spec!r} makes no sense: {base.spec} says all of how layers are treated; write it there")
    to: Callable[[Plan], Plan] = lambda plan: reduce(lambda changed, change: change.to(changed), changes, plan)  # noqa: E731
    try:
        to(base.plan_for(_enough_layers(base.spec)))  # whether its parts go together does not depend on the model
    except ValueError as err:
        raise ValueError(f"{spec!r} makes no sense: {err}") from None
    # A choice that its changes imply is not named.
    named = [] if base.spec == default else [base.spec]
    return Strategy(
        spec="+".join([*named, *(change.spec for change in changes)]),
        plan_for=lambda num_layers: to(base.plan_for(num_layers)),
        counts_run=base.counts_run,
        operators=tuple(op for change in changes for op in change.operators),
    )


def _enough_layers(spec: str) -> int:
    """Layers that a model needs for a strategy: as many as the largest number in it."""
    return max([2, *map(int, re.findall(r"\d+", spec))])
