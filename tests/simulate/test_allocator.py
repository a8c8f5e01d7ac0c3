"""The simulated CUDA caching allocator against sequences computed by hand from torch's rules."""

from __future__ import annotations

import pytest
from allocator_books import BOTH, MIB, held

from gcbench.simulate.allocator.caching_allocator import NULL, CachingAllocator, OutOfMemory

# Sizes and segments


@pytest.mark.parametrize(("nbytes", "rounded"), [(1, 512), (511, 512), (512, 512), (513, 1024), (5000, 5120)])
def test_sizes_round_up_to_512(nbytes: int, rounded: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(nbytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (rounded, 2 * MIB)


@BOTH
def test_zero_bytes_allocate_nothing(expandable: bool) -> None:
    """The trap is rounding 0 up to 512."""
    allocator = CachingAllocator(expandable_segments=expandable)
    handle = allocator.malloc(0)
    allocator.free(handle)
    assert handle == NULL
    assert (allocator.allocated_bytes, allocator.reserved_bytes, allocator.peak_reserved_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (MIB - 100, MIB, 2 * MIB),  # rounds to 1 MiB: still the small pool
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),  # rounds to 1 MiB + 512: the large pool
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounds to 10 MiB first, which gets a segment of its own
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # 2 MiB - 512 are left: split off
        (1000 * MIB, 1000 * MIB, 1000 * MIB),
    ],
)
def test_segment_of_a_first_request(nbytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(nbytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_small_requests_share_a_segment_of_2_mib() -> None:
    """Two of 1 MiB fill it; the third opens another."""
    allocator = CachingAllocator()
    assert allocator.malloc(MIB) + MIB == allocator.malloc(MIB)
    assert held(allocator) == (2, 2)
    allocator.malloc(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_requests_below_10_mib_share_a_segment_of_20_mib() -> None:
    """9 + 9 leave 2: 1.5 fits, and leaves 0.5, which goes with it. 9 again needs a segment."""
    allocator = CachingAllocator()
    allocator.malloc(9 * MIB)
    allocator.malloc(9 * MIB)
    assert held(allocator) == (18, 20)
    allocator.malloc(3 * MIB // 2)
    assert held(allocator) == (20, 20)
    allocator.malloc(9 * MIB)
    assert held(allocator) == (29, 40)


def test_the_pools_do_not_lend_to_each_other() -> None:
    """A free large segment does not serve 512 B, nor a free small one 1 MiB + 512."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(20 * MIB))
    allocator.free(allocator.malloc(512))
    assert allocator.reserved_bytes == 22 * MIB
    small = allocator.malloc(512)
    assert allocator.reserved_bytes == 22 * MIB
    large = allocator.malloc(2 * MIB)
    assert large < small
    assert allocator.reserved_bytes == 22 * MIB


# Splitting


@pytest.mark.parametrize(
    ("nbytes", "allocated"),
    [
        (11 * MIB, 12 * MIB),  # the rest is exactly 1 MiB: not split, and counted
        (11 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512),  # the rest is 1 MiB + 512: split
    ],
)
def test_large_blocks_split_only_above_1_mib(nbytes: int, allocated: int) -> None:
    allocator = CachingAllocator()
    handle = allocator.malloc(nbytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, 12 * MIB)
    allocator.free(handle)
    assert held(allocator) == (0, 12)


def test_small_blocks_split_from_512_on() -> None:
    """1 MiB and 1 MiB - 512 leave 512 of 2 MiB, enough for one byte; a rule of "more than 512" would lose it."""
    allocator = CachingAllocator()
    allocator.malloc(MIB)
    allocator.malloc(MIB - 512)
    assert allocator.allocated_bytes == 2 * MIB - 512
    allocator.malloc(1)
    assert held(allocator) == (2, 2)


def test_an_unsplit_rest_is_freed_with_its_block() -> None:
    """11 MiB hold 12; freed and requested as 12, the same block serves without a new segment."""
    allocator = CachingAllocator()
    first = allocator.malloc(11 * MIB)
    allocator.free(first)
    assert allocator.malloc(12 * MIB) == first
    assert held(allocator) == (12, 12)


# Which block


def test_best_fit_is_the_smallest_that_suffices() -> None:
    """Free: 40, 12, 24 in order of address. 12 takes the 12; 13 the 24, leaving 11; 20 the 40, leaving 20."""
    allocator = CachingAllocator()
    forty, twelve, twenty_four = (allocator.malloc(n * MIB) for n in (40, 12, 24))
    for handle in (forty, twelve, twenty_four):
        allocator.free(handle)
    assert allocator.malloc(12 * MIB) == twelve
    assert allocator.malloc(13 * MIB) == twenty_four
    assert allocator.malloc(20 * MIB) == forty
    assert allocator.malloc(11 * MIB) == twenty_four + 13 * MIB
    assert held(allocator) == (56, 76)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_equal_blocks_the_lowest_address_wins(order: tuple[int, ...]) -> None:
    """Neither the last freed nor the first."""
    allocator = CachingAllocator()
    handles = [allocator.malloc(12 * MIB) for _ in range(3)]
    for i in order:
        allocator.free(handles[i])
    assert [allocator.malloc(12 * MIB) for _ in range(3)] == handles == sorted(handles)


def test_no_block_is_too_large_to_be_handed_out() -> None:
    """`max_split_size` is infinite by default: 2 MiB are cut off a free GiB, and the rest stays usable."""
    allocator = CachingAllocator()
    gib = allocator.malloc(1024 * MIB)
    allocator.free(gib)
    assert allocator.malloc(2 * MIB) == gib
    assert allocator.malloc(1022 * MIB) == gib + 2 * MIB
    assert held(allocator) == (1024, 1024)


# Merging


@BOTH
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
def test_freed_neighbours_become_one_block(order: tuple[int, ...], expandable: bool) -> None:
    """Three of 4 MiB at the start of 20; freed in any order, 20 fit in their place."""
    allocator = CachingAllocator(expandable_segments=expandable)
    handles = [allocator.malloc(4 * MIB) for _ in range(3)]
    for i in order:
        allocator.free(handles[i])
    assert allocator.malloc(20 * MIB) == handles[0]
    assert held(allocator) == (20, 20)


def test_a_block_in_use_keeps_its_neighbours_apart() -> None:
    """4 | 4 | 4 | 8 with the second in use: free are 4 and 12. 13 do not fit although 16 are free."""
    allocator = CachingAllocator()
    handles = [allocator.malloc(4 * MIB) for _ in range(3)]
    allocator.free(handles[0])
    allocator.free(handles[2])
    allocator.malloc(13 * MIB)
    assert held(allocator) == (18, 34)  # 4 + 14: of the new 14, the rest of 1 MiB is not split off
    assert allocator.malloc(12 * MIB) == handles[2]


def test_segments_never_merge_with_each_other() -> None:
    """Two free segments of 10 MiB, one right above the other, do not serve 20."""
    allocator = CachingAllocator()
    low, high = allocator.malloc(10 * MIB), allocator.malloc(10 * MIB)
    assert high == low + 10 * MIB
    allocator.free(low)
    allocator.free(high)
    allocator.malloc(20 * MIB)
    assert held(allocator) == (20, 40)


# The cache and the limit


def test_segments_stay_reserved_until_the_cache_is_emptied() -> None:
    """Of a free 2, a free 12 and a 20 with 4 in use between a free 4 and a free 12, only the first two go."""
    allocator = CachingAllocator()
    handles = [allocator.malloc(n) for n in (512, 12 * MIB, 4 * MIB, 4 * MIB)]
    for handle in handles[:3]:
        allocator.free(handle)
    assert held(allocator) == (4, 34)
    allocator.empty_cache()
    assert held(allocator) == (4, 20)
    allocator.free(handles[3])
    allocator.empty_cache()
    assert held(allocator) == (0, 0)
    assert allocator.num_alloc_retries == 0


def test_the_limit_may_be_reached_but_not_passed() -> None:
    """3 MiB need a segment of 20: a limit of 20 suffices, one byte less does not."""
    assert CachingAllocator(limit_bytes=20 * MIB).malloc(3 * MIB) != NULL
    with pytest.raises(OutOfMemory):
        CachingAllocator(limit_bytes=20 * MIB - 1).malloc(3 * MIB)


def test_at_the_limit_the_cache_is_released_and_the_request_tried_again() -> None:
    """Reserved 20 (free) + 2 (free, the other pool) + 12 (in use) of 40: 24 more need both free segments back.

    12 + 24 = 36. The peak is 36, not 58: the first attempt took nothing.
    """
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    cached = [allocator.malloc(20 * MIB), allocator.malloc(512)]
    allocator.malloc(12 * MIB)
    for handle in cached:
        allocator.free(handle)
    assert held(allocator) == (12, 34)
    allocator.malloc(24 * MIB)
    assert held(allocator) == (36, 36)
    assert (allocator.num_alloc_retries, allocator.peak_reserved_bytes) == (1, 36 * MIB)


def test_a_request_served_from_the_cache_is_no_retry() -> None:
    allocator = CachingAllocator(limit_bytes=20 * MIB)
    for _ in range(3):
        allocator.free(allocator.malloc(20 * MIB))
    assert (allocator.num_alloc_retries, allocator.reserved_bytes) == (0, 20 * MIB)


def test_out_of_memory_carries_the_sizes_and_leaves_the_allocator_usable() -> None:
    """A segment of 20 with 4 in use cannot be released; the free 12 can. 20 + 30 > 45 all the same."""
    allocator = CachingAllocator(limit_bytes=45 * MIB)
    keeps = allocator.malloc(4 * MIB)
    allocator.free(allocator.malloc(18 * MIB))
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(30 * MIB - 7)
    error = caught.value
    assert (error.requested_bytes, error.limit_bytes) == (30 * MIB, 45 * MIB)
    assert (error.allocated_bytes, error.reserved_bytes) == (4 * MIB, 20 * MIB)
    assert allocator.num_alloc_retries == 1  # counted although it failed
    assert allocator.malloc(16 * MIB) == keeps + 4 * MIB
    assert held(allocator) == (20, 20)


def test_fragmentation_runs_out_of_memory_below_the_limit() -> None:
    """Two segments of 20 with 4 in use each: 32 of 40 are free, 17 do not fit."""
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    handles = [allocator.malloc(n * MIB) for n in (4, 9, 7, 4, 9, 7)]
    assert held(allocator) == (40, 40)
    for i in (1, 2, 4, 5):
        allocator.free(handles[i])
    with pytest.raises(OutOfMemory):
        allocator.malloc(17 * MIB)
    assert held(allocator) == (8, 40)
    assert allocator.malloc(16 * MIB) == handles[1]


def test_peaks_stay_until_reset() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(30 * MIB), allocator.malloc(12 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    assert held(allocator) == (12, 12)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (42 * MIB, 42 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (12 * MIB, 12 * MIB)
    allocator.free(second)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (12 * MIB, 12 * MIB)


def test_freeing_twice_is_an_error() -> None:
    allocator = CachingAllocator()
    handle = allocator.malloc(512)
    allocator.free(handle)
    with pytest.raises(KeyError):
        allocator.free(handle)
