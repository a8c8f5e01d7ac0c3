"""Writes calls of operators as text, and replays them on tensors of a device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gcbench.operators import call_text
from gcbench.operators.call_text import TensorSpec, tensor_spec


class NotReplayable(Exception):
    """A call that cannot be written as text, or not replayed from its text."""


def text_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Write the call as text; empty if an argument cannot be written.

    Devices are left out, since the call is replayed on another, and so are random number generators.
    """
    if func.namespace != "aten":
        return ""
    try:
        positional = [_written(value) for value in args]
        named = {name: _written(value) for name, value in kwargs.items() if not _is_left_out(value)}
    except NotReplayable:
        return ""
    return call_text.write(str(func._name), positional, named)


def _is_left_out(value: object) -> bool:
    return isinstance(value, (torch.device, torch.layout, torch.Generator))


def _written(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise NotReplayable
        return call_text.as_json(
            TensorSpec(dtype=_name(value.dtype), sizes=tuple(value.shape), strides=tuple(value.stride()))
        )
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_written(part) for part in value]
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return {"torch": _name(value)}
    if _is_left_out(value):
        return None
    raise NotReplayable


def _name(constant: object) -> str:
    return str(constant).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class BoundCall:
    """A call with its arguments, ready to run.

    Attributes:
        hot: the memory of the arguments that a cache holds when the real call runs.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hot: tuple[torch.Tensor, ...]

    def __call__(self) -> Any:
        return self.func(*self.args, **self.kwargs)


class Replayer:
    """Makes calls from their texts, on tensors filled with numbers that every operator accepts.

    Memory is reused: for a cold argument, only after `cold_bytes` in tensors of that size have been used since. No more
    than `most_bytes` are held unless a single call needs more.
    """

    def __init__(self, device: torch.device, *, cold_bytes: int, most_bytes: int) -> None:
        self.device = device
        self._cold_bytes = cold_bytes
        self._most_bytes = most_bytes
        self._held: OrderedDict[tuple[object, ...], list[torch.Tensor]] = OrderedDict()
        self._held_bytes = 0

    def make(self, text: str, cold: int) -> BoundCall:
        """Make the call of a text; its n-th tensor is cold if bit n of `cold` is set.

        Raises NotReplayable if this torch has no such operator; a call itself may raise anything.
        """
        call = _Call.read(text)
        used: list[tuple[torch.Tensor, bool]] = []
        args = [self._built(value, call, cold, used, place in call.written) for place, value in enumerate(call.args)]
        kwargs = {
            name: self._built(value, call, cold, used, name in call.written) for name, value in call.kwargs.items()
        }
        if call.offsets is not None:
            args[call.offsets] = _offsets(args[call.offsets], args[0])
        if call.takes_device:
            kwargs["device"] = self.device
        hot = tuple(memory for memory, is_cold in used if not is_cold)
        return BoundCall(func=call.func, args=tuple(args), kwargs=kwargs, hot=hot)

    def _built(
        self, value: Any, call: _Call, cold: int, used: list[tuple[torch.Tensor, bool]], is_written: bool
    ) -> Any:
        """Build an argument; its tensors are added to `used`, as (memory, is cold).

        A method, as a nested function that calls itself is a reference cycle, which holds its memory until garbage
        collection: a plan for a card ran out of 80 GiB.
        """
        spec = tensor_spec(value)
        if spec is not None:
            is_cold = bool(cold >> len(used) & 1)
            others = {id(memory) for memory, _ in used}
            memory = self._memory(spec, others, bound=call.bound, is_cold=is_cold, is_written=is_written)
            used.append((memory, is_cold))
            return memory.as_strided(spec.sizes, spec.strides)
        if isinstance(value, dict):
            return getattr(torch, value["torch"])
        if isinstance(value, list):
            return [self._built(part, call, cold, used, is_written) for part in value]
        return value

    def _memory(
        self, spec: TensorSpec, others: set[int], *, bound: int, is_cold: bool, is_written: bool
    ) -> torch.Tensor:
        """Memory for the tensor, other than `others`; whole numbers in it are below `bound`."""
        dtype = _dtype(spec.dtype)
        key = (dtype, spec.extent, bound, is_written)
        tensors = self._held.setdefault(key, [])
        self._held.move_to_end(key)
        nbytes = max(spec.extent * dtype.itemsize, 1)
        free = [place for place, memory in enumerate(tensors) if id(memory) not in others]
        if free and (not is_cold or len(tensors) > min(self._cold_bytes // nbytes, _MOST_COPIES)):
            # The most recently used is the most likely to be in a cache, the least recently used the least.
            memory = tensors.pop(free[0] if is_cold else free[-1])
        else:
            self._make_room(nbytes, key)
            memory = _filled(dtype, spec.extent, bound, self.device)
            self._held_bytes += nbytes
        tensors.append(memory)
        return memory

    def _make_room(self, nbytes: int, key: tuple[object, ...]) -> None:
        while self._held_bytes + nbytes > self._most_bytes:
            oldest = next(iter(self._held))
            if oldest == key:
                return
            self._held_bytes -= sum(max(memory.nbytes, 1) for memory in self._held.pop(oldest))


_MOST_COPIES = 64
"""Most tensors of one size to cycle through: small ones are cold only as far as so many, and all else, lie between."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A parsed text.

    Attributes:
        written: places and names of the arguments that the operator writes into.
        bound: whole numbers in index arguments must be below it.
        offsets: the place of the argument that has the ends of groups of rows.
        takes_device: the operator creates a tensor, and no argument determines its device.
    """

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    written: frozenset[int | str]
    bound: int
    offsets: int | None
    takes_device: bool

    @staticmethod
    def read(text: str) -> _Call:
        """Parse a text; raises NotReplayable if this torch has no such operator."""
        op, args, kwargs = call_text.read(text)
        func = _operator(op)
        arguments = func._schema.arguments
        written: set[int | str] = set()
        for place, argument in enumerate(arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {place, argument.name}
        tensors = list(call_text.specs([*args, *kwargs.values()]))
        name = op.partition("::")[2].partition(".")[0]
        return _Call(
            func=func,
            args=args,
            kwargs=kwargs,
            written=frozenset(written),
            bound=_bound(name, args),
            offsets=_OFFSETS.get(name),
            takes_device=not tensors and any(argument.name == "device" for argument in arguments),
        )


@cache
def _operator(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except AttributeError as err:
        raise NotReplayable(name) from err


_OFFSETS = {"_grouped_mm": 2}
_ROWS_ALONG = {"index_select", "gather", "scatter", "scatter_add", "scatter_", "index_add", "index_add_", "index_copy_"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_CLASSES_OF = {"nll_loss_forward": 0, "nll_loss_backward": 1, "nll_loss2d_forward": 0, "nll_loss2d_backward": 1}


def _bound(op: str, args: Sequence[Any]) -> int:
    """The bound of indices among the arguments; 1, which makes them 0, if none is known."""
    if op == "embedding":
        return _sizes(args[0])[0]
    if op == "embedding_dense_backward":
        return int(args[2])
    if op in _CLASSES_OF:
        sizes = _sizes(args[_CLASSES_OF[op]])
        return sizes[1] if len(sizes) > 1 else sizes[0]
    if op in _ROWS_ALONG:
        sizes = _sizes(args[0])
        return sizes[args[1]] if sizes else 1
    if op in _INDEXED:
        return min(
            (size for size, index in zip(_sizes(args[0]), args[1], strict=False) if index is not None), default=1
        )
    return 1


def _sizes(value: object) -> tuple[int, ...]:
    spec = tensor_spec(value)
    return spec.sizes if spec is not None else (1,)


def _offsets(offsets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The ends of groups of rows, all of one size."""
    count = rows.shape[-2] if rows.dim() > 1 else len(rows)
    groups = len(offsets)
    ends = [count * (group + 1) // groups for group in range(groups)]
    return torch.tensor(ends, dtype=offsets.dtype, device=offsets.device)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise NotReplayable(name)
    return dtype


def _filled(dtype: torch.dtype, count: int, bound: int, device: torch.device) -> torch.Tensor:
    """A flat tensor of fractions around 1, of whole numbers from 0 to below `bound`, or of True."""
    if dtype.is_floating_point:
        # Away from zero, near which arithmetic on a CPU is slow.
        return torch.rand(count, device=device).add_(0.5).to(dtype)
    if dtype is torch.bool:
        return torch.ones(count, dtype=dtype, device=device)
    if dtype in _INDEX_DTYPES and bound > 1:
        return torch.randint(0, bound, (count,), dtype=dtype, device=device)
    return torch.zeros(count, dtype=dtype, device=device)


_INDEX_DTYPES = (torch.int64, torch.int32)
