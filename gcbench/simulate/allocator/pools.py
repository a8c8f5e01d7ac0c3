"""Keeps the pools of CUDA's caching allocator: blocks of its segments, and the free ones in order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
MIN_OWN_SEGMENT_BYTES = 10 << 20
SEGMENT_ROUNDING_BYTES = 2 << 20
"""kMinBlockSize, kSmallSize, kSmallBuffer, large_segment_size_, kMinLargeAlloc and kRoundLarge."""

_Sizes = TypeVar("_Sizes", int, npt.NDArray[np.int64])


def rounded(nbytes: _Sizes) -> _Sizes:
    """The bytes that a block of so many takes (`round_size`), for one size or an array of them."""
    return -(-nbytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


class PoolBlock:
    """A part of a segment, with its neighbours. `origin` is the segment's address, from which its pages are counted."""

    __slots__ = ("address", "allocated", "mapped", "next", "origin", "pool", "prev", "size")

    def __init__(self, pool: Pool, address: int, size: int, origin: int, mapped: bool) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.origin = origin
        self.mapped = mapped
        self.allocated = False
        self.prev: PoolBlock | None = None
        self.next: PoolBlock | None = None

    def split(self, size: int) -> PoolBlock:
        """Keep the first `size` bytes; return the rest as a new block, linked in behind."""
        rest = PoolBlock(self.pool, self.address + size, self.size - size, self.origin, self.mapped)
        self.size = size
        rest.prev = self
        rest.next = self.next
        if rest.next is not None:
            rest.next.prev = rest
        self.next = rest
        return rest

    def expandable_size(self) -> int:
        """Its size with the unmapped address space right behind it, where it could grow (`get_free_block`)."""
        following = self.next
        return self.size if following is None or following.mapped else self.size + following.size


by_address = attrgetter("address")


class FreeBlocks:
    """Free blocks in order of size, then address.

    Attributes:
        entries: (size, address, block); addresses differ, so that blocks are never compared.
    """

    __slots__ = ("_can_grow", "entries")

    def __init__(self, *, can_grow: bool) -> None:
        self._can_grow = can_grow
        self.entries: list[tuple[int, int, PoolBlock]] = []

    def __iter__(self) -> Iterator[PoolBlock]:
        return (block for _, _, block in self.entries)

    def add(self, block: PoolBlock) -> None:
        insort(self.entries, (block.size, block.address, block))

    def drop(self, block: PoolBlock) -> None:
        del self.entries[bisect_left(self.entries, (block.size, block.address))]

    def take(self, size: int) -> PoolBlock | None:
        """Remove and return the best fit: the smallest block of at least `size`, of equal ones the lowest.

        A block that can grow counts with the address space behind it, so that the growing end of a segment is used
        when nothing else fits. As in the source, the search goes on only while the next block counts for less.
        """
        place = bisect_left(self.entries, (size,))
        if place == len(self.entries):
            return None
        if self._can_grow:
            place = self._cheapest(place)
        return self.entries.pop(place)[2]

    def _cheapest(self, place: int) -> int:
        """From `place` on, the block before the first that does not count for less than it."""
        counts = self.entries[place][2].expandable_size()
        for other in range(place + 1, len(self.entries)):
            if (other_counts := self.entries[other][2].expandable_size()) >= counts:
                break
            place, counts = other, other_counts
        return place


class Pool:
    """The small or the large pool: its free blocks, and the parts of its expandable segments that are not mapped."""

    __slots__ = ("free", "is_small", "min_rest", "page", "unmapped")

    def __init__(self, *, is_small: bool, expandable_segments: bool) -> None:
        self.is_small = is_small
        self.page = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        # `should_split`: from 512 B on, or strictly more than 1 MiB
        self.min_rest = MIN_BLOCK_BYTES if is_small or expandable_segments else SMALL_REQUEST_BYTES + 1
        self.free = FreeBlocks(can_grow=expandable_segments)
        self.unmapped: list[PoolBlock] = []  # by address
