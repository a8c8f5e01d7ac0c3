"""Strategies: from the name a person types to the plan a model gets. One file per kind."""

from __future__ import annotations

import difflib

from gcbench.plugins import modules
from gcbench.strategies._base import Kind, Plan, Strategy

__all__ = ["OFF", "Kind", "Plan", "Strategy", "kinds", "parse"]

OFF = "off"


def kinds() -> tuple[Kind, ...]:
    """Every kind of strategy, `off` first, then by name."""
    found: list[Kind] = [module.KIND for module in modules(__name__)]
    return tuple(sorted(found, key=lambda kind: (kind.name != OFF, kind.syntax)))


def parse(spec: str) -> Strategy:
    """The strategy a spec such as `off`, `per-layer` or `every:2` names.

    Raises ValueError, with the legal forms, when there is no such strategy or its argument is malformed.
    """
    name, colon, argument = spec.strip().lower().partition(":")
    for kind in kinds():
        if kind.name == name:
            return kind.parse(argument if colon else None)
    legal = ", ".join(kind.syntax for kind in kinds())
    near = difflib.get_close_matches(name, [kind.name for kind in kinds()], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no strategy {spec!r}; {hint}legal are {legal}")
