"""Chooses the kernel that `scaled_dot_product_attention` runs on a card, by PyTorch's own rules.

From `select_sdp_backend` and what it calls in pytorch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and
aten/src/ATen/native/transformers/sdp_utils_cpp.h, torch 2.11 to 2.13; functions named in backquotes are in these
files. Holds for dense tensors, with every kernel allowed, no environment variable set and deterministic algorithms off.

The rules change with the version. Before 2.11 the wheels bring a cuDNN that is too old to be preferred. The check of
storage offsets and cuDNN's limit on batch and heads came after 2.11, where such calls failed. From 2.14 on the
memory-efficient kernel accepts grouped heads (pytorch#191085), and cuDNN other head dimensions (pytorch#185553).

AMD's cards are assumed to run AOTriton 0.9 or later, which serves both flash and memory-efficient attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from gcbench.devices.target import Target

AttentionKernel = Literal["cudnn", "flash", "efficient", "math"]

CUDNN_VERSION = 92000
"""9.20.0, in cuDNN's numbering. Assumed: what PyPI's wheels of torch 2.12 and 2.13 require (2.11: 9.19.0).

Wheels built for CUDA 12 bring one from before 9.15.1, with which flash comes first on every card.
"""
TORCH_VERSION = (int(torch.__version__.split(".")[0]), int(torch.__version__.split(".")[1]))
"""The target is assumed to run the torch that is installed here."""
ASSUMED_CAPABILITY = (8, 0)
"""Compute capability of an NVIDIA card of which only the memory is known: an A100's, whose kernels later cards have."""

_HALF = ("float16", "bfloat16")
_CUDNN_PREFERRED_AFTER = 91500
_CUDNN_MOST_BATCH_OR_HEADS = 65535
_NEWEST = (12, 1)
_FLASH_MOST_HEAD_DIM = {"nvidia": 256, "amd": 512}


@dataclass(frozen=True, kw_only=True)
class Mask:
    """An explicit attention mask; `last_dim_is_dense` where its last stride is 1."""

    shape: tuple[int, ...]
    requires_grad: bool = False
    last_dim_is_dense: bool = True


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The properties of one call that the rules read.

    Attributes:
        dtype: of query, key and value after autocast, as in `str(torch.bfloat16)` without "torch.".
        query, key, value: shapes, (batch, heads, sequence, head dimension).
        needs_grad: gradients are on and one of the three requires one.
        last_dims_are_dense: the last stride of all three is 1.
        offsets_bytes: how far behind the start of its storage each of the three begins.
    """

    dtype: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: Mask | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    needs_grad: bool = True
    enable_gqa: bool = False
    last_dims_are_dense: bool = True
    offsets_bytes: tuple[int, ...] = (0, 0, 0)

    @property
    def head_dims(self) -> tuple[int, int, int]:
        """The head dimensions of query, key and value."""
        return self.query[-1], self.key[-1], self.value[-1]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The properties of a card that the rules read; `capability` is NVIDIA's, (9, 0) for an H100, unused for AMD."""

    capability: tuple[int, int] = ASSUMED_CAPABILITY
    vendor: str = "nvidia"
    cudnn_version: int = CUDNN_VERSION
    torch_version: tuple[int, int] = TORCH_VERSION

    @property
    def name(self) -> str:
        return f"sm{self.capability[0]}{self.capability[1]}"

    @property
    def prefers_cudnn(self) -> bool:
        """`check_prefer_cudnn_attention`, built for CUDA 13. Otherwise cuDNN comes after math, which takes any call."""
        return self.vendor == "nvidia" and self.cudnn_version > _CUDNN_PREFERRED_AFTER and self.capability[0] in (9, 10)


def gpu_of(target: Target, *, cudnn_version: int = CUDNN_VERSION) -> Gpu:
    """The properties of a target that the rules read; one without a vendor counts as NVIDIA's."""
    vendor = target.card.vendor if target.card is not None else None
    return Gpu(
        capability=target.capability or ASSUMED_CAPABILITY, vendor=vendor or "nvidia", cudnn_version=cudnn_version
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen kernel, and why each of those tried before it was rejected."""

    kernel: AttentionKernel
    passed_over: Mapping[AttentionKernel, str] = field(default_factory=dict)


def choose(call: AttentionCall, gpu: Gpu) -> Choice:
    """Choose the first kernel, in the order of preference, that supports the call; math always does."""
    tried = _NVIDIA if gpu.vendor == "nvidia" else _AMD
    passed_over: dict[AttentionKernel, str] = {}
    for kernel, objections in tried.items():
        if kernel == "cudnn" and not gpu.prefers_cudnn:
            continue
        objection = next(objections(call, gpu), None)
        if objection is None:
            return Choice(kernel=kernel, passed_over=passed_over)
        passed_over[kernel] = objection
    return Choice(kernel="math", passed_over=passed_over)


def _cudnn(call: AttentionCall, gpu: Gpu) -> Iterator[str]:
    """`can_use_cudnn_attention`."""
    if call.dropout_p > 0 and 91100 < gpu.cudnn_version < 91400:
        yield "this cuDNN has no dropout"
    yield from _not_four_dimensional(call)
    yield from _not_half(call, gpu)
    if call.mask is not None:
        yield from _cudnn_mask(call, call.mask)
    yield from _outside(gpu, (8, 0))
    if gpu.torch_version >= (2, 12) and call.dropout_p * 16 % 1:  # https://github.com/pytorch/pytorch/pull/174245
        yield f"dropout {call.dropout_p:g} is no multiple of 1/16"
    yield from _empty_sequence(call)
    yield from _strided(call, ignore_single=True)
    yield from _unequal_heads(call, supports_gqa=True, equal_key_and_value=False)
    yield from _cudnn_shapes(call, gpu)


def _cudnn_mask(call: AttentionCall, mask: Mask) -> Iterator[str]:
    """`check_attn_mask_shape`."""
    if mask.requires_grad:
        yield "the mask requires a gradient"
    batch, heads, queries, _ = call.query
    expected = (batch, heads, queries, call.key[2])[-len(mask.shape) :]
    if len(mask.shape) not in (2, 4) or any(
        size not in (1, full) for size, full in zip(mask.shape, expected, strict=True)
    ):
        yield f"a mask of shape {mask.shape}"


def _cudnn_shapes(call: AttentionCall, gpu: Gpu) -> Iterator[str]:
    """`check_cudnn_tensor_shapes`, cuDNN 9.10 and later."""
    if max(call.query[:2]) > _CUDNN_MOST_BATCH_OR_HEADS:
        yield f"more than {_CUDNN_MOST_BATCH_OR_HEADS} sequences or heads"
    dim, _, value_dim = call.head_dims
    limit = 128
    if gpu.capability == (9, 0) and gpu.cudnn_version >= 91000:
        limit = 256
    if gpu.capability[0] == 10 and gpu.cudnn_version >= 91100 and (dim, value_dim) == (192, 128):
        limit = 192
    if max(dim, value_dim) > limit:
        yield f"head dimension {max(dim, value_dim)} over {limit}"
    if dim % 8 or value_dim % 8:
        yield f"head dimension {dim if dim % 8 else value_dim} is no multiple of 8"
    if call.key[2] == 1:
        yield "a single key"
    if call.dropout_p > 0 and call.query[2] == 1:
        yield "dropout with a single query"


def _flash(call: AttentionCall, gpu: Gpu) -> Iterator[str]:
    """`can_use_flash_attention`."""
    yield from _not_four_dimensional(call)
    if call.mask is not None:
        yield "an explicit mask"
    most = _FLASH_MOST_HEAD_DIM[gpu.vendor]
    yield from _unequal_head_dims(call, most)
    dim = call.head_dims[0]
    if gpu.vendor == "nvidia":
        yield from _outside(gpu, (8, 0))
        # `check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`: too little shared memory.
        small = (8, 6) <= gpu.capability <= (8, 9) or (12, 0) <= gpu.capability <= (12, 1)
        if small and call.needs_grad and dim > 192 and (call.dropout_p > 0 or dim <= 224):
            yield f"no backward pass for head dimension {dim} on {gpu.name}"
    if call.is_causal and call.query[2] != call.key[2]:
        yield "causal with unequal sequence lengths"
    yield from _not_half(call, gpu)
    yield from _unequal_heads(call, supports_gqa=True)
    yield from _empty_sequence(call)
    yield from _strided(call, ignore_single=True)


def _efficient(call: AttentionCall, gpu: Gpu) -> Iterator[str]:
    """`can_use_mem_efficient_attention`."""
    if gpu.vendor == "nvidia":
        yield from _outside(gpu, (5, 0))
    yield from _not_four_dimensional(call)
    dim, key_dim, value_dim = call.head_dims
    alignment = _gemm_alignment(call, gpu)
    if gpu.vendor == "amd":
        yield from _unequal_head_dims(call, _FLASH_MOST_HEAD_DIM["amd"])
    if dim != key_dim:
        yield f"head dimensions {dim} and {key_dim}"
    if dim % alignment or value_dim % alignment:
        yield f"head dimension {dim if dim % alignment else value_dim} is no multiple of {alignment}"
    if gpu.vendor == "nvidia" and gpu.capability[0] >= 8:
        # `check_data_ptr_alignment_mem_efficient`; the allocator's own addresses are always aligned.
        alignment_bytes = alignment * (2 if call.dtype in _HALF else 4)
        if any(offset % alignment_bytes for offset in call.offsets_bytes):
            yield f"a tensor does not begin on a multiple of {alignment_bytes} bytes"
    yield from _empty_sequence(call)
    yield from _strided(call, ignore_single=False)
    yield from _unequal_heads(call, supports_gqa=False)
    if call.dtype not in (*_HALF, "float32"):
        yield call.dtype
    yield from _old_bf16(call, gpu)


def _gemm_alignment(call: AttentionCall, gpu: Gpu) -> int:
    """`minimum_gemm_alignment`, in elements: 128 bits where tensor cores serve the dtype."""
    is_half = call.dtype in _HALF
    if gpu.vendor == "amd" or gpu.capability[0] >= 8:
        return 8 if is_half else 4
    return 8 if is_half and gpu.capability[0] == 7 else 1


def _not_four_dimensional(call: AttentionCall) -> Iterator[str]:
    """`check_tensor_shapes`."""
    dims = {len(call.query), len(call.key), len(call.value)}
    if dims != {4}:
        yield f"tensors of {max(dims - {4})} dimensions"


def _not_half(call: AttentionCall, gpu: Gpu) -> Iterator[str]:
    """`check_dtypes_low_precision`."""
    if call.dtype not in _HALF:
        yield call.dtype
    yield from _old_bf16(call, gpu)


def _old_bf16(call: AttentionCall, gpu: Gpu) -> Iterator[str]:
    if call.dtype == "bfloat16" and gpu.vendor == "nvidia" and gpu.capability[0] < 8:
        yield f"bfloat16 on {gpu.name}"


def _outside(gpu: Gpu, oldest: tuple[int, int]) -> Iterator[str]:
    """`check_sm_version`."""
    if not oldest <= gpu.capability <= _NEWEST:
        yield f"not built for {gpu.name}"


def _unequal_head_dims(call: AttentionCall, most: int) -> Iterator[str]:
    """`check_head_dim_size_flash`."""
    if len(set(call.head_dims)) > 1:
        yield "head dimensions " + ", ".join(map(str, call.head_dims))
    if call.head_dims[0] > most:
        yield f"head dimension {call.head_dims[0]} over {most}"


def _unequal_heads(call: AttentionCall, *, supports_gqa: bool, equal_key_and_value: bool = True) -> Iterator[str]:
    """`check_batch_size_and_num_heads_dense` and `check_grouped_query_attention`."""
    if len({call.query[0], call.key[0], call.value[0]}) > 1:
        yield "unequal batch sizes"
    heads, key_heads, value_heads = call.query[1], call.key[1], call.value[1]
    if not (call.enable_gqa and supports_gqa):
        if heads != key_heads or heads != value_heads:
            yield f"{heads} query heads on {key_heads} key heads"
        return
    if equal_key_and_value and key_heads != value_heads:
        yield f"{key_heads} key heads and {value_heads} value heads"
    if heads % key_heads or heads % value_heads:
        yield f"{heads} query heads on {key_heads} key heads"


def _empty_sequence(call: AttentionCall) -> Iterator[str]:
    """`check_nonzero_sequence_lengths_dense`."""
    if call.query[2] == 0 or call.key[2] == 0:
        yield "an empty sequence"


def _strided(call: AttentionCall, *, ignore_single: bool) -> Iterator[str]:
    """`check_last_dim_stride_equals_1_dense`."""
    if not call.last_dims_are_dense and not (ignore_single and call.query[-1] == 1):
        yield "a last dimension with gaps"
    if call.mask is not None and not call.mask.last_dim_is_dense:
        yield "a mask that is broadcast along the keys"


_Objections = Callable[[AttentionCall, Gpu], Iterator[str]]
_NVIDIA: dict[AttentionKernel, _Objections] = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}
_AMD: dict[AttentionKernel, _Objections] = {"flash": _flash, "efficient": _efficient}
"""Kernels in the order in which they are tried (`priority_order`), with the reasons against each."""
