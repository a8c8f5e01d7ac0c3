"""A whole run as sizes and events, and the peaks that its measured step has on a device. No torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gcbench.core.records import PHASES, MemoryPeaks, Phase
from gcbench.simulate.allocator.caching_allocator import CachingAllocator
from gcbench.simulate.allocator.pools import PoolBlock, rounded
from gcbench.simulate.events import Trace, of_phases

Ints = npt.NDArray[np.int64]
ModelBlocks = Callable[[CachingAllocator], Sequence[PoolBlock | None]]
"""Allocates what a timeline's first events do, the model's tensors, in an order of its own."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The blocks and events from an empty device to the end of the measured step.

    Attributes:
        nbytes: size of each block.
        events: `n` for the allocation of block n, `~n` for its release.
        marks: (number of events before it, phase) for each phase of the measured step, which is the last.
        settled_at: numbers of events after which the allocator's cache is emptied, as a measurement does.
    """

    nbytes: Ints
    events: Ints
    marks: tuple[tuple[int, Phase], ...]
    settled_at: tuple[int, ...] = ()

    def live(self) -> Ints:
        """Bytes alive after each event."""
        allocates = self.events >= 0
        blocks = np.where(allocates, self.events, ~self.events)
        return np.cumsum(np.where(allocates, self.nbytes[blocks], -self.nbytes[blocks]))

    def spans(self) -> tuple[tuple[Phase, int, int], ...]:
        """(phase, number of events before it, number of events before its end) of the measured step."""
        ends = [*(start for start, _ in self.marks[1:]), len(self.events)]
        return tuple((phase, start, end) for (start, phase), end in zip(self.marks, ends, strict=True))


def of_trace(
    trace: Trace,
    *,
    resident: Sequence[int] = (),
    requested: Sequence[int | None] | None = None,
    settled_at: Sequence[int] = (),
) -> Timeline:
    """The timeline of a full trace with `resident` blocks of so many bytes.

    `requested` are the numbers of the trace's events before their allocations, None for those that are never requested;
    without it all are allocated first.
    """
    extra = len(resident)
    events = np.array(trace.events, np.int64)
    events += np.where(events >= 0, extra, -extra)
    known = [0] * extra if requested is None else requested
    insertions = [(at, number) for number, at in enumerate(known) if at is not None]
    places = np.array([at for at, _ in insertions], np.int64)

    def moved(count: int) -> int:
        return count + int(np.count_nonzero(places <= count))

    return Timeline(
        nbytes=np.array([*resident, *(block.nbytes for block in trace.blocks)], np.int64),
        events=np.insert(events, places, [number for _, number in insertions]),
        marks=tuple((moved(start), phase) for start, phase in trace.marks),
        settled_at=tuple(moved(start) for start in (*settled_at, *trace.settled_at)),
    )


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The peaks of a step on a device.

    Attributes:
        memory: the peaks of its phases.
        at: the event after which the allocated peak is reached; -1 if it is what is alive when the phase begins.
        fits: whether it runs within the limit.
        num_alloc_retries: how often the cache had to be emptied to go on.
    """

    memory: MemoryPeaks
    at: int
    fits: bool = True
    num_alloc_retries: int = 0


def exact(timeline: Timeline) -> Peak:
    """The peaks on the CPU, where a block counts with its exact size."""
    live = timeline.live()
    highest: dict[Phase, int] = {}
    at: dict[Phase, int] = {}
    for phase, start, end in timeline.spans():
        # What was alive when the phase began counts: the state after the event before it.
        first = max(start - 1, 0)
        at[phase] = first + int(np.argmax(live[first:end]))
        highest[phase] = int(live[at[phase]])
    memory = of_phases(highest)
    return Peak(memory=memory, at=at[memory.peak_phase])


def cached(
    timeline: Timeline,
    *,
    limit_bytes: int | None = None,
    device_bytes: int | None = None,
    expandable_segments: bool = False,
    model_blocks: ModelBlocks = lambda allocator: (),
) -> Peak:
    """The peaks with CUDA's caching allocator; raises `OutOfMemory` if the step does not fit within the limit.

    `device_bytes` is the device's whole memory, of which the limit is what is left for the allocator. With
    `model_blocks` the model's tensors lie where it puts them.
    """
    allocator = CachingAllocator(
        limit_bytes=limit_bytes, device_bytes=device_bytes, expandable_segments=expandable_segments
    )
    sizes = rounded(timeline.nbytes).tolist()
    allocated_blocks: list[PoolBlock | None] = [None] * len(sizes)
    marks = dict(timeline.marks)
    stops = sorted({*marks, *timeline.settled_at, len(timeline.events)})
    highest: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    at: dict[Phase, int] = dict.fromkeys(PHASES, -1)
    top = 0
    phase: Phase | None = None
    events: Sequence[int] = timeline.events.tolist()
    allocate, release = allocator.allocate, allocator.release
    with without_collections():
        allocated_already = model_blocks(allocator)
        done = len(allocated_already)
        for event, block in zip(events[:done], allocated_already, strict=True):
            allocated_blocks[event] = block
        for stop in stops:
            for place in range(done, stop):
                event = events[place]
                if event < 0:
                    if (block := allocated_blocks[~event]) is not None:
                        release(block)
                elif sizes[event]:
                    allocated_blocks[event] = allocate(sizes[event])
                    if phase is not None and (allocated := allocator.allocated_bytes) > top:
                        top = highest[phase] = allocated
                        at[phase] = place
            done = stop
            if stop in timeline.settled_at:
                allocator.empty_cache()
            if stop in marks:
                if phase is None:
                    allocator.reset_peaks()
                phase = marks[stop]
                top = highest[phase] = allocator.allocated_bytes
                at[phase] = max(stop - 1, 0)
    memory = of_phases(highest, reserved_bytes=allocator.peak_reserved_bytes)
    return Peak(memory=memory, at=at[memory.peak_phase], num_alloc_retries=allocator.num_alloc_retries)


@contextmanager
def without_collections() -> Iterator[None]:
    """Disable garbage collection, which would traverse a great many objects of which none is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
