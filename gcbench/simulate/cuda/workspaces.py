"""Lists memory on a card that a trace of operators cannot see: libraries' workspaces, and buffers inside kernels.

Persistent terms are in `workspaces.toml` and `devices/contexts.toml`, each with its source; buffers are derived here
and in `reductions.py` from pytorch's sources, torch 2.11 to 2.13. Figures that others measured say so.
Attention's buffers are in `attention_buffers.py`.

Not modelled, because no source gives the size closely enough, with an upper bound if there is one:

- reductions other than sums and means (`amax`, `var`, norms), which need as much as a sum of the same shape if they run
  the same kernel, and all reductions on AMD's cards;
- CUB's temporary storage, except the second copies of keys and values: a few KiB and less than 1 % of the data for
  sorts, less for `cumsum` and `nonzero`;
- `topk` and sorts of several rows (routers of experts sort rows of fewer than 4,096, which needs no buffer);
- CUTLASS's workspace in a grouped matrix product, which holds descriptors of tensors: some hundred bytes per
  multiprocessor;
- cuDNN's workspaces for convolutions, which its heuristics choose;
- copies of operands whose strides cuBLAS does not accept (`prepare_matrix_for_cublas`, pytorch
  aten/src/ATen/native/cuda/Blas.cpp), at most the operand;
- 1 MiB that cuBLASLt retains beside cuBLAS's workspace before torch 2.12, if a linear layer has a bias;
- AMD's libraries: between 32 and 204 MiB per thread for hipBLAS and hipBLASLt, whichever are used, and the context.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import ceil, prod
from typing import Any, Literal

import torch

from gcbench.core.units import parse_bytes
from gcbench.devices import contexts
from gcbench.devices.target import Target
from gcbench.simulate.cuda.attention_buffers import ASSUMED_NUM_SMS
from gcbench.simulate.cuda.attention_rules import gpu_of
from gcbench.simulate.cuda.reductions import Reduction, workspace
from gcbench.simulate.events import KernelBuffer

_FP32_BYTES = 4
_INT64_BYTES = 8
_POINTER_BYTES = 8
_HALVES = (torch.float16, torch.bfloat16)
_THREADS_PER_SM = {"7.5": 1024, "8.6": 1536, "8.7": 1536, "8.9": 1536, "11": 1536, "12": 1536}
"""Resident threads per multiprocessor by compute capability, 2048 for others.

From https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html.
"""
CONTEXT = "CUDA context, kernels and handles"
_aten = torch.ops.aten

_LEAST_SORT_BYTES = 4607
_LEAST_CUB_BYTES = 1279
"""CUB's counters in a sort, to which a quarter of a byte comes for each key, and its storage in a selection or scan of
a few thousand: from the history of emulated cards' allocators, torch 2.13."""
MOST_UNSORTED = 3072
"""Tokens whose gradients are summed without sorting them first (`_EMBEDDING_SORT`)."""
_EMBEDDING = "embedding_backward_cuda_kernel, pytorch aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu"
_EMBEDDING_SORT = "embedding_dense_backward_cuda, pytorch aten/src/ATen/native/cuda/Embedding.cu"
_DENSE = "layer_norm_cuda and layer_norm_backward_cuda, pytorch aten/src/ATen/native/cuda/layer_norm_kernel.cu"
_NORM = "LaunchGammaBetaBackwardCUDAKernel, pytorch aten/src/ATen/native/cuda/layer_norm_kernel.cu"
_INDEX_PUT = "index_put_with_sort_kernel, pytorch aten/src/ATen/native/cuda/Indexing.cu"
_INDEX = "AdvancedIndex, pytorch aten/src/ATen/native/TensorAdvancedIndexing.cpp"
_SORT = "segmented_sort_large_segments, pytorch aten/src/ATen/native/cuda/SortStable.cu"
_RADIX_SORT = "radix_sort_pairs, pytorch aten/src/ATen/cuda/cub-RadixSortPairs.cuh, which passes CUB no double buffers"
_REDUCTION = "gpu_reduce_kernel, pytorch aten/src/ATen/native/cuda/Reduce.cuh"
_CAST_SUM = "make_reduction_from_out_ty, pytorch aten/src/ATen/native/ReduceOpsUtils.h"
_CUMSUM = "impl_func_cum_ops, pytorch aten/src/ATen/native/ReduceOps.cpp"
_GROUPED = "bf16bf16_grouped_gemm_impl_sm90_sm100, pytorch aten/src/ATen/native/cuda/GroupMM.cu"


