"""Lists the buffers that attention's operators allocate inside on a card, which a trace of operators cannot see.

From pytorch's sources, torch 2.11 to 2.13, each named beside its figure, in order of allocation, after the operator's
results; each says how long it lives. Deterministic algorithms, which need more, are not covered.

What cuDNN allocates beyond the tensors that its front end names was measured on an H100, in one block with them, and is
assumed to be the same on other cards. What sources do not say is assumed: a card's shared memory, which decides between
tiles of the memory-efficient kernel, follows from its compute capability; and AOTriton on AMD's cards needs one row sum
per query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from gcbench.devices.target import Target
from gcbench.simulate.cuda.attention_rules import Gpu, gpu_of
from gcbench.simulate.events import KernelBuffer

ASSUMED_NUM_SMS = 108
"""Multiprocessors of a card of which only the memory is known: an A100's."""

_FP32_BYTES = 4
_FLASH_FORWARD = "set_params_splitkv, pytorch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp"
_FLASH_RNG = "mha_fwd, pytorch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp"
_RNG_STATE_BYTES = 16
_FLASH_BACKWARD = "mha_bwd, pytorch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp"
_FLASH_VARLEN_BACKWARD = "mha_varlen_bwd, pytorch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp"
_COPIES = "_flash_attention_backward, pytorch aten/src/ATen/native/transformers/cuda/attention_backward.cu"
_EFFICIENT_FORWARD = "_efficient_attention_forward, pytorch aten/src/ATen/native/transformers/cuda/attention.cu"
_EFFICIENT_BACKWARD = (
    "_efficient_attention_backward, pytorch aten/src/ATen/native/transformers/cuda/attention_backward.cu"
)
_WORKSPACE = "workspace_size, pytorch aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h"
_CUDNN_COPY = "run_cudnn_SDP_bprop, pytorch aten/src/ATen/native/cudnn/MHA.cpp"
_CUDNN_PLAN_BYTES = 256
_CUDNN_WORKSPACE = (
    "measured on an H100, torch 2.11, cuDNN 9.19 (results/reference/plain-loop-nvidia-h100.json); dQ_accum and "
    "softmax_sum: CompositeSDPABackwardNode, cudnn-frontend "
    "include/cudnn_frontend/node/scaled_dot_product_flash_attention.h"
)
_AOTRITON = "assumed: AOTriton's backward pass, pytorch aten/src/ATen/native/transformers/hip"
_SAFE_SOFTMAX = "_safe_softmax, pytorch aten/src/ATen/native/transformers/attention.cpp"
_SOFTMAX_BACKWARD = "softmax_backward_cuda_out, pytorch aten/src/ATen/native/cuda/SoftMax.cu"


def internal_buffers(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target
) -> tuple[KernelBuffer, ...]:
    """The buffers of one call of an aten operator on `target`, from the shapes and strides of its arguments.

    `func` is a `torch._ops.OpOverload`, as in `__torch_dispatch__`. Empty for operators that are not attention's, or
    have no buffers.
    """
    buffers = _BUFFERS.get(func)
    if buffers is None:
        return ()
    card = target.card
    num_sms = card.num_sms if card is not None and card.num_sms is not None else ASSUMED_NUM_SMS
    # A dispatch mode does not get trailing arguments that have their default.
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    by_name = zip((argument.name for argument in arguments), args, strict=False)
    inputs = {**defaults, **dict(by_name), **kwargs}
    return tuple(buffer for buffer in buffers(inputs, gpu_of(target), num_sms) if buffer.nbytes)


class _Sizes(NamedTuple):
    """The sizes of one call; `key_heads` is less than `heads` if heads are grouped."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int


def _sizes(inputs: dict[str, Any]) -> _Sizes:
    """Read the sizes from query, key and value of shape (batch, heads, sequence, head dimension)."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    batch, heads, queries, head_dim = query.shape
    return _Sizes(batch, heads, key.shape[1], queries, key.shape[2], head_dim, value.shape[3], query.element_size())


