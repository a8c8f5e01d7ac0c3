"""Runs CUDA's autocast on fake CPU tensors: it casts the same operators by the same policies.

A step on fake tensors runs under `torch.autocast("cpu")`, whose list of operators differs from CUDA's: on CUDA a norm,
a power or an exponential computes in fp32, on the CPU in the dtype of its input. While `cuda_autocast` is entered, the
CPU's autocast kernels are those of CUDA. They are replaced where autocast itself works, in torch's dispatcher, so that
every spelling of an operator is covered (`F.softmax`, `tensor.softmax`, `**`), and so are calls from torch's own C++
code: `F.cross_entropy` is cast inside, or not, as on CUDA. Without autocast, nothing changes.

The operators that CUDA casts are read from the installed torch, which lists them even without CUDA. How each is cast
is copied from pytorch's aten/src/ATen/autocast_mode.h (AT_FORALL_…, torch 2.11 to 2.13); a test compares the two
lists. Operators that only the CPU casts are left alone, and those that both cast to the lower precision
keep the CPU's kernel, with its cache of cast weights.

Not covered: the cache for operators that only CUDA casts to the lower precision. A weight passed to `einsum` is cast
again by each call, where CUDA keeps the first cast until the forward pass ends (in transformers, XLNet alone does so).

Not yet measured by gcbench on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch

from gcbench.simulate.cuda.dispatcher import FALLTHROUGH, Kernel, kernels_replaced


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER_PRECISION = _names(
    """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution cudnn_convolution cudnn_convolution_transpose prelu addmm addmv addr matmul
    einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
    _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
    scaled_dot_product_attention
    """
)
"""Arguments are cast to autocast's dtype."""

FP32_SET_OPT_DTYPE = _names(
    """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
    """
)
"""Called with dtype=float32, unless the caller chose a dtype."""

FP32_APPEND_DTYPE = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
"""Replaced by the overload with a dtype."""

PROMOTE = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")
"""Arguments are cast to the widest dtype among them."""

# All others that CUDA's autocast knows are cast to fp32.

_FP32_APPEND_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "norm.Scalar": (None, 2),
    "norm.ScalarOpt_dim": (None,) * 3 + (False,),
}


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let autocast on the CPU cast as CUDA's does, in the whole process, until it is exited.

    A model's code that asks whether autocast is on means CUDA's if it names no device, as Nemotron's norm does.
    """
    is_enabled = torch.is_autocast_enabled

    def is_autocast_enabled(*device_type: str) -> bool:
        return is_enabled(*(device_type or ("cpu",)))

    with (
        kernels_replaced("AutocastCPU", _kernels()),
        mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
        mock.patch.object(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu")),
    ):
        yield


@cache
def cast_by(device: str) -> frozenset[str]:
    """Operators that autocast on "CPU" or "CUDA" casts, without their namespace, as the installed torch has them."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name.removeprefix("aten::") for name in names if has_kernel(name, f"Autocast{device}"))


@cache
def _kernels() -> dict[str, Kernel]:
    """Operator -> the kernel that replaces its autocast kernel on the CPU."""
    on_cpu, on_cuda = cast_by("CPU"), cast_by("CUDA")
    kernels: dict[str, Kernel] = dict.fromkeys(on_cpu - on_cuda, FALLTHROUGH)
    for name in on_cuda:
        if name in LOWER_PRECISION and name in on_cpu:
            continue
        kernels[name] = _kernel(name)
    return kernels


def _kernel(name: str) -> Kernel:
    op = _overload(name)
    if name in LOWER_PRECISION:
        return _casting(op, lambda tensors: torch.get_autocast_dtype("cpu"))
    if name in PROMOTE:
        return _casting(op, _widest)
    if name in FP32_SET_OPT_DTYPE:
        return _setting_dtype(op)
    if name in FP32_APPEND_DTYPE:
        return _appending_dtype(_overload(FP32_APPEND_DTYPE[name]), _FP32_APPEND_DEFAULTS[name])
    return _casting(op, lambda tensors: torch.float32)


def _overload(name: str) -> Any:
    """`"softmax.int"` as `torch.ops.aten.softmax.int`."""
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _casting(op: Any, dtype_for: Callable[[list[torch.Tensor]], torch.dtype]) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            dtype = dtype_for(list(_tensors((*args, *kwargs.values()))))
            return op(*_cast(args, dtype), **{key: _cast(value, dtype) for key, value in kwargs.items()})

    return kernel


def _setting_dtype(op: Any) -> Kernel:
    arguments = op._schema.arguments
    place = next(number for number, argument in enumerate(arguments) if argument.name == "dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = args[place] if len(args) > place else kwargs.get("dtype")
        if dtype is None and _is_eligible(args[0]):
            args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
        with _without_autocast():
            return op(*args, **kwargs)

    return kernel


def _appending_dtype(op: Any, defaults: tuple[Any, ...]) -> Kernel:
    def kernel(*args: Any) -> Any:
        args += defaults[len(args) :]
        with _without_autocast():
            return op(*args, dtype=torch.float32 if _is_eligible(args[0]) else args[0].dtype)

    return kernel


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _widest(tensors: list[torch.Tensor]) -> torch.dtype:
    if any(_is_eligible(tensor) and tensor.dtype is torch.float32 for tensor in tensors):
        return torch.float32
    return torch.get_autocast_dtype("cpu")


def _is_eligible(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if _is_eligible(value) else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