@dataclass(frozen=True, kw_only=True)
class PersistentTerm:
    """Memory that a library allocates on the card and retains until the process ends.

    Attributes:
        in_allocator: whether torch's caching allocator holds it; if not, it counts for the process alone.
        requested_at: the phase of the first step that first requests it. What is outside the allocator is allocated
            before any phase.
        requested_by: operators, the first of which in that phase requests it; if empty, the phase's beginning does.
        source: where the figure is published, and who measured it if anyone did.
    """

    name: str
    nbytes: int
    in_allocator: bool
    requested_at: Literal["forward", "backward"]
    source: str
    requested_by: tuple[str, ...] = ()


def persistent_terms(target: Target, *, trains: bool = True) -> tuple[PersistentTerm, ...]:
    """The persistent terms of `target`, in the order in which they are requested; none for the CPU and for AMD's cards.

    A card whose compute capability is unknown has `attention_rules.ASSUMED_CAPABILITY`. If not `trains`, there is no
    backward pass. Versions are those of the torch installed here.
    """
    gpu = gpu_of(target)
    if target.kind != "cuda" or gpu.vendor != "nvidia":
        return ()
    terms: dict[str, tuple[PersistentTerm, ...]] = {}
    for entry in _table():
        if entry["name"] not in terms and _applies(entry, gpu.capability):
            terms[entry["name"]] = tuple(_of_entry(entry, trains=trains))
    applicable = [term for group in terms.values() for term in group]
    return tuple(sorted(applicable, key=lambda term: (term.in_allocator, term.requested_at == "backward")))


def internal_buffers(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, target: Target
) -> tuple[KernelBuffer, ...]:
    """The buffers inside the kernel of one call of an aten operator on `target`, alive until it returns.

    `func` is a `torch._ops.OpOverload`, as in `__torch_dispatch__`; `outputs` is its result. All buffers returned are
    alive at one time, together with the result: those of the kernel's peak. Empty for operators that have none or are
    not covered here. AMD's cards are assumed to need as much as NVIDIA's, except in reductions.
    """
    buffers = _BUFFERS.get(func)
    if buffers is None or target.kind != "cuda":
        return ()
    # A dispatch mode does not get trailing arguments that have their default.
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    by_name = zip((argument.name for argument in arguments), args, strict=False)
    return tuple(buffer for buffer in buffers({**defaults, **dict(by_name), **kwargs}, target) if buffer.nbytes)