def _flash_forward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    """The random state, if there is dropout; else the partial results of splits.

    Keys are split among multiprocessors if there are too few blocks for all of them.
    """
    s = _sizes(inputs)
    if gpu.vendor != "nvidia":
        return
    if inputs["dropout_p"] > 0:  # replaced by the state that dropout drew from
        yield KernelBuffer(name="first rng_state", nbytes=_RNG_STATE_BYTES, source=_FLASH_RNG, after_results=2)
        return
    splits = _num_splits(s, num_sms)
    if splits > 1:
        rows = splits * s.batch * s.heads * s.queries
        parts = {"partial lse": rows, "partial out": rows * _rounded_head_dim(s.head_dim)}
        for name, count in parts.items():  # before the state of dropout
            yield KernelBuffer(name=name, nbytes=count * _FP32_BYTES, source=_FLASH_FORWARD, after_results=2)


def _num_splits(s: _Sizes, num_sms: int) -> int:
    """`num_splits_heuristic`: the fewest splits that come within 15 % of the fullest last wave of blocks."""
    key_block = 256 if s.head_dim <= 64 else 128 if s.head_dim <= 128 else 64
    key_blocks = math.ceil(s.keys / key_block)
    blocks = s.batch * s.heads * math.ceil(s.queries / 64)
    slots = 2 * num_sms
    if blocks >= 0.8 * slots:
        return 1
    fullness: dict[int, float] = {}
    for splits in range(1, min(128, slots, key_blocks) + 1):
        if splits == 1 or math.ceil(key_blocks / splits) != math.ceil(key_blocks / (splits - 1)):
            waves = blocks * splits / slots
            fullness[splits] = waves / math.ceil(waves)
    enough = 0.85 * max(fullness.values(), default=0.0)
    return next((splits for splits, full in fullness.items() if full >= enough), 1)


def _flash_backward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    s = _sizes(inputs)
    yield from _bshd_copy(inputs["grad_out"], "contiguous grad_out", _COPIES)
    yield from _bshd_copy(inputs["out"], "contiguous out", _COPIES)
    if gpu.vendor == "amd":
        yield KernelBuffer(name="delta", nbytes=s.batch * s.heads * s.queries * _FP32_BYTES, source=_AOTRITON)
        return
    rows = s.batch * s.heads * _round_up(s.queries, 128)
    yield KernelBuffer(name="softmax_d", nbytes=rows * _FP32_BYTES, source=_FLASH_BACKWARD)
    yield KernelBuffer(
        name="dq_accum", nbytes=rows * _rounded_head_dim(s.head_dim) * _FP32_BYTES, source=_FLASH_BACKWARD
    )
    if s.key_heads != s.heads:
        nbytes = s.batch * s.keys * s.heads * s.head_dim * s.itemsize
        yield KernelBuffer(name="dk_expanded", nbytes=nbytes, source=_FLASH_BACKWARD)
        yield KernelBuffer(name="dv_expanded", nbytes=nbytes, source=_FLASH_BACKWARD)


def _flash_varlen_backward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    """Buffers for packed sequences: 128 rows more for each, so that no block of one reaches into the next."""
    tokens, heads, head_dim = inputs["query"].shape
    if gpu.vendor == "amd":
        yield KernelBuffer(name="delta", nbytes=tokens * heads * _FP32_BYTES, source=_AOTRITON)
        return
    rows = heads * (tokens + 128 * (inputs["cum_seq_q"].numel() - 1))
    yield KernelBuffer(name="softmax_d", nbytes=rows * _FP32_BYTES, source=_FLASH_VARLEN_BACKWARD)
    yield KernelBuffer(
        name="dq_accum", nbytes=rows * _rounded_head_dim(head_dim) * _FP32_BYTES, source=_FLASH_VARLEN_BACKWARD
    )
    key = inputs["key"]
    if key.shape[1] != heads:
        nbytes = key.shape[0] * heads * head_dim * key.element_size()
        yield KernelBuffer(name="dk_expanded", nbytes=nbytes, source=_FLASH_VARLEN_BACKWARD)
        yield KernelBuffer(name="dv_expanded", nbytes=nbytes, source=_FLASH_VARLEN_BACKWARD)


