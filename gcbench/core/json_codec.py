"""Encode records as plain JSON values and decode them, checked against the records' type annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Encode a record as dicts, lists and scalars, in field order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(kind: type[T], value: object) -> T:
    """Decode `value` into the record of type `kind` that it encodes.

    A field that older versions stored under another name is read under both names: a record lists them in a class
    variable `FORMERLY`, old name -> field. Raises ValueError with the path of the field when one is missing, unknown or
    of the wrong type.
    """
    decoded: T = _decode(kind, value, kind.__name__)
    return decoded


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(typing.cast("type", kind), value, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(typing.get_args(kind), value, where)
    if origin is typing.Literal:
        if value in typing.get_args(kind):
            return value
    elif origin is tuple:
        items = typing.get_args(kind)
        if isinstance(value, list) and items[-1] is Ellipsis:
            return tuple(_decode(items[0], part, f"{where}[{i}]") for i, part in enumerate(value))
        if isinstance(value, list) and len(value) == len(items):
            return tuple(_decode(items[i], part, f"{where}[{i}]") for i, part in enumerate(value))
    elif origin in (dict, list, Mapping):
        if isinstance(value, list if origin is list else dict):
            return value
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {value!r:.80}")


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return _decode(kind, value, where)
            except ValueError as err:
                error = err
    raise error


def _decode_record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.80}")
    hints = _hints(kind)
    formerly = getattr(kind, "FORMERLY", {})
    value = {formerly.get(name, name): part for name, part in value.items()}
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]!r}")
    return kind(**{name: _decode(hints[name], part, f"{where}.{name}") for name, part in value.items()})
