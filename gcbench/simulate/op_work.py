"""Computes the work of a call of an operator from its arguments and its result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from gcbench.operators.replay import text_of
from gcbench.operators.schema import argument_place
from gcbench.simulate.costs import Caller, Work

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
_BACKWARD_ATTENTION = 2.5
"""Ratio of the operations of attention's backward pass to its forward pass: five products to two (Dao 2023,
arXiv:2307.08691, section 4.1)."""


def of_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Work:
    """The work of one call on tensors, real or fake."""
    name = str(func._name).rpartition("::")[2].partition(".")[0]
    inputs = [tensor for tensor in _tensors(args) if tensor.layout is torch.strided]
    inputs += [tensor for tensor in _tensors(tuple(kwargs.values())) if tensor.layout is torch.strided]
    outputs = list(_tensors((result,)))
    main = inputs[0] if inputs else outputs[0] if outputs else None
    dtype = "none" if main is None else _DTYPES.get(main.dtype, str(main.dtype).removeprefix("torch."))
    call, caller = text_of(func, args, kwargs), _caller()
    if not is_mutable(func) and (_is_view(inputs, outputs) or name == "_local_scalar_dense"):  # a number, for Python
        return Work(op=name, kind="view", dtype=dtype, nbytes=0, call=call, caller=caller)
    nbytes = sum(map(_touched, inputs)) + sum(map(_touched, outputs))
    if name in _PRODUCTS:
        left, right = args[-2:] if name == "addmm" else args[1:3] if name == "baddbmm" else args[:2]
        dims = _product(left, right)
        flops = 2 * dims[0] * dims[1] * dims[2] * dims[3]
        return Work(
            op=name, kind="matmul", dtype=dtype, nbytes=nbytes, flops=flops, dims=dims, call=call, caller=caller
        )
    if "attention" in name and len(inputs) >= 3:
        work = _attention(name, func, args, kwargs, inputs, dtype=dtype, nbytes=nbytes)
        return replace(work, call=call, caller=caller)
    return Work(op=name, kind="pointwise", dtype=dtype, nbytes=nbytes, call=call, caller=caller)


def _caller() -> Caller:
    """What calls the operator now, by the state of autograd."""
    in_backward = torch._C._current_graph_task_id() != -1
    if not torch.is_grad_enabled():
        return "backward" if in_backward else "optimizer"
    if in_backward:
        return "recompute"  # nothing else builds a graph in the backward pass
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return "model"
    return "policy" if _is_in_policy() else "checkpoint"


_NEAREST_FRAMES = range(4, 10)
"""Depths of another dispatch mode's frame, seen from `_is_in_policy`: beyond its callers and the recorder's own mode,
before the model's code."""


def _is_in_policy() -> bool:
    """Whether the call came through another dispatch mode, as selective checkpointing's."""
    for place in _NEAREST_FRAMES:
        try:
            frame = sys._getframe(place)
        except ValueError:  # no more frames
            break
        if frame.f_code.co_name == "__torch_dispatch__":
            return True
    return False


class CacheAges:
    """Tracks how long ago memory was touched, in bytes of traffic since, over the calls of a step in order."""

    def __init__(self) -> None:
        self._passed = 0
        self._touched: dict[int, int] = {}
        """Storage -> bytes of traffic before it was last read or written."""

    def aged(self, work: Work, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Work:
        """The work of a call with `cold` set."""
        inputs = [tensor for tensor in _tensors((args, tuple(kwargs.values()))) if tensor.layout is torch.strided]
        cold = 0
        for place, tensor in enumerate(inputs):
            touched = self._touched.get(storage_of(tensor))
            if touched is None or self._passed - touched > CACHED_BYTES:
                cold |= 1 << place
        self._passed += work.nbytes
        for tensor in (*inputs, *_tensors((result,))):
            if tensor.layout is torch.strided:
                self._touched[storage_of(tensor)] = self._passed
        return replace(work, cold=cold) if cold else work


CACHED_BYTES = 4 * 2**20
"""Traffic after which memory is assumed to be out of the caches: more than a core's own holds, less than a processor's
shared one; between the two, what is measured hardly depends on it."""


def _product(left: torch.Tensor, right: torch.Tensor) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a product; of grouped products, all rows together."""
    if left.dim() == 3 and right.dim() == 3:
        return (left.shape[0], left.shape[1], right.shape[2], left.shape[2])
    if left.dim() == 2 and right.dim() == 3:
        return (1, left.shape[0], right.shape[2], left.shape[1])
    return (1, left.shape[-2], right.shape[-1], left.shape[-1])


def _attention(
    name: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[torch.Tensor],
    *,
    dtype: str,
    nbytes: int,
) -> Work:
    """The work of a fused attention kernel; those that begin with `_scaled` get (batch, heads, tokens, size)."""
    is_backward = "backward" in name
    query, keys = inputs[1:3] if is_backward else inputs[:2]
    heads, tokens = (1, 2) if name.startswith("_scaled") else (2, 1)
    if query.dim() != 4:
        return Work(op=name, kind="pointwise", dtype=dtype, nbytes=nbytes)
    dims = (query.shape[0], query.shape[heads], query.shape[tokens], keys.shape[tokens], query.shape[3])
    is_causal = _causal(func, args, kwargs)
    flops = 4 * dims[0] * dims[1] * dims[2] * dims[3] * dims[4]
    if is_causal:
        flops //= 2
    if is_backward:
        flops = int(flops * _BACKWARD_ATTENTION)
    return Work(op=name, kind="attention", dtype=dtype, nbytes=nbytes, flops=flops, dims=dims, is_causal=is_causal)


def _causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place = argument_place(func, "is_causal")
    if place is None:
        return bool(kwargs.get("custom_mask_type", 0))
    return bool(args[place]) if place < len(args) else bool(kwargs.get("is_causal", False))


@cache
def is_mutable(func: Any) -> bool:
    """Whether the operator writes into one of its arguments."""
    return bool(func._schema.is_mutable)


def _is_view(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether all results are in storages of the arguments."""
    storages = {storage_of(tensor) for tensor in inputs}
    return bool(outputs) and all(storage_of(tensor) in storages for tensor in outputs)


def storage_of(tensor: torch.Tensor) -> int:
    """An identifier of a tensor's storage while it is alive."""
    return int(tensor.untyped_storage()._cdata)


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of memory that reading a whole tensor touches: a broadcast one is reread from a cache."""
    if tensor.layout is not torch.strided:
        return 0
    return min(tensor.numel() * tensor.element_size(), int(tensor.untyped_storage().nbytes()))


def _tensors(values: tuple[Any, ...] | list[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