def _rounded_head_dim(head_dim: int) -> int:
    """Round up a multiple of 8 as flash attention does."""
    return _round_up(head_dim, 32 if head_dim <= 128 else 64)


def _efficient_forward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    """The output in fp32: only kernels for head dimensions over 128 accumulate it in memory, and half needs a copy."""
    s = _sizes(inputs)
    if gpu.vendor == "nvidia" and max(s.head_dim, s.value_dim) > 128 and s.itemsize < _FP32_BYTES:
        nbytes = s.batch * s.queries * s.heads * s.value_dim * _FP32_BYTES
        yield KernelBuffer(name="output_accum", nbytes=nbytes, source=_EFFICIENT_FORWARD)


def _efficient_backward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    s = _sizes(inputs)
    yield from _bshd_copy(inputs["grad_out_"], "contiguous grad_out", _EFFICIENT_BACKWARD)
    rows_bytes = s.batch * s.heads * s.queries * _FP32_BYTES
    delta = KernelBuffer(name="delta", nbytes=rows_bytes, source=_EFFICIENT_BACKWARD, outlives=1)
    if gpu.vendor == "amd":
        yield delta
        return
    tile = _tile(s, gpu, has_dropout=inputs["dropout_p"] > 0)
    workspace = KernelBuffer(name="workspace", nbytes=_workspace_bytes(s, gpu, tile), source=_WORKSPACE)
    # `kKernelComputesDelta`; otherwise delta is the sum of an elementwise product, in fp32.
    is_half = s.itemsize < _FP32_BYTES
    if is_half and (tile.gradients_in_registers or not _is_volta(gpu)):
        yield delta
        yield workspace
        return
    fp32_bytes = rows_bytes * s.value_dim
    parts = [("grad_out in fp32", fp32_bytes), ("out in fp32", fp32_bytes)] if is_half else []
    parts += [("grad_out * out", fp32_bytes), ("its sum", rows_bytes)]
    # All are freed with the full expression, of which a dense copy, of other strides, is kept.
    for place, (name, nbytes) in enumerate(parts):
        yield KernelBuffer(name=name, nbytes=nbytes, source=_EFFICIENT_BACKWARD, outlives=len(parts) - place)
    yield delta
    yield workspace


class _Tile(NamedTuple):
    """A memory-efficient backward kernel: block sizes, and whether dK and dV stay in registers."""

    queries: int
    keys: int
    gradients_in_registers: bool


def _tile(s: _Sizes, gpu: Gpu, *, has_dropout: bool) -> _Tile:
    """The first kernel that fits, in the order of `dispatch_cutlassB` (mem_eff_attention/kernels/cutlassB.h)."""
    dim = max(s.head_dim, s.value_dim)
    is_half = s.itemsize < _FP32_BYTES
    if dim <= 64:
        return _Tile(64, 64, is_half)
    if is_half and dim <= 96 and gpu.capability in ((8, 6), (8, 9)) and not has_dropout:
        return _Tile(128, 64, True)
    if not _has_large_shared_memory(gpu):
        return _Tile(64, 64, False)
    if dim <= 128:
        return _Tile(128, 128 if is_half and gpu.capability[0] >= 8 else 64, is_half)
    return _Tile(128, 64, False)


def _has_large_shared_memory(gpu: Gpu) -> bool:
    """Whether a block has 96 KB of shared memory, as on Volta, or 163 KB and more; other cards have 64 or 99 KB.

    From the technical specifications in the CUDA programming guide. Which kernels fit is assumed; pytorch's source
    has one for sm86 and sm89 alone, because the larger one does not fit.
    """
    return gpu.capability in ((7, 0), (8, 0), (8, 7)) or gpu.capability[0] in (9, 10)


def _is_volta(gpu: Gpu) -> bool:
    """Whether the card runs the kernels built for sm70 (`dispatch_cutlassB`)."""
    return (7, 0) <= gpu.capability < (7, 5)


