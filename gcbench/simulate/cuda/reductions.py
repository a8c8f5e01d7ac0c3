"""Computes the workspace of CUDA's reductions: partial results of blocks that share an output. No torch.

A sum over the rows of a matrix, as in the gradient of every bias and of every norm's weight, is split among so many
blocks that the card is full. Their partial results lie in a buffer with room for each output in each thread of a
block's width, more than is used: about 130 MiB on an H100, whatever the matrix. From `gpu_reduce_kernel`,
`setReduceConfig` and `ReduceConfig::global_memory_size` in pytorch's aten/src/ATen/native/cuda/Reduce.cuh and from
`reorder_dimensions` and `coalesce_dimensions` in aten/src/ATen/TensorIterator.cpp, torch 2.11 to 2.13. Not yet measured
by gcbench on a card.

Not covered: that a thread may read several neighbouring inputs at once, which changes nothing for inputs long enough to
be split; and AMD's cards, for which other constants hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

_MAX_THREADS = 512
_WARP = 32
_MIN_VALUES_PER_THREAD = 16
_MAX_VALUES_PER_THREAD = 256
_OUTPUT_VECTOR = 4
_SEMAPHORE_BYTES = 4
_MAX_32_BIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """One reduction of a tensor.

    Attributes:
        shape, strides: of the input, strides in elements.
        reduced: its dimensions that are reduced, not negative.
        itemsize: bytes of an input element.
        acc_itemsize: bytes of a partial result.
        offset: of the input in its storage, in elements.
        keeps_dtype_in_half: whether input and output have the same half-precision dtype, so that partial results cannot
            be stored in the output.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    reduced: Collection[int]
    itemsize: int
    acc_itemsize: int
    offset: int = 0
    keeps_dtype_in_half: bool = False


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bytes of the partial results, of the semaphores that count finished blocks, and of an output in full precision.

    The last is for inputs too large for 32-bit offsets, which are reduced part by part.
    """

    partials_bytes: int = 0
    semaphores_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class _Dim:
    size: int
    stride: int
    out_stride: int


def workspace(reduction: Reduction, *, num_sms: int, threads_per_sm: int) -> Workspace:
    """The workspace of a reduction on a card with so many multiprocessors, and so many resident threads in each."""
    if not reduction.shape or 0 in reduction.shape:
        return Workspace()
    dims = _coalesced(_ordered(_dims(reduction)))
    parts = _within_32_bits(dims, reduction.itemsize)
    of_launch = _of_one_launch(parts, reduction, num_sms=num_sms, threads_per_sm=threads_per_sm)
    if parts is dims or not reduction.keeps_dtype_in_half:
        return of_launch
    return replace(of_launch, output_bytes=_num_outputs(dims) * reduction.acc_itemsize)


def _dims(reduction: Reduction) -> list[_Dim]:
    """Pair the input's dimensions with the output's strides, which are 0 for those that are reduced."""
    dims: list[_Dim] = []
    out_stride = 1
    for place in reversed(range(len(reduction.shape))):
        is_reduced = place in reduction.reduced
        size = reduction.shape[place]
        dims.append(_Dim(size=size, stride=reduction.strides[place], out_stride=0 if is_reduced else out_stride))
        out_stride *= 1 if is_reduced else size
    return dims


def _ordered(dims: list[_Dim]) -> list[_Dim]:
    """Sort reduced dimensions first, then by stride: an insertion sort, since not every two dimensions compare."""
    dims = list(dims)
    for place in range(1, len(dims)):
        current = place
        for before in reversed(range(place)):
            comparison = _compare(dims[before], dims[current])
            if comparison > 0:
                dims[before], dims[current] = dims[current], dims[before]
                current = before
            elif comparison < 0:
                break
    return dims


def _compare(first: _Dim, second: _Dim) -> int:
    """Above 0 if the second dimension comes before the first."""
    if (first.out_stride == 0) != (second.out_stride == 0):
        return 1 if second.out_stride == 0 else -1
    for one, other in ((first.out_stride, second.out_stride), (first.stride, second.stride)):
        if one == 0 or other == 0:
            continue
        if one != other:
            return -1 if one < other else 1
        if first.size > second.size:
            return 1
    return 0


def _coalesced(dims: list[_Dim]) -> list[_Dim]:
    merged = dims[:1]
    for dim in dims[1:]:
        last = merged[-1]
        follows = last.size * last.stride == dim.stride and last.size * last.out_stride == dim.out_stride
        if last.size == 1:
            merged[-1] = dim
        elif dim.size == 1 or follows:
            merged[-1] = replace(last, size=last.size * dim.size)
        else:
            merged.append(dim)
    return merged


def _within_32_bits(dims: list[_Dim], itemsize: int) -> list[_Dim]:
    """`dims`, or their largest part after halving the dimension of the largest extent as often as needed."""
    parts = dims
    while prod(dim.size for dim in parts) > _MAX_32_BIT or _extent_bytes(parts, itemsize) > _MAX_32_BIT:
        widest = max(range(len(parts)), key=lambda place: (parts[place].size - 1) * parts[place].stride)
        half = ceil(parts[widest].size / 2)
        parts = [*parts[:widest], replace(parts[widest], size=half), *parts[widest + 1 :]]
    return parts


def _extent_bytes(dims: Sequence[_Dim], itemsize: int) -> int:
    return 1 + sum((dim.size - 1) * dim.stride for dim in dims) * itemsize


def _num_outputs(dims: Sequence[_Dim]) -> int:
    return prod(dim.size for dim in dims if dim.out_stride != 0)


def _of_one_launch(dims: Sequence[_Dim], reduction: Reduction, *, num_sms: int, threads_per_sm: int) -> Workspace:
    num_reduced = sum(dim.out_stride == 0 for dim in dims)
    num_outputs = _num_outputs(dims)
    num_inputs = prod(dim.size for dim in dims) // num_outputs
    along_fastest = num_reduced == len(dims) or dims[0].stride < dims[num_reduced].stride
    width, height = (num_inputs, num_outputs) if along_fastest else (num_outputs, num_inputs)
    vector = 1
    if not along_fastest and dims[num_reduced].stride == 1:
        vector = _output_vector(dims, num_reduced, reduction.offset)
        width //= vector
    block_width, block_height = _block(width, height, _MAX_THREADS // vector)

    step_input, step_output = (block_width, 1) if along_fastest else (1, block_width)
    is_split_among_warps = ceil(num_inputs / step_input) >= min(block_height * 16, _MAX_VALUES_PER_THREAD)
    if is_split_among_warps:
        step_input *= block_height
    else:
        step_output *= block_height
    values = ceil(num_inputs / step_input)
    grid = ceil((num_outputs // vector) / step_output)
    target = num_sms * (threads_per_sm // (block_width * block_height))
    if not is_split_among_warps or values < _MAX_VALUES_PER_THREAD or grid > target:
        return Workspace()
    blocks_per_output = max(
        min(ceil(target / grid), ceil(values / _MIN_VALUES_PER_THREAD)), ceil(values / _MAX_VALUES_PER_THREAD)
    )
    if blocks_per_output == 1:
        return Workspace()
    partials = num_outputs * blocks_per_output * (1 if along_fastest else block_width * vector)
    return Workspace(partials_bytes=partials * reduction.acc_itemsize, semaphores_bytes=grid * _SEMAPHORE_BYTES)


def _output_vector(dims: Sequence[_Dim], num_reduced: int, offset: int) -> int:
    """How many neighbouring outputs a thread computes together: at most 4, and a divisor of all offsets and strides."""
    vector = _OUTPUT_VECTOR
    others = [dim.stride for place, dim in enumerate(dims) if place != num_reduced]
    for number in (offset, dims[num_reduced].size, *others):
        while number % vector:
            vector //= 2
    return vector


def _block(width: int, height: int, max_threads: int) -> tuple[int, int]:
    width = _last_power_of_2(width) if width < max_threads else max_threads
    height = _last_power_of_2(height) if height < max_threads else max_threads
    block_width = min(width, _WARP)
    block_height = min(height, max_threads // block_width)
    return min(width, max_threads // block_height), block_height


def _last_power_of_2(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)
