"""What tests of the allocator's model share: its blocks as they lie, and its books in MiB."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gcbench.simulate.allocator.caching_allocator import CachingAllocator

MIB = 1 << 20
BOTH = pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])


@dataclass(frozen=True, kw_only=True)
class Piece:
    address: int
    size: int
    allocated: bool
    is_small: bool


def layout(allocator: CachingAllocator) -> list[list[Piece]]:
    """Every contiguous range of reserved memory as the blocks in it, by walking the links from its first block."""
    blocks = [*allocator._small.free, *allocator._large.free, *allocator._live.values()]
    ranges = []
    for head in blocks:
        if head.prev is None or not head.prev.mapped:
            pieces, block = [], head
            while block is not None and block.mapped:
                pieces.append(
                    Piece(
                        address=block.address,
                        size=block.size,
                        allocated=block.allocated,
                        is_small=block.pool.is_small,
                    )
                )
                block = block.next
            ranges.append(pieces)
    assert sum(map(len, ranges)) == len(blocks), "a block is in no segment, or in two"
    return sorted(ranges, key=lambda pieces: pieces[0].address)


def held(allocator: CachingAllocator) -> tuple[float, float]:
    """Allocated and reserved, in MiB."""
    return allocator.allocated_bytes / MIB, allocator.reserved_bytes / MIB
