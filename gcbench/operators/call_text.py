"""Writes a call of an operator as text: enough to replay it, to find calls of the same form, and to scale it. No torch.

The text is JSON: the operator with its overload, then arguments by place and by name. A tensor is an object with its
dtype `t`, its sizes `s` and, where they are not those of a contiguous tensor, its strides `d`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_KNOWN = 1 << 16
"""Texts whose form is cached; a plan for a large model has some thousand."""
_SMALL = 4
"""Whole numbers up to here are dimensions and options, part of a call's form; larger ones are sizes."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """The dtype and layout of a tensor; sizes and strides in elements."""

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """Elements of memory that it spans, from its first to its last."""
        if self.numel == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))


def contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, as in torch."""
    strides: list[int] = []
    stride = 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def as_json(spec: TensorSpec) -> dict[str, Any]:
    """The JSON object of a tensor in a call's text."""
    written: dict[str, Any] = {"t": spec.dtype, "s": list(spec.sizes)}
    if spec.strides != contiguous_strides(spec.sizes):
        written["d"] = list(spec.strides)
    return written


def tensor_spec(value: object) -> TensorSpec | None:
    """The tensor that an argument of a parsed text represents; None if it is something else."""
    if not isinstance(value, dict) or "t" not in value:
        return None
    sizes = tuple(value["s"])
    return TensorSpec(dtype=value["t"], sizes=sizes, strides=tuple(value.get("d", contiguous_strides(sizes))))


def specs(value: object) -> Iterator[TensorSpec]:
    """The tensors in an argument, or in a list of arguments, in order."""
    spec = tensor_spec(value)
    if spec is not None:
        yield spec
    elif isinstance(value, list):
        for part in value:
            yield from specs(part)


def write(op: str, args: list[Any], kwargs: dict[str, Any]) -> str:
    """The text of a call."""
    return json.dumps([op, args, kwargs] if kwargs else [op, args], separators=(",", ":"))


def read(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Parse a text into the operator and its arguments by place and by name."""
    op, args, *rest = json.loads(text)
    return op, args, rest[0] if rest else {}


@lru_cache(maxsize=_KNOWN)
def form(text: str) -> str:
    """The form shared by calls that differ in sizes alone: operator, dtypes, layouts, broadcasting, options."""
    if not text:
        return ""
    op, args, kwargs = read(text)
    # An argument with its default may be written or not.
    values = [value for value in (*args, *(kwargs[name] for name in sorted(kwargs))) if value is not None]
    largest = max((spec.numel for spec in specs(values)), default=0)
    width = max((spec.sizes[-1] for spec in specs(values) if spec.sizes), default=1)
    return f"{op}({','.join(_form(value, largest, width) for value in values)})"


def _form(value: object, largest: int, width: int) -> str:
    spec = tensor_spec(value)
    if spec is not None:
        return f"{spec.dtype}:{_layout(spec, largest, width)}"
    if isinstance(value, list):
        if any(specs(value)):
            return f"[{','.join(_form(part, largest, width) for part in value)}]"
        if all(isinstance(part, int) and abs(part) <= _SMALL for part in value):
            return str(value)
        return "[]"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) <= _SMALL else "n"
    return "x" if isinstance(value, float) else json.dumps(value)


def _layout(spec: TensorSpec, largest: int, width: int) -> str:
    """The order of its dimensions in memory, and along which kind of dimension it is broadcast.

    Dimensions of one element are left out, and so are leading ones in order: a batch of one has the form of any other.
    """
    dims = [(size, stride) for size, stride in zip(spec.sizes, spec.strides, strict=True) if size != 1]
    again = ""
    if largest > 1 and not dims:
        return "one"
    if any(stride == 0 for _, stride in dims) or spec.numel < largest:
        is_inner = (spec.sizes[-1] == 1 and width > 1) or (bool(dims) and dims[-1][1] == 0)
        again = "rows" if is_inner else "over"
    moving = [stride for _, stride in dims if stride]
    by_memory = sorted(range(len(moving)), key=lambda place: -moving[place])
    start = next((place for place, there in enumerate(by_memory) if place != there), len(by_memory))
    order = "".join(str(there - start) for there in by_memory[start:])
    gaps = "" if _is_dense(dims) else "gaps"
    return again + order + gaps


def _is_dense(dims: list[tuple[int, int]]) -> bool:
    """Whether the elements fill their memory without gaps."""
    expected = 1
    for size, stride in sorted(((size, stride) for size, stride in dims if stride), key=lambda pair: pair[1]):
        if stride != expected:
            return False
        expected *= size
    return True


def between(low: str, high: str, times: int, apart: int) -> str:
    """Interpolate the call at `low + times * (high - low) / apart`: its whole numbers are affine in the batch size.

    Other numbers stay as they are. Empty if the two are not the same call with different sizes.
    """
    if low == high or not low or not high:
        return low if low == high else ""
    try:
        scaled = _between(json.loads(low), json.loads(high), times, apart)
    except ValueError:
        return ""
    return json.dumps(scaled, separators=(",", ":"))


def _between(low: Any, high: Any, times: int, apart: int) -> Any:
    if type(low) is not type(high):
        raise ValueError("different calls")
    if isinstance(low, dict):
        if low.keys() != high.keys():
            raise ValueError("different calls")
        return {key: _between(low[key], high[key], times, apart) for key in low}
    if isinstance(low, list):
        if len(low) != len(high):
            raise ValueError("different calls")
        return [_between(one, two, times, apart) for one, two in zip(low, high, strict=True)]
    if isinstance(low, int) and not isinstance(low, bool):
        return low + times * (high - low) // apart
    if isinstance(low, float):
        return low  # a factor, as one over the number of tokens, which does not change a call's time
    if low != high:
        raise ValueError("different calls")
    return low