def _workspace_bytes(s: _Sizes, gpu: Gpu, tile: _Tile) -> int:
    """fp32 accumulators: of dQ, with a 16-byte header per tile, and of dK and dV unless they stay in registers."""
    splits_keys = gpu.capability >= (7, 0)
    is_half = s.itemsize < _FP32_BYTES
    in_memory = is_half and not tile.gradients_in_registers
    splits = math.ceil(s.keys / tile.keys)
    if s.batch * s.heads >= 256 and s.keys <= 2 * tile.keys:
        splits = 1
    if in_memory:
        splits = min(splits, 200 // (s.batch * s.heads))
    if not splits_keys or splits < 1:
        splits = 1
    words = 0
    if splits_keys or is_half:
        tiles = math.ceil(s.queries / tile.queries) * math.ceil(s.head_dim / tile.keys)
        words += tiles * (4 + tile.queries * tile.keys)
    if in_memory:
        rounded = _round_up(s.head_dim, tile.queries) + _round_up(s.value_dim, tile.queries)
        words += splits * tile.keys * rounded
    return s.batch * s.heads * _round_up(words, 4) * _FP32_BYTES


def _cudnn_backward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    s = _sizes(inputs)
    grad_out = inputs["grad_out"]
    if grad_out.stride(-1) != 1:
        yield KernelBuffer(name="dense grad_out", nbytes=_nbytes(grad_out), source=_CUDNN_COPY)
    rows_bytes = s.batch * s.heads * s.queries * _FP32_BYTES
    nbytes = rows_bytes * s.head_dim + rows_bytes + _CUDNN_PLAN_BYTES  # dQ_accum and softmax_sum, in fp32
    if s.key_heads != s.heads:  # dK and dV of all heads, before those of a group are added up
        nbytes += s.batch * s.heads * s.keys * s.itemsize * (s.head_dim + s.value_dim)
    yield KernelBuffer(name="cuDNN's workspace", nbytes=nbytes, source=_CUDNN_WORKSPACE)


def _cudnn_forward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    yield KernelBuffer(name="cuDNN's workspace", nbytes=_CUDNN_PLAN_BYTES, source=_CUDNN_WORKSPACE)


def _safe_softmax(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    """Booleans that say where the scores are -inf, and which rows are so throughout; and what those become."""
    scores = inputs["self"]
    count = scores.numel()
    yield KernelBuffer(name="masked", nbytes=count, source=_SAFE_SOFTMAX)
    yield KernelBuffer(name="masked_rows", nbytes=count // max(scores.shape[inputs["dim"]], 1), source=_SAFE_SOFTMAX)
    yield KernelBuffer(name="zero", nbytes=scores.element_size(), source=_SAFE_SOFTMAX)


def _softmax_backward(inputs: dict[str, Any], gpu: Gpu, num_sms: int) -> Iterator[KernelBuffer]:
    """A product of the size of the scores, in eager attention too."""
    yield KernelBuffer(name="grad * output", nbytes=_nbytes(inputs["grad_output"]), source=_SOFTMAX_BACKWARD)


def _bshd_copy(tensor: torch.Tensor, name: str, source: str) -> Iterator[KernelBuffer]:
    """A copy of a (batch, heads, sequence, dim) tensor unless it is dense as (batch, sequence, heads, dim)."""
    if not tensor.transpose(1, 2).is_contiguous():
        yield KernelBuffer(name=name, nbytes=_nbytes(tensor), source=source, after_results=0)


def _nbytes(tensor: torch.Tensor) -> int:
    """The tensor's bytes if it were dense."""
    return tensor.numel() * tensor.element_size()


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


_aten = torch.ops.aten
_BUFFERS: dict[Any, Callable[[dict[str, Any], Gpu, int], Iterator[KernelBuffer]]] = {
    _aten._scaled_dot_product_flash_attention.default: _flash_forward,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._flash_attention_backward.default: _flash_varlen_backward,
    _aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten._scaled_dot_product_cudnn_attention.default: _cudnn_forward,
    _aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    _aten._safe_softmax.default: _safe_softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
}
