"""Composes a step whose layers have different policies from steps in which all have the same one. No torch.

The events of a layer in a pass depend on its own policy only, so they are those of the uniform step with that policy.
Where they free a neighbour's block, it is found by its size in the neighbour's own step. A block that would never be
freed, because the layer that frees it has another policy, is freed where its own step frees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gcbench.simulate.compose.resident import request_positions
from gcbench.simulate.compose.step_timeline import step_timeline
from gcbench.simulate.predictor import Step
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.fake_model import BEFORE, HEAD, LOSS, REST, NotComposable, Section

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_NONE = -1
"""No such block, or no such segment."""


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The passes of one uniform step; segments are numbered in order of time, a block's home is where it is allocated.

    Attributes:
        bases: for each segment, the first block allocated in it.
        counts: for each segment, the number of blocks allocated in it.
        nbytes: of each block, in the step that was traced.
        freed_in: for each block, the segment that frees it; `_NONE` where none does.
        after: for each block, how many blocks that segment has allocated by then.
        events: for each segment: (home, number of the block within it, whether it is freed) of each event.
        homes: for each segment, the homes in its events.
        gradients: (home, number within it) of each parameter's gradient.
    """

    bases: Ints
    counts: Ints
    nbytes: Ints
    freed_in: Ints
    after: Ints
    events: tuple[tuple[Ints, Ints, Flags], ...]
    homes: tuple[tuple[int, ...], ...]
    gradients: tuple[Ints, Ints]

    def of_segment(self, values: Ints, segment: int) -> Ints:
        """The part of an array over all blocks for those allocated in a segment."""
        return values[self.bases[segment] : self.bases[segment] + self.counts[segment]]


@dataclass(frozen=True, kw_only=True)
class _Events:
    """Events of the composed passes, with their place in time.

    Attributes:
        blocks: the block of each event; `_NONE` where the composed step does not have it.
        are_frees: whether the event frees its block; else it allocates it.
        segments: where each event belongs.
        after: how many blocks that segment has allocated by then.
    """

    blocks: Ints
    are_frees: Flags
    segments: Ints
    after: Ints

    def at(self, chosen: Ints | Flags) -> _Events:
        return _Events(
            blocks=self.blocks[chosen],
            are_frees=self.are_frees[chosen],
            segments=self.segments[chosen],
            after=self.after[chosen],
        )

    @property
    def codes(self) -> Ints:
        """As a timeline has them: the block, inverted where it is freed."""
        return np.where(self.are_frees, ~self.blocks, self.blocks)