def _embedding_backward(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Sort the tokens, and sum the gradients of equal tokens in fp32, ten rows at a time.

    Few tokens are summed without sorting. If few embeddings get many gradients each, rows are added up in one kernel
    (since torch 2.11), into an fp32 copy of the result if that is in half precision.
    """
    gradient, indices = inputs["grad_output"], inputs["indices"]
    num_weights, by_frequency = inputs["num_weights"], inputs["scale_grad_by_freq"]
    if not gradient.is_contiguous():
        yield _buffer("contiguous gradient", gradient.numel() * gradient.element_size(), _EMBEDDING_SORT)
    count, width = indices.numel(), gradient.shape[-1]
    if count <= MOST_UNSORTED and not by_frequency:
        return
    itemsize = indices.element_size()
    segments = min(count, num_weights)
    partial_segments = count // 10 + segments
    for name in ("sorted tokens", "their places"):
        yield _buffer(name, count * itemsize, _EMBEDDING_SORT, after_results=0)
    yield _buffer("range", count * itemsize, _EMBEDDING_SORT, after_results=0, outlives=1)
    yield _buffer("CUB's sort", _sort_bytes(count, itemsize), _RADIX_SORT, after_results=0, outlives=0)
    if by_frequency:
        yield _buffer("counts", count * itemsize, _EMBEDDING_SORT, after_results=0)
    yield _buffer("segment offsets", count * itemsize, _EMBEDDING)
    yield _buffer("number of segments", _INT64_BYTES, _EMBEDDING)
    yield _buffer("unique tokens", count * itemsize, _EMBEDDING, outlives=1)
    yield _buffer("CUB's selection", _LEAST_CUB_BYTES, _EMBEDDING, outlives=0)
    for name in ("partials per segment", "offsets of partials"):
        yield _buffer(name, segments * itemsize, _EMBEDDING)
    yield _buffer("CUB's scan", _LEAST_CUB_BYTES, _EMBEDDING, outlives=0)
    yield _buffer("number of partial segments", _INT64_BYTES, _EMBEDDING)
    yield _buffer("offsets of partial segments", partial_segments * itemsize, _EMBEDDING)
    sum_bytes = max(gradient.element_size(), _FP32_BYTES)
    if _adds_in_one_kernel(segments, partial_segments, width, _num_sms(target)):
        yield _buffer("segments of partial segments", partial_segments * itemsize, _EMBEDDING)
        if gradient.element_size() < _FP32_BYTES:
            yield _buffer("gradient in fp32", num_weights * width * _FP32_BYTES, _EMBEDDING)
    else:
        yield _buffer("sums of partial segments", partial_segments * width * sum_bytes, _EMBEDDING)


def _sort_bytes(count: int, key_bytes: int) -> int:
    """CUB's storage for a radix sort: second copies of keys and values, and counters of its passes and tiles."""
    return count * (key_bytes + _INT64_BYTES) + _LEAST_SORT_BYTES + count // 4


def _adds_in_one_kernel(segments: int, partial_segments: int, width: int, num_sms: int) -> bool:
    """`use_fused_kernel`, https://github.com/pytorch/pytorch/pull/172454."""
    width_in_warps = ceil(width / 32) * 32
    blocks = ceil(segments * width_in_warps / min(width_in_warps, 1024))
    return _torch_version() >= (2, 11) and blocks < 4 * num_sms and partial_segments > 4 * blocks


def _norm(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Copy an input that is a part of a larger tensor, as of fused queries, keys and values."""
    yield from _dense("input", inputs["input"], after_results=0)


def _norm_backward(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Sum the weight's gradient 32 rows at a time, if there are very many rows and few columns."""
    yield from _dense("input", inputs["input"], after_results=0)
    yield from _dense("grad_out", inputs["grad_out"])
    columns = prod(inputs["normalized_shape"])
    rows = inputs["input"].numel() // columns
    if rows <= 64 * 1024 or columns // 32 >= _num_sms(target) // 2:
        return
    blocks = min(32 * 1024 // ceil(columns / 32), ceil(rows / 32))
    itemsize = 0
    for name, is_required in zip(("weight", "bias"), inputs["output_mask"][1:], strict=False):
        if is_required and inputs[name] is not None:
            itemsize = inputs[name].element_size()
            yield _buffer(f"partial gradients of the {name}", blocks * columns * itemsize, _NORM)
    if itemsize:
        acc_itemsize = max(itemsize, _FP32_BYTES)
        partials = Reduction(
            shape=(blocks, columns), strides=(columns, 1), reduced=[0], itemsize=itemsize, acc_itemsize=acc_itemsize
        )
        yield from _reduction(partials, target)


def _dense(name: str, tensor: torch.Tensor, *, after_results: int | None = None) -> Iterator[KernelBuffer]:
    """The copy of a tensor that is not contiguous (`expect_contiguous`)."""
    if not tensor.is_contiguous():
        nbytes = tensor.numel() * tensor.element_size()
        yield _buffer(f"dense {name}", nbytes, _DENSE, after_results=after_results)


def _sum(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Sum or average; an input of another dtype than the result is cast first, unless a half is summed in fp32."""
    tensor, dtype = inputs["self"], inputs["dtype"] or _dtype_of_sum(inputs["self"].dtype)
    dims = inputs.get("dim")
    itemsize, offset = tensor.element_size(), tensor.storage_offset()
    if tensor.dtype is not dtype and not (tensor.dtype in _HALVES and dtype is torch.float32):
        yield _buffer("cast input", tensor.numel() * dtype.itemsize, _CAST_SUM)
        itemsize, offset = dtype.itemsize, 0
    reduction = Reduction(
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        offset=offset,
        reduced=[dim % tensor.dim() for dim in dims] if dims and tensor.dim() else range(tensor.dim()),
        itemsize=itemsize,
        acc_itemsize=max(dtype.itemsize, _FP32_BYTES),
        keeps_dtype_in_half=tensor.dtype is dtype and dtype in _HALVES,
    )
    yield from _reduction(reduction, target)


def _dtype_of_sum(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def _reduction(reduction: Reduction, target: Target) -> Iterator[KernelBuffer]:
    gpu = gpu_of(target)
    if gpu.vendor != "nvidia":
        return
    major, minor = gpu.capability
    threads = _THREADS_PER_SM.get(f"{major}.{minor}", _THREADS_PER_SM.get(f"{major}", 2048))
    needed = workspace(reduction, num_sms=_num_sms(target), threads_per_sm=threads)
    yield _buffer("result in fp32", needed.output_bytes, _REDUCTION)
    yield _buffer("partial sums", needed.partials_bytes, _REDUCTION)
    yield _buffer("semaphores", needed.semaphores_bytes, _REDUCTION)


def _index_put(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Sort the places before values are added; values that do not fill their places one by one are copied."""
    tensor, values = inputs.get("self"), inputs["values"]
    indices = [index for index in inputs["indices"] if index is not None]
    if not inputs["accumulate"] or tensor is None or not indices:
        return
    count = prod(torch.broadcast_shapes(*(index.shape for index in indices)))  # type: ignore[no-untyped-call]
    indexed = prod(tensor.shape[place] for place, index in enumerate(inputs["indices"]) if index is not None)
    num_values = count * (tensor.numel() // indexed) if indexed else 0
    if not values.is_contiguous() or values.numel() < num_values:
        yield _buffer("expanded values", num_values * values.element_size(), _INDEX_PUT)
    for name in ("places", "sorted places", "their order", "range"):
        yield _buffer(name, count * _INT64_BYTES, _INDEX_PUT)
    yield from _second_copies(count, _INT64_BYTES)


def _index(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Give several indices the same strides, by making each contiguous that is not."""
    indices = [index for index in inputs["indices"] if index is not None and index.dtype is not torch.bool]
    if len(indices) < 2:
        return
    expanded = torch.broadcast_tensors(*indices)  # type: ignore[no-untyped-call]
    if len({index.stride() for index in expanded}) > 1:
        for index in expanded:
            if not index.is_contiguous():
                yield _buffer("contiguous index", index.numel() * _INT64_BYTES, _INDEX, after_results=0)


def _sort(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Sort a single row too long to be sorted in place."""
    tensor, dim = inputs["self"], inputs["dim"]
    count = tensor.shape[dim] if tensor.dim() else 1
    if count > 4096 and count == tensor.numel():
        yield _buffer("places", count * _INT64_BYTES, _SORT)
        yield from _second_copies(count, tensor.element_size())


def _second_copies(count: int, key_bytes: int) -> Iterator[KernelBuffer]:
    """Copies between the passes of a radix sort of keys with 8-byte values; a few thousand keys need none."""
    yield _buffer("second copy of the keys", count * key_bytes, _RADIX_SORT)
    yield _buffer("second copy of the values", count * _INT64_BYTES, _RADIX_SORT)


def _cumsum(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """A copy of the input in the result's dtype, if that is another: for booleans and short integers."""
    tensor = inputs["self"]
    dtype = inputs.get("dtype") or (torch.int64 if not tensor.dtype.is_floating_point else tensor.dtype)
    if not tensor.is_complex() and dtype is not tensor.dtype:
        yield _buffer("input in the result's dtype", tensor.numel() * dtype.itemsize, _CUMSUM)


def _grouped_mm(inputs: dict[str, Any], target: Target) -> Iterator[KernelBuffer]:
    """Three pointers, three strides and one shape per group, on Hopper and datacenter Blackwell in bf16."""
    gpu = gpu_of(target)
    left, right = inputs["self"], inputs["mat2"]
    is_fast = gpu.vendor == "nvidia" and (gpu.capability == (9, 0) or gpu.capability[0] == 10)
    if not is_fast or {left.dtype, right.dtype} != {torch.bfloat16}:
        return
    stacked = [tensor for tensor in (left, right) if tensor.dim() == 3]
    groups = (stacked or [inputs["offs"]])[0].shape[0]
    nbytes = 3 * _POINTER_BYTES * (ceil(groups / 2) * 2) + 3 * 8 * groups + 3 * 4 * groups
    yield _buffer("arguments of the groups", nbytes, _GROUPED)


_BUFFERS: dict[Any, Callable[[dict[str, Any], Target], Iterator[KernelBuffer]]] = {
    _aten.embedding_dense_backward.default: _embedding_backward,
    _aten.native_layer_norm.default: _norm,
    _aten._fused_rms_norm.default: _norm,
    _aten.native_layer_norm_backward.default: _norm_backward,
    _aten._fused_rms_norm_backward.default: _norm_backward,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.default: _sum,
    _aten.mean.dim: _sum,
    _aten.index.Tensor: _index,
    _aten.index_put.default: _index_put,
    _aten.index_put_.default: _index_put,
    _aten._index_put_impl_.default: _index_put,
    _aten._unsafe_index_put.default: _index_put,
    _aten.sort.default: _sort,
    _aten.sort.stable: _sort,
    _aten._grouped_mm.default: _grouped_mm,
    _aten.cumsum.default: _cumsum,
}


def _buffer(
    name: str, nbytes: int, source: str, *, after_results: int | None = None, outlives: int | None = None
) -> KernelBuffer:
    return KernelBuffer(name=name, nbytes=nbytes, source=source, after_results=after_results, outlives=outlives)


def _num_sms(target: Target) -> int:
    card = target.card
    return card.num_sms if card is not None and card.num_sms is not None else ASSUMED_NUM_SMS


@cache
def _table() -> tuple[dict[str, Any], ...]:
    text = resources.files("gcbench.simulate.cuda").joinpath("workspaces.toml").read_text(encoding="utf-8")
    context = {"name": CONTEXT, "requested_at": ["forward"], "in_allocator": False}
    return (*tomllib.loads(text)["persistent"], *(context | entry for entry in contexts.entries()))


def _applies(entry: dict[str, Any], capability: tuple[int, int]) -> bool:
    major, minor = capability
    named = entry.get("capabilities", [f"{major}"])
    since, until = _version(entry.get("from_torch", "0")), entry.get("until_torch")
    version = _torch_version()
    is_of_version = version >= since and (until is None or version < _version(until))
    return (f"{major}" in named or f"{major}.{minor}" in named) and is_of_version


def _of_entry(entry: dict[str, Any], *, trains: bool) -> Iterator[PersistentTerm]:
    phases = [phase for phase in entry["requested_at"] if trains or phase != "backward"]
    measured = entry.get("measured")
    for phase in phases:
        yield PersistentTerm(
            name=entry["name"] if len(entry["requested_at"]) == 1 else f"{entry['name']} ({phase})",
            nbytes=parse_bytes(str(entry["nbytes"])),
            in_allocator=entry["in_allocator"],
            requested_at=phase,
            requested_by=tuple(f"{name}.default" for name in entry.get("requested_by", ())),
            source=entry["source"] if measured is None else f"measured {measured}: {entry['source']}",
        )


def _torch_version() -> tuple[int, ...]:
    return _version(torch.__version__)


def _version(text: str) -> tuple[int, ...]:
    """`"2.13.0+cpu"` as (2, 13)."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])
