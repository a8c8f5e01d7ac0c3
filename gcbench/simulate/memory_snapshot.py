"""Writes a predicted step as a memory snapshot: what `torch.cuda.memory._snapshot` returns where a card records it.

Read by https://pytorch.org/memory_viz and `python -m torch.cuda._memory_viz` (torch 2.11 to 2.13). The recording begins
with the measured step: what was allocated before, as parameters and optimizer states, is in the segments alone. Instead
of a stack of calls, a block has three frames: its operator and layer, the part of the step that allocated it, and what
it is for.

Two things differ from a recording. Sizes are those that the allocator counts, a request rounded up, so that the highest
point of the viewer's curve is the predicted peak; torch records sizes as requested. Times are numbers of events.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gcbench.core.snapshot_files import PROTOCOL
from gcbench.core.version import __version__
from gcbench.simulate.allocator.caching_allocator import CachingAllocator, OutOfMemory
from gcbench.simulate.allocator.pools import PoolBlock, rounded
from gcbench.simulate.compose.block_kinds import KIND_NAMES, Kind
from gcbench.simulate.compose.whole_step import Assembly
from gcbench.simulate.explain import plain_op
from gcbench.simulate.timeline import ModelBlocks, without_collections

Frames = list[dict[str, str | int]]
Entry = dict[str, object]

_KIND_NAMES = KIND_NAMES | {Kind.LAYER_INPUTS: "layer inputs", Kind.SAVED: "saved activations"}
_NAMED_BY_TENSOR = (Kind.PARAMETERS, Kind.RESIDENT)
"""Kinds whose blocks are named after a tensor or workspace and not after an operator."""
_POOL_ID = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Where the device runs out of memory: the event that requests the block, and what is free of the device then."""

    event: int
    device_free_bytes: int


def snapshot(
    assembly: Assembly,
    *,
    limit_bytes: int | None,
    device_bytes: int | None,
    expandable_segments: bool,
    model_blocks: ModelBlocks = lambda allocator: (),
) -> bytes:
    """Return the pickled snapshot of a step.

    A step that does not fit within `limit_bytes` is replayed without the limit, so that all it needs can be seen, with
    an `oom` entry where the device runs out of memory.

    Args:
        limit_bytes: what the allocator may reserve; None for no limit.
        device_bytes: the device's whole memory.
        model_blocks: as in `timeline.cached`.
    """
    replay = _Replay(assembly, limit_bytes, device_bytes, expandable_segments=expandable_segments)
    shortage = replay.run(model_blocks)
    if shortage is not None:
        replay = _Replay(assembly, None, device_bytes, expandable_segments=expandable_segments, shortage=shortage)
        replay.run(model_blocks)
    return pickle.dumps(replay.as_snapshot(), protocol=PROTOCOL)


