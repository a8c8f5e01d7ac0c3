"""A step in which layers are treated in different ways, from steps in which all are treated alike. No torch.

What a layer does in a pass follows its own treatment, so its events are those of the step in which every layer is
treated as it is. What it gives back of its neighbours' is looked up in their own steps. A block that nobody would give
back, because the one who does so is treated otherwise, goes where its own step gives it back.
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

_NEVER = -1


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One step's passes; `segments` are numbered in order of time, `home` is where a block is taken.

    Attributes:
        bases: for each segment, the first block taken in it.
        counts: for each segment, how many are.
        nbytes: of each block, in the step that was traced.
        freed_in: for each block, the segment in which it is given back.
        after: for each block, how many blocks that segment has taken by then.
        events: for each segment: (home, number of the block within it, whether it is given back) of each event.
        homes: for each segment, those of its events.
        gradients: (home, number within it) of each parameter's gradient.
    """

    bases: Ints
    counts: Ints
    nbytes: Ints
    freed_in: Ints
    after: Ints
    events: tuple[tuple[Ints, Ints, npt.NDArray[np.bool_]], ...]
    homes: tuple[tuple[int, ...], ...]
    gradients: tuple[Ints, Ints]


class Combiner:
    """Puts the steps together; raises NotComposable where one of them was traced in full, or their layers differ."""

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
        beside = {BEFORE: 0, HEAD: last, LOSS: last, REST: 0}  # what is outside goes with the layer beside it
        self._place_of = np.array([beside.get(each, place.get(each[1], 0)) for each in self.segments], np.int64)
        self._is_outside = np.array([layer < 0 for _, layer in self.segments], np.bool_)
        self._parts = known
        self._tables = [_table(step) for step in steps]
        if any(not np.array_equal(table.gradients[0], self._tables[0].gradients[0]) for table in self._tables):
            raise NotComposable("gradients are made in different places")
        self._translations: dict[tuple[int, int, int], Ints | None] = {}

    def line(self, choice: Sequence[int], lines: Sequence[Timeline]) -> Timeline:
        """The step in which each layer, in the order of `layers`, is treated as in the step of this number.

        `lines` are the steps' own at the batch size that is wanted: with other sizes than the traced ones have, maybe.
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
        of_params = np.arange(len(homes))
        gradients = bases[homes] + numbers[source[homes], of_params]
        standing = len(part.resident)
        sizes = [
            lines[step].nbytes[standing + table.bases[number] : standing + table.bases[number] + table.counts[number]]
            for number, step in enumerate(source)
            for table in (self._tables[step],)
        ]
        own = len(step.update.own)
        own_at = standing + part.passes.num_blocks
        return step_timeline(
            events,
            np.concatenate([lines[0].nbytes[:standing], *sizes, lines[0].nbytes[own_at : own_at + own], *sizes]),
            gradients.tolist(),
            num_blocks=int(counts.sum()),
            backward_at=backward_at,
            requested=[self._moved(at, backward_at) for at in request_positions(part.resident, part.passes)],
            update=step.update,
        )

    def _moved(self, at: int | None, backward_at: int) -> int | None:
        """Where in the whole step that is which in the first of the steps comes after so many events.

        What is asked for is asked for before the layers, in the first of them, or as the backward pass begins.
        """
        begins = self._parts[0].passes.backward_at
        return at if at is None or at < begins else at - begins + backward_at

    def _events(self, source: Ints, bases: Ints, num_blocks: int) -> tuple[Ints, Ints]:
        """The passes' events, and how many there are up to the end of each segment."""
        blocks, frees, taken, at = [], [], [], []
        for segment, step in enumerate(source.tolist()):
            table = self._tables[step]
            home, number, free = table.events[segment]
            if any(source[other] != step for other in table.homes[segment]):
                block = np.full(len(home), _NEVER, np.int64)
                for other in table.homes[segment]:
                    here = home == other
                    found = self._translated(other, step, int(source[other]), number[here])
                    block[here] = np.where(found >= 0, bases[other] + found, _NEVER)
            else:
                block = bases[home] + number
            blocks.append(block)
            frees.append(free)
            taken.append(np.cumsum(~free))
            at.append(np.full(len(block), segment, np.int64))
        block, free, after, segment_of = (np.concatenate(each) for each in (blocks, frees, taken, at))
        freed = np.flatnonzero(free & (block >= 0))
        _, first = np.unique(block[freed], return_index=True)
        good = ~free
        good[freed[first]] = True
        is_given = np.zeros(num_blocks, np.bool_)
        is_given[block[freed]] = True
        wanted_in = np.concatenate([self._of(source, "freed_in", number) for number in range(len(source))])
        wanted_after = np.concatenate([self._of(source, "after", number) for number in range(len(source))])
        left = np.flatnonzero(~is_given & (wanted_in != _NEVER))
        all_at = np.concatenate([segment_of[good], wanted_in[left]])
        all_after = np.concatenate([after[good], wanted_after[left]])
        all_events = np.concatenate([np.where(free, ~block, block)[good], ~left])
        is_late = np.concatenate([np.zeros(int(good.sum()), np.bool_), np.ones(len(left), np.bool_)])
        order = np.lexsort((np.arange(len(all_at)), is_late, all_after, all_at))
        ends = np.searchsorted(all_at[order], np.arange(len(source)), side="right")
        return all_events[order], ends

    def _of(self, source: Ints, what: str, segment: int) -> Ints:
        table = self._tables[source[segment]]
        found: Ints = getattr(table, what)[table.bases[segment] : table.bases[segment] + table.counts[segment]]
        return found

    def _translated(self, home: int, one: int, other: int, numbers: Ints) -> Ints:
        """What step `one` calls by these numbers, as step `other` does; -1 for what it has not."""
        if one == other:
            return numbers
        key = (home, one, other)
        if key not in self._translations:
            self._translations[key] = self._translation(*key)
        table = self._translations[key]
        return numbers if table is None else table[numbers]

    def _translation(self, home: int, one: int, other: int) -> Ints | None:
        """None where the blocks are the same."""
        sizes = [self._sizes(step, home) for step in (one, other)]
        if np.array_equal(sizes[0], sizes[1]):
            return None
        shared = [self._shared(step, home) for step in (one, other)]
        found = np.full(len(sizes[0]), _NEVER, np.int64)
        free: dict[int, list[int]] = {}
        for number in shared[1].tolist():
            free.setdefault(int(sizes[1][number]), []).append(number)
        for number in shared[0].tolist():
            alike = free.get(int(sizes[0][number]))
            if alike:
                found[number] = alike.pop(0)
        return found

    def _sizes(self, step: int, home: int) -> Ints:
        table = self._tables[step]
        return table.nbytes[table.bases[home] : table.bases[home] + table.counts[home]]

    def _shared(self, step: int, home: int) -> Ints:
        """Numbers of the blocks taken in a segment that others than its own layer give back."""
        table = self._tables[step]
        freed_in = table.freed_in[table.bases[home] : table.bases[home] + table.counts[home]]
        owner = np.where(self._is_outside, -1 - np.arange(len(self.segments)), self._place_of)
        return np.flatnonzero((freed_in != _NEVER) & (owner[freed_in] != owner[home]))


def _table(step: Step) -> _Table:
    part = step.parts
    assert part is not None
    passes = part.passes
    counts = np.array([len(piece.blocks) for _, piece, _ in passes.instances], np.int64)
    bases = np.array([base for _, _, base in passes.instances], np.int64)
    home_of = np.repeat(np.arange(len(counts)), counts)
    freed_in = np.full(passes.num_blocks, _NEVER, np.int64)
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
