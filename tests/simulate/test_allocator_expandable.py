"""Expandable segments, and random sequences: the invariants hold whatever the order."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from allocator_books import BOTH, MIB, held, layout

from gcbench.simulate.allocator.caching_allocator import CachingAllocator, OutOfMemory

# Expandable segments


def test_expandable_pools_grow_by_pages_of_2_and_20_mib() -> None:
    """Large: 2 in a page of 20, then 18 fill it, then 1 MiB + 512 map the next; small: a page of 2."""
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(2 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.malloc(18 * MIB) == first + 2 * MIB
    assert held(allocator) == (20, 20)
    assert allocator.malloc(MIB + 512) == first + 20 * MIB
    assert allocator.reserved_bytes == 40 * MIB
    allocator.malloc(512)
    assert allocator.reserved_bytes == 42 * MIB


def test_expandable_requests_use_the_free_end_of_the_segment() -> None:
    """21 map 40 and leave 19; 21 more need only 2, one page: 60, where cudaMalloc takes 22 each and counts them."""
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(21 * MIB)
    assert held(allocator) == (21, 40)
    assert allocator.malloc(21 * MIB) == first + 21 * MIB
    assert held(allocator) == (42, 60)
    allocator = CachingAllocator()
    allocator.malloc(21 * MIB)
    allocator.malloc(21 * MIB)
    assert held(allocator) == (44, 44)


def test_expandable_blocks_of_the_large_pool_split_from_512_on() -> None:
    """19.5 of 20: the rest of 0.5 MiB is not counted, as it would be in a segment by cudaMalloc."""
    allocator = CachingAllocator(expandable_segments=True)
    allocator.malloc(39 * MIB // 2)
    assert held(allocator) == (19.5, 20)
    allocator = CachingAllocator()
    allocator.malloc(39 * MIB // 2)
    assert held(allocator) == (20, 20)  # rounded to 20, the rest not split off


def test_a_hole_is_preferred_to_the_growing_end() -> None:
    """A hole of 18 and an end of 15 that can grow: 10 fit the end better by size, but go into the hole."""
    allocator = CachingAllocator(expandable_segments=True)
    handles = [allocator.malloc(n * MIB) for n in (18, 2, 5)]
    allocator.free(handles[0])
    assert held(allocator) == (7, 40)
    assert allocator.malloc(10 * MIB) == handles[0]
    assert allocator.malloc(10 * MIB) == handles[2] + 5 * MIB  # 8 are left of the hole: now the end is due
    assert held(allocator) == (27, 40)


def test_the_search_for_a_hole_stops_at_the_first_block_that_counts_for_no_less() -> None:
    """10 MiB. In order of size: 15 with a gap of 20 behind it (counts 35), the end of 16, a hole of 18 (counts 18).

    The end counts for more than 35, so the search stops before it sees the hole: not the best, but what torch does.
    Laid out: 5 in use, 35 freed of which [20, 40) is unmapped, 2 in use, 18 freed, 4 in use, 16 never used.
    """
    allocator = CachingAllocator(expandable_segments=True)
    handles = [allocator.malloc(n * MIB) for n in (5, 35, 2, 18, 4)]
    allocator.free(handles[1])
    assert held(allocator) == (29, 80)
    allocator.empty_cache()
    assert held(allocator) == (29, 60)
    allocator.free(handles[3])
    assert allocator.malloc(10 * MIB) == handles[1]


def test_emptying_the_cache_unmaps_whole_pages_only() -> None:
    """[0, 10) in use, [10, 50) free, [50, 60) in use: only the page [20, 40) goes, 10 stay free at either side.

    Then 35 find no mapped block, but [10, 50) as free, unmapped, free: one page is mapped again and all is one.
    """
    allocator = CachingAllocator(expandable_segments=True)
    low, middle, _ = (allocator.malloc(n * MIB) for n in (10, 40, 10))
    assert held(allocator) == (60, 60)
    allocator.free(middle)
    allocator.empty_cache()
    assert held(allocator) == (20, 40)
    assert [[(p.size // MIB, p.allocated) for p in pieces] for pieces in layout(allocator)] == [
        [(10, True), (10, False)],
        [(10, False), (10, True)],
    ]
    assert allocator.malloc(35 * MIB) == low + 10 * MIB
    assert held(allocator) == (55, 60)


def test_a_free_block_without_a_whole_page_is_left_alone() -> None:
    """[10, 30) free spans a page boundary and no page: emptying unmaps nothing, and 20 still fit there."""
    allocator = CachingAllocator(expandable_segments=True)
    handles = [allocator.malloc(n * MIB) for n in (10, 20, 10)]
    allocator.free(handles[1])
    allocator.empty_cache()
    assert held(allocator) == (20, 40)
    assert [[p.size // MIB for p in pieces] for pieces in layout(allocator)] == [[10, 20, 10]]
    assert allocator.malloc(20 * MIB) == handles[1]
    assert held(allocator) == (40, 40)


def test_an_expandable_segment_with_nothing_mapped_is_released() -> None:
    """The next request begins another, at another address."""
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    assert held(allocator) == (0, 0)
    assert allocator.malloc(30 * MIB) > first + 40 * MIB
    assert held(allocator) == (30, 40)


def test_an_unmapped_gap_is_filled_before_the_segment_grows() -> None:
    """[0, 30) freed, its page [0, 20) unmapped, [20, 30) free, [30, 60) in use: 25 map the page and fit at 0."""
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    assert held(allocator) == (30, 40)
    assert allocator.malloc(25 * MIB) == first
    assert held(allocator) == (55, 60)


def test_at_the_limit_expandable_pages_move_to_the_end() -> None:
    """[0, 30) free, [30, 60) in use, limit 80. 35 need two pages at the end: 60 + 40 > 80; without [0, 20), 80."""
    allocator = CachingAllocator(limit_bytes=80 * MIB, expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    allocator.malloc(30 * MIB)
    allocator.free(first)
    assert allocator.malloc(35 * MIB) == first + 60 * MIB
    assert held(allocator) == (65, 80)
    assert allocator.num_alloc_retries == 1


def test_pages_mapped_before_the_limit_was_hit_count() -> None:
    """Gap [0, 20), free [20, 60), nothing beyond; limit 70. 70 MiB map the gap (60), then miss a page (80).

    The retry gives all 60 back and begins a new segment, where 80 are too many. Reserved ends at 0, its peak is 60.
    """
    allocator = CachingAllocator(limit_bytes=70 * MIB, expandable_segments=True)
    first, second = allocator.malloc(30 * MIB), allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    allocator.free(second)
    allocator.reset_peaks()
    assert held(allocator) == (0, 40)
    with pytest.raises(OutOfMemory):
        allocator.malloc(70 * MIB)
    assert held(allocator) == (0, 0)
    assert allocator.peak_reserved_bytes == 60 * MIB


def test_the_limit_holds_for_whole_pages() -> None:
    """21 MiB need two pages: 39 are not enough, 40 are."""
    with pytest.raises(OutOfMemory):
        CachingAllocator(limit_bytes=39 * MIB, expandable_segments=True).malloc(21 * MIB)
    CachingAllocator(limit_bytes=40 * MIB, expandable_segments=True).malloc(21 * MIB)


@BOTH
def test_a_device_without_memory_runs_out_at_once(expandable: bool) -> None:
    with pytest.raises(OutOfMemory):
        CachingAllocator(limit_bytes=0, expandable_segments=expandable).malloc(1)


def test_expandable_address_space_ends_at_nine_eighths_of_the_limit() -> None:
    """Limit 160: addresses for 180. [80, 100) in use leaves gaps of 80 below and above; 100 need a second segment."""
    allocator = CachingAllocator(limit_bytes=160 * MIB, expandable_segments=True)
    handles = [allocator.malloc(n * MIB) for n in (80, 20, 60)]
    allocator.free(handles[0])
    allocator.free(handles[2])
    allocator.empty_cache()
    assert held(allocator) == (20, 20)
    assert allocator.malloc(100 * MIB) == handles[0] + 180 * MIB
    assert held(allocator) == (120, 120)
    assert allocator.malloc(40 * MIB) == handles[0]


def test_expandable_address_space_is_that_of_the_whole_device() -> None:
    """Device 200 of which 160 are free: addresses for 225. [80, 100) in use leaves 80 below and 125 above.

    The trap: addresses for 9/8 of what is free, 180, leave 80 above too, so that a second segment begins, for which the
    free pages of the first have to be unmapped.
    """
    allocator = CachingAllocator(limit_bytes=160 * MIB, device_bytes=200 * MIB, expandable_segments=True)
    handles = [allocator.malloc(n * MIB) for n in (80, 20, 60)]
    for handle in (handles[0], handles[2]):
        allocator.free(handle)
    allocator.empty_cache()
    assert held(allocator) == (20, 20)
    assert allocator.malloc(100 * MIB) == handles[0] + 100 * MIB


def test_a_fraction_of_the_memory_limits_segments_not_pages() -> None:
    """Fraction 100, page of 20: 65 take 80; 30 more would need one page, but count as a segment of 30, which is > 20.

    With a device's limit of 100 the page fits.
    """
    allowed = CachingAllocator(allowed_bytes=100 * MIB, expandable_segments=True)
    device = CachingAllocator(limit_bytes=100 * MIB, expandable_segments=True)
    for allocator in (allowed, device):
        allocator.malloc(65 * MIB)
    device.malloc(30 * MIB)
    assert held(device) == (95, 100)
    with pytest.raises(OutOfMemory):
        allowed.malloc(30 * MIB)
    assert allowed.num_alloc_retries == 1


@BOTH
def test_segments_are_reported_as_they_come_and_go(expandable: bool) -> None:
    """What is reported adds up to what is reserved, and names each address once."""
    seen: list[tuple[str, int, int]] = []
    allocator = CachingAllocator(expandable_segments=expandable, on_segment=lambda *event: seen.append(event))
    first = allocator.malloc(30 * MIB)
    allocator.malloc(100)
    allocator.free(first)
    allocator.empty_cache()
    grow, shrink = ("segment_map", "segment_unmap") if expandable else ("segment_alloc", "segment_free")
    pages = 40 if expandable else 30
    assert [(action, size // MIB) for action, _, size in seen] == [(grow, pages), (grow, 2), (shrink, pages)]
    assert seen[0][1] == seen[2][1] == first
    assert allocator.reserved_bytes == 2 * MIB


# Any sequence


def check(allocator: CachingAllocator, requested: dict[int, int], *, expandable: bool) -> None:
    """What must hold between any two calls; `requested` maps live handles to the bytes requested."""
    ranges = layout(allocator)
    pieces = [piece for pieces in ranges for piece in pieces]
    assert allocator.reserved_bytes == sum(piece.size for piece in pieces)
    assert allocator.allocated_bytes == sum(piece.size for piece in pieces if piece.allocated)
    assert {piece.address for piece in pieces if piece.allocated} == set(requested)
    for one in ranges:
        for low, high in pairwise(one):
            assert low.address + low.size == high.address, "a gap or an overlap inside a segment"
            assert low.allocated or high.allocated, "two free neighbours were not merged"
            assert low.is_small == high.is_small
    for low, high in pairwise(ranges):
        assert low[-1].address + low[-1].size <= high[0].address, "segments overlap"
    for piece in pieces:
        assert piece.size % 512 == 0
        if piece.allocated:
            rounded = -(-requested[piece.address] // 512) * 512
            assert piece.is_small == (rounded <= MIB)
            unsplit = 0 if expandable or piece.is_small else MIB
            assert rounded <= piece.size <= rounded + unsplit


def expected_address(allocator: CachingAllocator, nbytes: int) -> int | None:
    """Where best fit puts a request, by looking at every free block; None if there is no block for it."""
    rounded = -(-nbytes // 512) * 512
    fitting = [
        (piece.size, piece.address)
        for pieces in layout(allocator)
        for piece in pieces
        if not piece.allocated and piece.is_small == (rounded <= MIB) and piece.size >= rounded
    ]
    return min(fitting)[1] if fitting else None


@BOTH
@pytest.mark.parametrize("limit_bytes", [None, 300 * MIB], ids=["unlimited", "limited"])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_keeps_the_invariants(seed: int, limit_bytes: int | None, expandable: bool) -> None:
    """Random requests of 1 B to 64 MiB: blocks tile segments, neighbours merge, best fit, sums and peaks agree."""
    random_ = random.Random(seed)
    allocator = CachingAllocator(limit_bytes=limit_bytes, expandable_segments=expandable)
    requested: dict[int, int] = {}
    peaks = (0, 0)
    misses = 0
    for _ in range(1500):
        action = random_.random()
        if action < 0.01:
            allocator.empty_cache()
        elif action < 0.52 or not requested:
            nbytes = int(2 ** random_.uniform(0, 26)) if random_.random() < 0.8 else random_.choice([MIB, 11 * MIB])
            address = expected_address(allocator, nbytes)
            retries = allocator.num_alloc_retries
            try:
                handle = allocator.malloc(nbytes)
            except OutOfMemory as error:
                misses += 1
                assert address is None
                assert limit_bytes is not None
                assert error.allocated_bytes == allocator.allocated_bytes
                assert allocator.num_alloc_retries == retries + 1
            else:
                assert handle not in requested
                assert expandable or address is None or handle == address
                assert address is None or allocator.num_alloc_retries == retries
                requested[handle] = nbytes
        else:
            handle = random_.choice(list(requested))
            del requested[handle]
            allocator.free(handle)
        check(allocator, requested, expandable=expandable)
        now = (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)
        assert now[0] >= max(peaks[0], allocator.allocated_bytes)
        assert now[1] >= max(peaks[1], allocator.reserved_bytes)
        assert limit_bytes is None or now[1] <= limit_bytes
        peaks = now
    assert (misses > 0) == (limit_bytes is not None)

    for handle in random_.sample(list(requested), len(requested)):
        allocator.free(handle)
    assert allocator.allocated_bytes == 0
    assert all(len(pieces) == 1 for pieces in layout(allocator))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert layout(allocator) == []
    allocator.malloc(3 * MIB)
    assert held(allocator) == (3, 20)
