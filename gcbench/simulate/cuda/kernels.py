"""Dispatches a training step on fake CPU tensors to the kernels that CUDA runs, with the memory that they allocate.

`as_on_cuda` combines what is known to differ, except attention (`attention.py`):

- autocast casts other operators (`autocast.py`);
- optimizers are foreach (`optimizer.py`), and a gradient scaler reads no values (`trace/grad_scaler.py`);
- dropout saves a mask of one byte an element, not of the element's size;
- softmax and log-softmax of fp16 into fp32 need no fp32 copy of their input (of bf16 they do, as on the CPU);
- layer norm saves its statistics in fp32 whatever its input;
- RMS norm is one kernel that saves one statistic per row, not a chain of operators;
- before Ampere, experts have no grouped matrix product.

The operators are replaced in torch's dispatcher, at the key of CPU tensors (AutogradCPU), where torch itself chooses
between devices' kernels: every spelling is covered, and so are calls from torch's own C++ code.

Checked and found to allocate the same, so that nothing is replaced: cross-entropy (`cross_entropy_loss` passes
log-softmax the dtype of the logits, also under autocast; the two results of `nll_loss`), embedding, `index_add`,
`cumsum`, `linear`, in-place and alpha and feature dropout (never fused), the histogram of the experts (fp32 on the
CPU, int32 on CUDA). The buffers inside CUDA's kernels are in `workspaces.py`.

From pytorch's sources, torch 2.11 to 2.13, named beside each function. Not yet measured by gcbench on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from transformers.integrations import moe

from gcbench.devices.target import Target
from gcbench.simulate.cuda.autocast import cuda_autocast
from gcbench.simulate.cuda.dispatcher import Kernel, first_result, kernels_replaced
from gcbench.simulate.cuda.optimizer import foreach_on_cpu
from gcbench.simulate.trace.grad_scaler import scaler_for_fake_tensors

_GROUPED_MM_SINCE = (8, 0)
_HALVES = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


@contextmanager
def as_on_cuda(target: Target) -> Iterator[None]:
    """Run steps on fake CPU tensors with the kernels of `target`, a CUDA card; any other target changes nothing.

    Holds for the whole process until it is exited: no real tensor should train meanwhile.
    """
    with ExitStack() as stack:
        if target.kind == "cuda":
            for context in (cuda_autocast(), cuda_operators(), foreach_on_cpu(), scaler_for_fake_tensors()):
                stack.enter_context(context)
            stack.enter_context(experts_of(target.capability))
        yield


def cuda_operators() -> AbstractContextManager[None]:
    """Replace dropout, softmax, log-softmax, layer norm and RMS norm on fake CPU tensors by CUDA's."""
    return kernels_replaced("AutogradCPU", _KERNELS)


@contextmanager
def experts_of(capability: tuple[int, int] | None) -> Iterator[None]:
    """Let experts multiply one group at a time if the card has no grouped matrix product.

    `_can_use_grouped_mm` in transformers' integrations/moe.py checks a card's compute capability, and treats every CPU
    as able. A capability of None counts as able, too.
    """
    if capability is None or capability >= _GROUPED_MM_SINCE or not hasattr(moe, "_can_use_grouped_mm"):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(moe, "_can_use_grouped_mm", lambda *args: False))
        operator = OPDEFS.get("transformers::grouped_mm_fallback")
        if operator is not None and "transformers::grouped_mm_fallback_backward" not in OPDEFS:
            stack.enter_context(mock.patch.object(operator, "_backward_fn", _gradients_of_groups))
        yield