class _Replay:
    """One replay of a step's timeline through the allocator, recorded from the measured step on."""

    def __init__(
        self,
        assembly: Assembly,
        limit_bytes: int | None,
        device_bytes: int | None,
        *,
        expandable_segments: bool,
        shortage: Shortage | None = None,
    ) -> None:
        self.assembly = assembly
        self.expandable_segments = expandable_segments
        self.shortage = shortage
        self.allocator = CachingAllocator(
            limit_bytes=limit_bytes,
            device_bytes=device_bytes,
            expandable_segments=expandable_segments,
            on_segment=self._on_segment,
        )
        self.trace: list[Entry] = []
        self.live: dict[int, PoolBlock] = {}
        self._event = 0
        self._records = False
        self._frames = _BlockFrames(assembly)
        self._current: Frames = []

    def run(self, model_blocks: ModelBlocks) -> Shortage | None:
        """Replay all events; returns where the device ran out of memory, if it did."""
        line = self.assembly.timeline
        begin = line.marks[0][0]
        sizes = rounded(line.nbytes).tolist()
        events: list[int] = line.events.tolist()
        try:
            with without_collections():
                built = model_blocks(self.allocator)
                for event, block in zip(events, built, strict=False):
                    self._frames.allocated_in[event] = self._part()
                    if block is not None:
                        self.live[event] = block
                for self._event, event in enumerate(events[len(built) :], start=len(built)):
                    if self._event in line.settled_at:
                        self.allocator.empty_cache()
                    self._records = self._event >= begin
                    if event < 0:
                        self._free(~event)
                    elif sizes[event]:
                        self._allocate(event, sizes[event])
        except OutOfMemory as error:
            return Shortage(event=self._event, device_free_bytes=max(error.limit_bytes - error.reserved_bytes, 0))
        return None

    def _allocate(self, number: int, size: int) -> None:
        self._frames.allocated_in[number] = self._part()
        self._current = self._frames.of(number)
        if self.shortage is not None and self.shortage.event == self._event:
            self._record("oom", size=size, device_free=self.shortage.device_free_bytes, always=True)
        block = self.live[number] = self.allocator.allocate(size)
        self._record("alloc", addr=block.address, size=block.size)

    def _free(self, number: int) -> None:
        block = self.live.pop(number, None)
        if block is None:
            return  # it has no bytes
        self._current = self._frames.of(number)
        address, size = block.address, block.size  # `release` merges it with its neighbours
        for action in ("free_requested", "free_completed"):
            self._record(action, addr=address, size=size)
        self.allocator.release(block)

    def _on_segment(self, action: str, address: int, nbytes: int) -> None:
        self._record(action, addr=address, size=nbytes)

    def _part(self) -> str:
        return self.assembly.part(self._event) if self._records else "before the step"

    def _record(self, action: str, *, size: int, always: bool = False, **where: int) -> None:
        if self._records or always:
            self.trace.append(
                {
                    "action": action,
                    **where,
                    "size": size,
                    "stream": 0,
                    "time_us": self._event,
                    "frames": self._current,
                    "compile_context": "N/A",
                    "user_metadata": "",
                    "pool_id": _POOL_ID,
                }
            )

    def as_snapshot(self) -> dict[str, object]:
        """The recording with the state of the memory at its end."""
        owners = {block.address: number for number, block in self.live.items()}
        return {
            "segments": [self._segment(blocks, owners) for blocks in self._ranges()],
            "device_traces": [self.trace],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True" if self.expandable_segments else "",
                "max_split_size": -1,
                "garbage_collection_threshold": 0.0,
                "expandable_segments": self.expandable_segments,
                "roundup_power2_divisions": {},
            },
            "external_annotations": list(self._annotations()),
            "predicted_by": f"gcbench {__version__}",
        }

    def _annotations(self) -> Iterator[Entry]:
        """The phases of the step."""
        for phase, start, end in self.assembly.timeline.spans():
            for stage, time in (("START", start), ("END", end)):
                yield {"device": 0, "name": phase, "stage": stage, "time_us": time}

    def _ranges(self) -> list[list[PoolBlock]]:
        """Every contiguous range of reserved memory as its blocks, by address."""
        ranges = []
        for head in (*self.allocator.free_blocks(), *self.live.values()):
            if head.prev is None or not head.prev.mapped:
                blocks: list[PoolBlock] = []
                block: PoolBlock | None = head
                while block is not None and block.mapped:
                    blocks.append(block)
                    block = block.next
                ranges.append(blocks)
        return sorted(ranges, key=lambda blocks: blocks[0].address)

    def _segment(self, blocks: list[PoolBlock], owners: Mapping[int, int]) -> Entry:
        used = sum(block.size for block in blocks if block.allocated)
        return {
            "device": 0,
            "address": blocks[0].address,
            "total_size": sum(block.size for block in blocks),
            "allocated_size": used,
            "active_size": used,
            "requested_size": used,
            "stream": 0,
            "segment_type": "small" if blocks[0].pool.is_small else "large",
            "segment_pool_id": _POOL_ID,
            "is_expandable": self.expandable_segments,
            "frames": [],
            "blocks": [
                {
                    "address": block.address,
                    "size": block.size,
                    "requested_size": block.size if block.allocated else 0,
                    "state": "active_allocated" if block.allocated else "inactive",
                    "frames": self._frames.of(owners[block.address]) if block.allocated else [],
                }
                for block in blocks
            ],
        }


class _BlockFrames:
    """The frames of each block; equal ones are one object, which a pickle stores once."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._ops = [block.op for _, blocks in assembly.block_ranges for block in blocks]
        self._known: dict[tuple[str, str, str, str], Frames] = {}
        self.allocated_in: dict[int, str] = {}
        """Number of a block -> the part of the step that allocated it."""

    def of(self, number: int) -> Frames:
        kind = Kind(int(self._assembly.kinds[number]))
        layer = int(self._assembly.layers[number])
        op = self._ops[number]
        key = (
            _KIND_NAMES[kind] if op is None else op if kind in _NAMED_BY_TENSOR else plain_op(op),
            f"layers.{layer}" if layer >= 0 else "outside the layers",
            self.allocated_in[number],
            _KIND_NAMES[kind],
        )
        if key not in self._known:
            self._known[key] = [
                {"name": key[0], "filename": key[1], "line": 0},
                {"name": key[2], "filename": "part", "line": 0},
                {"name": key[3], "filename": "memory", "line": 0},
            ]
        return self._known[key]
