"""Buffers that CPU operators allocate inside while they run, which a trace of operators cannot see.

Numbers are a few bytes, which matter only when two phases' peaks are equal: `x * 0.9` makes a tensor of the number
(double or int64), and the kernel another one of the dtype it computes in (`wrapped_scalar_tensor` in pytorch's
aten/src/ATen/ScalarOps.h, and the casts of TensorIterator); both are freed when the operator returns. Seen in the
allocator's events of torch 2.13. On CUDA, numbers stay in host memory.

Not covered: the buffers of oneDNN in a product of bf16 matrices (a copy of one of them in a layout of its own, if it
chooses to make one).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from gcbench.simulate.events import KernelBuffer

_SAFE_SOFTMAX = torch.ops.aten._safe_softmax.default
_CUMSUM = torch.ops.aten.cumsum.default
_NUMBERS = {float: torch.float64, int: torch.int64, bool: torch.bool}
_WRAPPING = frozenset(
    f"{name}{inplace}.Scalar"
    for name in ("add", "sub", "mul", "div", "rsub", "remainder", "eq", "ne", "lt", "le", "gt", "ge")
    for inplace in ("", "_")
)
"""Operators whose argument is a number, which they wrap themselves."""


def internal_buffers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[KernelBuffer]:
    """The buffers that the operator allocates inside while it runs on the CPU."""
    if func is _SAFE_SOFTMAX:
        yield from _safe_softmax(result)
    if func is _CUMSUM and args[0].dtype is not result.dtype:  # `impl_func_cum_ops` in native/ReduceOps.cpp
        yield KernelBuffer(name="input in the result's dtype", nbytes=result.numel() * result.element_size())
    for place in _places(func):
        if place < len(args) and (dtype := _NUMBERS.get(type(args[place]))) is not None:
            yield KernelBuffer(name="number", nbytes=dtype.itemsize)
            tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
            if tensor is not None and tensor.dtype is not dtype:
                yield KernelBuffer(name="number", nbytes=tensor.dtype.itemsize)


def _safe_softmax(result: torch.Tensor) -> Iterator[KernelBuffer]:
    """A mask of its elements and one of its rows (`_safe_softmax` in pytorch's aten/src/ATen/native/SoftMax.cpp)."""
    yield KernelBuffer(name="mask", nbytes=result.numel())
    yield KernelBuffer(name="mask of rows", nbytes=result.numel() // max(result.shape[-1], 1))


@cache
def _places(func: Any) -> tuple[int, ...]:
    """Places of the arguments that are tensors, or numbers that the operator makes into one."""
    name = f"{func._schema.name.rpartition('::')[2]}.{func._schema.overload_name}"
    types = ("Tensor", "number") if name in _WRAPPING else ("Tensor",)
    return tuple(place for place, arg in enumerate(func._schema.arguments) if str(arg.type) in types)