def _gradients_of_groups(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """What the products of one group at a time write to; in older transformers they ask for the sizes of the groups."""
    states, weight = ctx.saved_tensors
    return torch.zeros_like(states), torch.zeros_like(weight), None


def _dropout(tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """`dropout` and `is_fused_kernel_acceptable` in pytorch's aten/src/ATen/native/Dropout.cpp."""
    if not train or p == 0 or tensor.numel() == 0:
        return tensor
    if p == 1:
        return tensor.mul(tensor.new_zeros(()))
    result: torch.Tensor = _aten.native_dropout.default(tensor, p, True)[0]
    return result


def _softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`softmax` in pytorch's aten/src/ATen/native/SoftMax.cpp; `dim` may be negative."""
    return _normalized(_aten._softmax.default, tensor, dim, dtype)


def _log_softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`log_softmax` in the same file."""
    return _normalized(_aten._log_softmax.default, tensor, dim, dtype)


def _normalized(op: Any, tensor: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    half_to_float = isinstance(tensor, FakeTensor) and tensor.dtype is torch.float16 and dtype is torch.float32
    if not half_to_float and dtype is not None:
        tensor = tensor.to(dtype)
    result: torch.Tensor = op(tensor, dim, half_to_float)
    return result


def _layer_norm(
    tensor: torch.Tensor,
    shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """`layer_norm_symint` in pytorch's aten/src/ATen/native/layer_norm.cpp.

    On the CPU, statistics of half inputs are in half precision unless the weight is fp32: `param_scalar_type` in
    aten/src/ATen/native/cpu/mixed_data_type.h.
    """
    result: torch.Tensor
    if isinstance(tensor, FakeTensor) and tensor.dtype in _HALVES:
        result = _LayerNorm.apply(tensor, shape, weight, bias)  # type: ignore[no-untyped-call]
    else:
        result = first_result(_aten.native_layer_norm.default, tensor, shape, weight, bias, eps)
    return result


def _rms_norm(
    tensor: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`rms_norm_symint` in pytorch's aten/src/ATen/native/layer_norm.cpp."""
    is_fused = (
        isinstance(tensor, FakeTensor)
        and not tensor.is_complex()
        and (weight is None or weight.dtype is tensor.dtype)
        and suggest_memory_format(tensor) is torch.contiguous_format
    )
    result: torch.Tensor
    if is_fused:
        result = _RMSNorm.apply(tensor, shape, weight, eps)  # type: ignore[no-untyped-call]
    else:
        result = _aten._fused_rms_norm.default(tensor, shape, weight, eps)[0]  # a chain of operators on a CPU
    return result


class _LayerNorm(torch.autograd.Function):
    """`layer_norm_cuda` and `layer_norm_backward_cuda` in pytorch's aten/src/ATen/native/cuda/layer_norm_kernel.cu."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, shape: list[int], weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows = [*tensor.shape[: tensor.dim() - len(shape)], *[1] * len(shape)]
        dense = tensor.contiguous()
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        mean = tensor.new_empty(rows, dtype=torch.float32)
        rstd = tensor.new_empty(rows, dtype=torch.float32)
        ctx.shape = shape
        ctx.save_for_backward(weight, bias, rstd, mean, tensor)  # let go from the last on
        del dense  # the copy of an input that is not contiguous
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, bias, rstd, mean, tensor = ctx.saved_tensors
        output_mask = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
        of_tensor, of_weight, of_bias = _aten.native_layer_norm_backward.default(
            gradients[0], tensor, ctx.shape, mean, rstd, weight, bias, output_mask
        )
        return of_tensor, None, of_weight, of_bias


class _RMSNorm(torch.autograd.Function):
    """`_fused_rms_norm_cuda` and `_fused_rms_norm_backward_cuda` in the same file.

    torch has shape functions of both operators for fake tensors, but no gradient of the first on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float | None
    ) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result, rstd = _aten._fused_rms_norm.default(tensor, shape, weight, eps)
        ctx.shape = shape
        ctx.save_for_backward(tensor, rstd, weight)
        normalized: torch.Tensor = result
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tensor, rstd, weight = ctx.saved_tensors
        output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        of_tensor, of_weight = _aten._fused_rms_norm_backward.default(
            gradients[0], tensor, ctx.shape, rstd, weight, output_mask
        )
        return of_tensor, None, of_weight, None


_KERNELS: dict[str, Kernel] = {
    "dropout": _dropout,
    "softmax.int": _softmax,
    "log_softmax.int": _log_softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}
