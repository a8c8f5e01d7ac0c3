"""Simulates CUDA's caching allocator: what a sequence of mallocs and frees allocates and reserves.

A model of `DeviceCachingAllocator` in pytorch's c10/cuda/CUDACachingAllocator.cpp (constants in
c10/core/AllocatorConfig.h), torch 2.11 to 2.13, on one stream. Functions named in backquotes without a leading
underscore are that file's.

Covered, with the settings torch has by default:
- sizes in multiples of 512 B (`round_size`); requests up to 1 MiB in the small pool, others in the large (`get_pool`);
- best fit: the smallest free block, of equal ones the first (`BlockComparatorSize`, `get_free_block`).
  No block is too large to be handed out: the two tests on oversize blocks compare with `max_split_size`, by default
  infinite;
- the rest of a block is split off if it is at least 512 B (small pool) or more than 1 MiB (large pool), else it is
  handed out, and counted as allocated, with the block (`should_split`, `alloc_found_block`);
- segments of 2 MiB, of 20 MiB, or of the size rounded up to 2 MiB (`get_allocation_size`), which stay reserved;
- freed neighbours within a segment merge (`free_block`, `try_merge_blocks`);
- at the device's limit every wholly free segment of both pools is released and the request tried once more
  (`release_cached_blocks`), then it is out of memory;
- `expandable_segments:True`: one growing segment per pool, mapped in pages of 2 MiB (small) or 20 MiB (large); rests
  are split off from 512 B on in both pools.

Not covered: `roundup_power2_divisions`, `max_split_size_mb`, `garbage_collection_threshold`, `large_segment_size_mb`,
private pools and CUDA graphs, blocks used on a second stream.

Two things are assumed. Addresses: every segment lies above all earlier ones, on a multiple of 2 MiB. Among free blocks
of one size torch 2.13 takes that of the oldest segment (pytorch#183591), as the model does, whatever the driver's
addresses are; torch 2.11 takes the lowest address, which only the driver knows. It changes the fragmentation, and so
what is reserved; what is allocated changes only by rests that are not split off. Where a pool has several expandable
segments, which takes running out of memory, every version maps pages at the lowest address. The limit: a segment or
page can be reserved as long as the reserved total stays within it.

`tests/gpu/test_gpu_allocator.py` compares the model with the real allocator, event by event.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from gcbench.simulate.allocator.pools import (
    MIN_OWN_SEGMENT_BYTES,
    SEGMENT_ROUNDING_BYTES,
    SMALL_REQUEST_BYTES,
    Pool,
    PoolBlock,
    by_address,
    rounded,
)

NULL = 0
"""The handle of an allocation of zero bytes, which has no block."""

_FIRST_ADDRESS = SEGMENT_ROUNDING_BYTES
_UNLIMITED_ADDRESS_SPACE_BYTES = 1 << 50

OnSegment = Callable[[str, int, int], object]
"""(action, address, bytes): `segment_alloc` and `segment_free`, or `segment_map` and `segment_unmap` for the pages of
expandable segments, as a memory snapshot of torch names them."""


class OutOfMemory(Exception):
    """A request that does not fit even with every free segment released; the allocator stays usable.

    Attributes:
        requested_bytes: the request, rounded up as the allocator does.
        allocated_bytes, reserved_bytes, limit_bytes: as the allocator's, at that moment.
    """

    def __init__(self, *, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{requested_bytes} bytes do not fit: {allocated_bytes} allocated, {reserved_bytes} reserved, "
            f"limit {limit_bytes}"
        )
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes


class CachingAllocator:
    """Replays allocations as torch's CUDA allocator would serve them, on one device and stream.

    Handles are the addresses of the blocks. A million events take a few seconds.

    Args:
        limit_bytes: what the allocator may reserve at most: the device's memory less what other processes and
            libraries hold. None for no limit.
        allowed_bytes: the limit that `torch.cuda.set_per_process_memory_fraction` sets, in bytes. A request is refused
            if what is reserved and the request's segment size together exceed it, even where fewer new pages of an
            expandable segment would do. None for no such limit.
        device_bytes: the device's whole memory, of which an expandable segment spans 9/8 in addresses; None for
            `limit_bytes`.
        expandable_segments: as in PYTORCH_ALLOC_CONF. Reserved then counts mapped pages.
        on_segment: is called for every segment or page that is reserved or released, in order.
    """

    def __init__(
        self,
        *,
        limit_bytes: int | None = None,
        allowed_bytes: int | None = None,
        device_bytes: int | None = None,
        expandable_segments: bool = False,
        on_segment: OnSegment = lambda action, address, nbytes: None,
    ) -> None:
        self._limit = limit_bytes
        self._allowed = allowed_bytes
        self._device_bytes = limit_bytes if device_bytes is None else device_bytes
        self._on_segment = on_segment
        self._expandable = expandable_segments
        self._small = Pool(is_small=True, expandable_segments=expandable_segments)
        self._large = Pool(is_small=False, expandable_segments=expandable_segments)
        self._live: dict[int, PoolBlock] = {}
        self._next_address = _FIRST_ADDRESS
        self._allocated = self._peak_allocated = 0
        self._reserved = self._peak_reserved = 0
        self._num_alloc_retries = 0

    @property
    def allocated_bytes(self) -> int:
        """`torch.cuda.memory_allocated`: the blocks handed out, each counted whole."""
        return self._allocated

    @property
    def reserved_bytes(self) -> int:
        """`torch.cuda.memory_reserved`: segments, or mapped pages of expandable ones."""
        return self._reserved

    @property
    def peak_allocated_bytes(self) -> int:
        """`torch.cuda.max_memory_allocated` since the last `reset_peaks`."""
        return self._peak_allocated

    @property
    def peak_reserved_bytes(self) -> int:
        """`torch.cuda.max_memory_reserved` since the last `reset_peaks`."""
        return self._peak_reserved

    @property
    def num_alloc_retries(self) -> int:
        """`num_alloc_retries` of `torch.cuda.memory_stats`: requests tried again after the cache was released."""
        return self._num_alloc_retries

    def free_blocks(self) -> Iterator[PoolBlock]:
        """The free blocks of both pools, mapped ones only, for a picture of the memory."""
        yield from self._small.free
        yield from self._large.free

    def reset_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`: peaks start again from what is allocated and reserved now."""
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def malloc(self, nbytes: int) -> int:
        """Allocate as `malloc` does; returns the handle, `NULL` for zero bytes.

        Raises:
            OutOfMemory: the limit does not allow it, even with the whole cache released.
        """
        if nbytes == 0:
            return NULL
        block = self.allocate(rounded(nbytes))
        self._live[block.address] = block
        return block.address

    def free(self, handle: int) -> None:
        """Free what `malloc` returned; its block merges with free neighbours (`free_block`).

        Raises:
            KeyError: nothing is allocated under this handle.
        """
        if handle != NULL:
            self.release(self._live.pop(handle))

    def allocate(self, size: int) -> PoolBlock:
        """`malloc` of a size that is rounded already and not zero, for a caller that keeps the block."""
        pool = self._small if size <= SMALL_REQUEST_BYTES else self._large
        block = pool.free.take(size) or self._new_block(pool, size)
        if block.size - size >= pool.min_rest:
            pool.free.add(block.split(size))
        block.allocated = True
        self._allocated += block.size
        if self._allocated > self._peak_allocated:
            self._peak_allocated = self._allocated
        return block

    def release(self, block: PoolBlock) -> None:
        """`free` of a block that `allocate` returned."""
        block.allocated = False
        self._allocated -= block.size
        before, behind = block.prev, block.next
        if (before is not None and not before.allocated) or (behind is not None and not behind.allocated):
            self._merge_neighbours(block)
        insort(block.pool.free.entries, (block.size, block.address, block))

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache`: release every wholly free segment, or page of an expandable one."""
        for pool in (self._large, self._small):
            for block in tuple(pool.free):
                if self._expandable:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.free.drop(block)
                    self._reserved -= block.size
                    self._on_segment("segment_free", block.address, block.size)

    def _new_block(self, pool: Pool, size: int) -> PoolBlock:
        """A block of newly reserved memory, if need be after emptying the cache (the second half of `malloc`)."""
        block = self._reserved_block(pool, size)
        if block is None:
            self.empty_cache()
            self._num_alloc_retries += 1
            block = self._reserved_block(pool, size)
        if block is None:
            raise OutOfMemory(
                requested_bytes=size,
                allocated_bytes=self._allocated,
                reserved_bytes=self._reserved,
                limit_bytes=min(limit for limit in (self._limit, self._allowed) if limit is not None),
            )
        return block

    def _reserved_block(self, pool: Pool, size: int) -> PoolBlock | None:
        """A block of newly reserved memory; None if a limit forbids it (`alloc_block`)."""
        nbytes = _segment_size(pool, size)
        if self._allowed is not None and self._reserved + nbytes > self._allowed:
            return None
        return self._expand(pool, size) if self._expandable else self._new_segment(pool, nbytes)

    def _reserve(self, nbytes: int) -> bool:
        """Reserve memory on the device; False if the limit forbids it."""
        if self._limit is not None and self._reserved + nbytes > self._limit:
            return False
        self._reserved += nbytes
        if self._reserved > self._peak_reserved:
            self._peak_reserved = self._reserved
        return True

    def _new_range(self, pool: Pool, nbytes: int, *, mapped: bool) -> PoolBlock:
        """A block at addresses above all earlier ones."""
        address = self._next_address
        self._next_address += nbytes
        return PoolBlock(pool, address, nbytes, address, mapped)

    def _new_segment(self, pool: Pool, nbytes: int) -> PoolBlock | None:
        """A segment by cudaMalloc; None if the device's memory is too small for it."""
        if not self._reserve(nbytes):
            return None
        block = self._new_range(pool, nbytes, mapped=True)
        self._on_segment("segment_alloc", block.address, nbytes)
        return block

    def _merge_neighbours(self, block: PoolBlock) -> None:
        """Merge with the neighbours that are free, and mapped or unmapped as the block is (`try_merge_blocks`)."""
        before, behind = block.prev, block.next
        if before is not None and not before.allocated and before.mapped is block.mapped:
            self._forget(before)
            block.address = before.address
            block.size += before.size
            block.prev = before.prev
            if block.prev is not None:
                block.prev.next = block
        if behind is not None and not behind.allocated and behind.mapped is block.mapped:
            self._forget(behind)
            block.size += behind.size
            block.next = behind.next
            if block.next is not None:
                block.next.prev = block

    @staticmethod
    def _forget(block: PoolBlock) -> None:
        if block.mapped:
            block.pool.free.drop(block)
        else:
            block.pool.unmapped.remove(block)

    def _expand(self, pool: Pool, size: int) -> PoolBlock | None:
        """Map pages until there is a block of `size` bytes (`try_allocate_expandable_block`).

        None if the limit forbids it; pages that were mapped before that stay, as in the source.
        """
        block = self._expandable_room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None
            if not self._map(following, min(following.size, size - block.size)):
                return None
            block = following  # which has merged with the one before it
        pool.free.drop(block)
        return block

    def _expandable_room(self, pool: Pool, size: int) -> PoolBlock:
        """The lowest run of free and unmapped blocks with room for `size` (`find_expandable_block`)."""
        for unmapped in pool.unmapped:
            before = unmapped.prev
            start = unmapped if before is None or before.allocated else before
            room, block = 0, start
            while room < size:
                room += block.size
                following = block.next
                if following is None or following.allocated:
                    break
                block = following
            if room >= size:
                return start
        # ExpandableSegment's constructor reserves addresses for 1 1/8 of the device
        total = self._device_bytes
        space = _UNLIMITED_ADDRESS_SPACE_BYTES if total is None else total + total // 8
        segment = self._new_range(pool, max(_round_up(space, pool.page), pool.page), mapped=False)
        insort(pool.unmapped, segment, key=by_address)
        return segment

    def _map(self, block: PoolBlock, size: int) -> bool:
        """Back the first `size` bytes of an unmapped block with whole pages, all or none (`map_block`)."""
        mapped = _round_up(size, block.pool.page)
        if not self._reserve(mapped):
            return False
        pool = block.pool
        pool.unmapped.remove(block)
        if mapped < block.size:
            insort(pool.unmapped, block.split(mapped), key=by_address)
        block.mapped = True
        self._on_segment("segment_map", block.address, mapped)
        self._merge_neighbours(block)
        pool.free.add(block)
        return True

    def _unmap(self, block: PoolBlock) -> None:
        """Unmap the whole pages inside a free block of an expandable segment (`unmap_block`)."""
        pool = block.pool
        begin = block.origin + _round_up(block.address - block.origin, pool.page)
        end = block.origin + (block.address + block.size - block.origin) // pool.page * pool.page
        if begin >= end:
            return
        pool.free.drop(block)
        if begin > block.address:
            front, block = block, block.split(begin - block.address)
            pool.free.add(front)
        if end < block.address + block.size:
            pool.free.add(block.split(end - begin))
        block.mapped = False
        self._reserved -= end - begin
        self._on_segment("segment_unmap", begin, end - begin)
        self._merge_neighbours(block)
        if block.prev is not None or block.next is not None:  # else nothing is left of it: `release_expandable_segment`
            insort(pool.unmapped, block, key=by_address)


def _segment_size(pool: Pool, size: int) -> int:
    """The segment that a request asks the device for (`get_allocation_size`)."""
    return pool.page if size < MIN_OWN_SEGMENT_BYTES else _round_up(size, SEGMENT_ROUNDING_BYTES)


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple
