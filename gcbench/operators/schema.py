"""Reads an operator's schema: its name in plans, the arguments that it writes into, whether it draws random numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def operator_name(op: Any) -> str:
    """The operator's name in plans: without overload, and without `aten::`."""
    namespace, _, rest = str(getattr(op, "_name", op)).rpartition("::")
    name = rest.partition(".")[0]
    return name if namespace in ("", "aten") else f"{namespace}::{name}"


def is_question(op: Any) -> bool:
    """Whether a call does nothing: it queries a device, or detaches, which a recomputation does more often."""
    return op.namespace == "prim" or op is torch.ops.aten.detach.default


def is_random(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers: attention kernels are tagged so, but do it with dropout alone."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    place = argument_place(op, "dropout_p")
    if place is None:
        return True
    default = op._schema.arguments[place].default_value
    return bool(args[place] if place < len(args) else kwargs.get("dropout_p", default))


@cache
def argument_place(op: Any, name: str) -> int | None:
    """The place of an argument in an operator's signature; None if it has none of that name."""
    names = [argument.name for argument in op._schema.arguments]
    return names.index(name) if name in names else None


def targets(op: Any, args: tuple[Any, ...]) -> list[int]:
    """The storages that a call writes into."""
    written = (args[place] for place in _written(op) if place < len(args))
    return [int(target.untyped_storage()._cdata) for target in written if isinstance(target, torch.Tensor)]


@cache
def _written(op: Any) -> tuple[int, ...]:
    """Which of an operator's arguments it writes into."""
    if not op._schema.is_mutable:
        return ()
    arguments = enumerate(op._schema.arguments)
    return tuple(place for place, argument in arguments if argument.alias_info and argument.alias_info.is_write)