class Combiner:
    """Composes uniform steps; raises NotComposable where one of them was traced in full, or their layers differ."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """`steps` have one batch size."""
        self.steps = tuple(steps)
        parts = [step.parts for step in steps]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            raise NotComposable("a step was traced in full")
        self.segments: tuple[Section, ...] = tuple(segment for segment, _, _ in known[0].passes.instances)
        if any(tuple(segment for segment, _, _ in part.passes.instances) != self.segments for part in known):
            raise NotComposable("the steps' segments are not the same")
        self.layers = tuple(layer for part, layer in self.segments if part == "forward")
        place = {layer: number for number, layer in enumerate(self.layers)}
        last = len(self.layers) - 1
        beside = {BEFORE: 0, HEAD: last, LOSS: last, REST: 0}  # what is outside of layers follows the layer beside it
        self._place_of = np.array([beside.get(each, place.get(each[1], 0)) for each in self.segments], np.int64)
        self._is_outside = np.array([layer < 0 for _, layer in self.segments], np.bool_)
        self._parts = known
        self._tables = [_table(step) for step in steps]
        if any(not np.array_equal(table.gradients[0], self._tables[0].gradients[0]) for table in self._tables):
            raise NotComposable("gradients are made in different places")
        self._translations: dict[tuple[int, int, int], Ints | None] = {}

    def line(self, choice: Sequence[int], lines: Sequence[Timeline]) -> Timeline:
        """The step in which each layer, in the order of `layers`, has the policy of the step of this number.

        `lines` are the timelines of `steps` at the batch size in question, which may differ from the traced one in the
        sizes of blocks.
        """
        source = np.array(choice, np.int64)[self._place_of]
        counts = np.array([self._tables[step].counts[number] for number, step in enumerate(source)], np.int64)
        bases = np.concatenate([[0], np.cumsum(counts)[:-1]])
        events, ends = self._events(source, bases, int(counts.sum()))
        backward_at = int(ends[self.segments.index(LOSS) - 1])
        step = self.steps[0]
        assert step.update is not None
        part = self._parts[0]
        homes, _ = self._tables[0].gradients
        numbers = np.array([table.gradients[1] for table in self._tables], np.int64)
        gradients = bases[homes] + numbers[source[homes], np.arange(len(homes))]
        num_resident = len(part.resident)
        sizes = [
            self._tables[step].of_segment(lines[step].nbytes[num_resident:], number)
            for number, step in enumerate(source)
        ]
        own = len(step.update.own)
        own_at = num_resident + part.passes.num_blocks
        return step_timeline(
            events,
            np.concatenate([lines[0].nbytes[:num_resident], *sizes, lines[0].nbytes[own_at : own_at + own], *sizes]),
            gradients.tolist(),
            num_blocks=int(counts.sum()),
            backward_at=backward_at,
            update_at=len(events) - (len(part.passes.events) - part.passes.update_at),
            requested=[self._moved(at, backward_at) for at in request_positions(part.resident, part.passes)],
            update=step.update,
        )

    def _moved(self, at: int | None, backward_at: int) -> int | None:
        """The event of the composed step for an event number of the first step.

        What stays allocated is requested before the layers, in the first of them, or as the backward pass begins.
        """
        begins = self._parts[0].passes.backward_at
        return at if at is None or at < begins else at - begins + backward_at

    def _events(self, source: Ints, bases: Ints, num_blocks: int) -> tuple[Ints, Ints]:
        """The events of the passes, and how many there are up to the end of each segment."""
        own = self._own_events(source, bases)
        frees = np.flatnonzero(own.are_frees & (own.blocks != _NONE))
        freed, first = np.unique(own.blocks[frees], return_index=True)
        is_valid = ~own.are_frees
        is_valid[frees[first]] = True  # two layers may both free a block: the first does
        valid, added = own.at(is_valid), self._missing_frees(source, freed, num_blocks)
        segments = np.concatenate([valid.segments, added.segments])
        after = np.concatenate([valid.after, added.after])
        is_added = np.repeat([False, True], [len(valid.blocks), len(added.blocks)])
        order = np.lexsort((np.arange(len(segments)), is_added, after, segments))
        ends = np.searchsorted(segments[order], np.arange(len(source)), side="right")
        return np.concatenate([valid.codes, added.codes])[order], ends

    def _own_events(self, source: Ints, bases: Ints) -> _Events:
        """The events of each segment as the step that is its source has them, in numbers of the composed blocks."""
        blocks, frees, segments, after = [], [], [], []
        for segment, step in enumerate(source.tolist()):
            homes, numbers, are_frees = self._tables[step].events[segment]
            block = bases[homes] + numbers
            for home in self._tables[step].homes[segment]:
                if source[home] != step:
                    here = homes == home
                    found = self._translated(home, step, int(source[home]), numbers[here])
                    block[here] = np.where(found != _NONE, bases[home] + found, _NONE)
            blocks.append(block)
            frees.append(are_frees)
            segments.append(np.full(len(block), segment, np.int64))
            after.append(np.cumsum(~are_frees))
        return _Events(
            blocks=np.concatenate(blocks),
            are_frees=np.concatenate(frees),
            segments=np.concatenate(segments),
            after=np.concatenate(after),
        )

    def _missing_frees(self, source: Ints, freed: Ints, num_blocks: int) -> _Events:
        """Frees of the blocks that no segment frees, though their own step does: where that step does."""
        tables = [self._tables[step] for step in source]
        freed_in = np.concatenate([table.of_segment(table.freed_in, number) for number, table in enumerate(tables)])
        after = np.concatenate([table.of_segment(table.after, number) for number, table in enumerate(tables)])
        is_missing = freed_in != _NONE
        is_missing[freed] = False
        return _Events(
            blocks=np.arange(num_blocks), are_frees=np.ones(num_blocks, np.bool_), segments=freed_in, after=after
        ).at(is_missing)

    def _translated(self, home: int, one: int, other: int, numbers: Ints) -> Ints:
        """The numbers in step `other` of blocks of step `one` allocated in `home`; `_NONE` for those it lacks."""
        if one == other:
            return numbers
        key = (home, one, other)
        if key not in self._translations:
            self._translations[key] = self._translation(*key)
        table = self._translations[key]
        return numbers if table is None else table[numbers]

    def _translation(self, home: int, one: int, other: int) -> Ints | None:
        """For each block of step `one` its number in step `other`; None where the blocks are the same."""
        tables = [self._tables[step] for step in (one, other)]
        sizes = [table.of_segment(table.nbytes, home) for table in tables]
        if np.array_equal(sizes[0], sizes[1]):
            return None
        shared = [self._shared(table, home) for table in tables]
        found = np.full(len(sizes[0]), _NONE, np.int64)
        by_size: dict[int, list[int]] = {}
        for number in shared[1].tolist():
            by_size.setdefault(int(sizes[1][number]), []).append(number)
        for number in shared[0].tolist():
            matches = by_size.get(int(sizes[0][number]))
            if matches:
                found[number] = matches.pop(0)
        return found

    def _shared(self, table: _Table, home: int) -> Ints:
        """Numbers of the blocks allocated in a segment that another layer frees."""
        freed_in = table.of_segment(table.freed_in, home)
        owner = np.where(self._is_outside, -1 - np.arange(len(self.segments)), self._place_of)
        return np.flatnonzero((freed_in != _NONE) & (owner[freed_in] != owner[home]))


def _table(step: Step) -> _Table:
    part = step.parts
    assert part is not None
    passes = part.passes
    counts = np.array([len(piece.blocks) for _, piece, _ in passes.instances], np.int64)
    bases = np.array([base for _, _, base in passes.instances], np.int64)
    home_of = np.repeat(np.arange(len(counts)), counts)
    freed_in = np.full(passes.num_blocks, _NONE, np.int64)
    after = np.zeros(passes.num_blocks, np.int64)
    events, homes = [], []
    ends = [*passes.starts[1:].tolist(), len(passes.events)]
    for segment, (start, end) in enumerate(zip(passes.starts.tolist(), ends, strict=True)):
        codes = passes.events[start:end]
        frees = codes < 0
        block = np.where(frees, ~codes, codes)
        freed_in[block[frees]] = segment
        after[block[frees]] = np.cumsum(~frees)[frees]
        events.append((home_of[block], block - bases[home_of[block]], frees))
        homes.append(tuple(np.unique(home_of[block]).tolist()))
    gradients = np.array(part.gradients, np.int64)
    return _Table(
        bases=bases,
        counts=counts,
        nbytes=passes.nbytes(),
        freed_in=freed_in,
        after=after,
        events=tuple(events),
        homes=tuple(homes),
        gradients=(home_of[gradients], gradients - bases[home_of[gradients]]),
    )
