"""Dispatches `scaled_dot_product_attention` on fake CPU tensors to the kernel that a CUDA card would run.

Replaces `scaled_dot_product_attention` and `_scaled_dot_product_attention_math` of pytorch's
aten/src/ATen/native/transformers/attention.cpp (torch 2.11 to 2.13): it chooses the kernel, prepares its inputs, and
calls its operator, which allocates the same results, and saves the same tensors for the backward pass, on a CPU. For
fake tensors those operators compute shapes only.

The buffers inside the kernels are in `attention_buffers.py`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Self
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gcbench.devices.target import Target
from gcbench.simulate.cuda.attention_rules import CUDNN_VERSION, AttentionCall, Mask, choose, gpu_of
from gcbench.simulate.cuda.dispatcher import first_result
from gcbench.simulate.trace.recorder import Recorder

_FLASH_HEAD_DIM_MULTIPLE = 8
_EFFICIENT_MASK_MULTIPLE = 8
"""In elements: `mem_eff_alignment`."""

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_OF_THE_TRACE: tuple[type, ...] = (FakeTensorMode, Recorder)
"""Dispatch modes that a trace has and a real run has not."""


class CudaAttention:
    """Traces attention as on `target` while it is entered: forward and backward pass, and recomputation.

    It replaces `torch.nn.functional.scaled_dot_product_attention`, which transformers and torch look up at each call. A
    `TorchFunctionMode` would miss the recomputation of checkpointed layers and
    `nn.MultiheadAttention`: it is off while it handles a call, and `Tensor.backward` is one.

    Args:
        target: a CUDA device; `ASSUMED_CAPABILITY` if its compute capability is unknown.
        cudnn_version: of the target, in cuDNN's numbering: 92000 is 9.20.0.

    Attributes:
        gpu: the properties of the target that the rules read.
        chosen: calls by kernel ("cudnn", "flash", "efficient", "math"), over all calls while it was entered.
        reasons: rejected kernel -> reason -> calls.
    """

    def __init__(self, target: Target, *, cudnn_version: int = CUDNN_VERSION) -> None:
        self.gpu = gpu_of(target, cudnn_version=cudnn_version)
        self.chosen: dict[str, int] = {}
        self.reasons: dict[str, dict[str, int]] = {}
        self._replacement = mock.patch.object(functional, "scaled_dot_product_attention", self._attend)

    def __enter__(self) -> Self:
        self._replacement.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._replacement.stop()

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        # From the last to the first, as gcc evaluates the arguments of the call in autocast's wrapper.
        mask = None if attn_mask is None else _autocast(attn_mask)
        value, key, query = (_autocast(tensor) for tensor in (value, key, query))
        with _without_autocast(query.device.type):
            call = describe(query, key, value, mask, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa)
            choice = choose(call, self.gpu)
            self.chosen[choice.kernel] = self.chosen.get(choice.kernel, 0) + 1
            for kernel, reason in choice.passed_over.items():
                counts = self.reasons.setdefault(kernel, {})
                counts[reason] = counts.get(reason, 0) + 1
            if choice.kernel == "flash":
                return flash(query, key, value, dropout_p, is_causal, scale)
            if choice.kernel == "math":
                return math_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
            mask = _additive(mask, query.dtype)
            is_efficient = choice.kernel == "efficient"
            if is_efficient and mask is not None:  # bound to the same name, so that the mask it is made from is freed
                mask = _aligned(mask).expand(*query.shape[:3], key.shape[2])
            op = _EFFICIENT if is_efficient else _CUDNN
            more = () if is_efficient else (False,)  # no debug mask, which cuDNN alone would return
            out: torch.Tensor = first_result(
                op, query, key, value, mask, call.needs_grad, dropout_p, is_causal, *more, scale=scale
            )
            return out


def describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> AttentionCall:
    """The properties of these tensors, of shape (batch, heads, sequence, head dimension), that the rules read."""
    tensors = (query, key, value)
    mask_properties = None
    if mask is not None:
        mask_properties = Mask(
            shape=tuple(mask.shape), requires_grad=mask.requires_grad, last_dim_is_dense=mask.stride(-1) == 1
        )
    return AttentionCall(
        dtype=str(query.dtype).removeprefix("torch."),
        query=tuple(query.shape),
        key=tuple(key.shape),
        value=tuple(value.shape),
        mask=mask_properties,
        dropout_p=dropout_p,
        is_causal=is_causal,
        needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        enable_gqa=enable_gqa,
        last_dims_are_dense=all(tensor.stride(-1) == 1 for tensor in tensors),
        offsets_bytes=tuple(int(tensor.storage_offset()) * tensor.element_size() for tensor in tensors),
    )


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Cast an input of attention as autocast does, which lists it for the lower precision."""
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type) or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Run below autocast, as the composite does: its matrix products keep their precision."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Convert a boolean mask to 0 and -inf, in a copy of its own shape in `dtype` (`convert_boolean_attn_mask`)."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    minus_infinity = torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.scalar_tensor(0.0, dtype=dtype, device=mask.device), minus_infinity)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Run it with head dimensions padded to a multiple of 8 (`pad_last_dim`, `post_process_flash_output`)."""
    head_dim = query.shape[-1]
    padding = -head_dim % _FLASH_HEAD_DIM_MULTIPLE
    if padding:
        query, key, value = (functional.pad(tensor, (0, padding)) for tensor in (query, key, value))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out: torch.Tensor = first_result(_FLASH, query, key, value, dropout_p, is_causal, False, scale=scale)
    return out[..., :head_dim] if padding else out


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """Copy to longer rows if a stride is no multiple of 8 elements (`preprocess_mask`, `pad_bias`).

    As in the source, rows that are a multiple already become 8 longer if another stride is not.
    """
    if mask.stride(-1) == 1 and all(stride % _EFFICIENT_MASK_MULTIPLE == 0 for stride in mask.stride()[:-1]):
        return mask
    keys = mask.shape[-1]
    padding = _EFFICIENT_MASK_MULTIPLE - keys % _EFFICIENT_MASK_MULTIPLE
    return functional.pad(mask, (0, padding))[..., :keys]


def _in_dispatch_mode() -> bool:
    """Return whether a real run would have a dispatch mode here: one that is neither for fake tensors nor records."""
    modes = _get_current_dispatch_mode_stack()
    return any(not isinstance(mode, _OF_THE_TRACE) for mode in modes)


def math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Run attention as single operators, with scores of shape (batch, heads, queries, keys), in fp32 for half inputs.

    `_scaled_dot_product_attention_math` itself does not fit: under any dispatch mode, and for fake tensors, it adds the
    mask out of place (`areAnyTensorSubclassLike`), where a real run does so only under selective checkpointing's; and
    on a CPU its dropout saves a mask in the scores' dtype. Names stay bound to the end here
    because the variables of the original do, and are freed in its order. It also converts the weights to the input's
    dtype, for a second result that is not read.
    """
    dtype = query.dtype
    given_mask = mask = _additive(mask, dtype)  # freed by the original's caller, unlike one made below
    is_half = dtype in (torch.float16, torch.bfloat16)
    query_acc, key_acc, value_acc = (tensor.float() if is_half else tensor for tensor in (query, key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(factor))
    scaled = query_acc * (-root if factor < 0 else root)
    if is_causal:
        visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = _additive(visible, scaled.dtype)
        del visible
    key_expanded, value_expanded = key_acc, value_acc
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        key_expanded = key_acc.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    if enable_gqa and query.shape[-3] != value.shape[-3]:
        value_expanded = value_acc.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    attn = torch.matmul(scaled, key_expanded.transpose(-2, -1) * root)
    if mask is not None:
        attn = attn + mask if _in_dispatch_mode() else attn.add_(mask)
    attn = torch.ops.aten._safe_softmax.default(attn, -1)
    if dropout_p > 0:
        attn = torch.native_dropout(attn, dropout_p, True)[0]
    unread = attn.to(dtype)
    out = torch.matmul(attn, value_expanded).to(dtype)
    del attn
    del key_expanded
    del value_expanded
    del scaled
    del mask
    del value_acc
    del key_acc
    del query_acc
    del unread
    del given_mask
    return out
