"""Lays out the events of a whole run: the first step, its optimizer update, and the measured step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gcbench.core.records import PHASES
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.optimizer_step import UpdateTrace

Ints = npt.NDArray[np.int64]


def step_timeline(
    events: Ints,
    nbytes: Ints,
    gradients: Sequence[int],
    *,
    num_blocks: int,
    backward_at: int,
    update_at: int,
    requested: Sequence[int | None],
    update: UpdateTrace,
    accumulated: Sequence[int] | None = None,
) -> Timeline:
    """The first step and the measured one, whose passes have these events.

    Args:
        nbytes: the sizes of the resident blocks, of the passes' blocks, of the update's own, and of the passes' once
            more; with `accumulated` a third time.
        gradients: for each parameter of `update`, the block of its gradient in the passes.
        num_blocks: how many the passes have.
        backward_at: number of the passes' events before the backward pass.
        update_at: number of the passes' events before the update. Those after it follow the update, as a training loop
            holds the loss until the optimizer has stepped.
        requested: for each resident block, the number of the passes' events before its allocation; None if it is never
            requested.
        accumulated: for each gradient, the number of the passes' events after which it is added to the accumulated
            one. If set, the measured step is the last micro-batch of several: it begins with all gradients, and ends
            with the update.
    """
    first_step, first_update = len(requested), len(requested) + num_blocks
    second_step = first_update + len(update.own)
    of_gradients = np.array(gradients, np.int64)

    def update_events(events: Sequence[int], step: int) -> Ints:
        own = first_update + np.arange(len(update.own), dtype=np.int64)
        return _renumbered(events, np.concatenate([of_gradients + step, own]))

    until_update, held = events[:update_at], events[update_at:]
    opening = [
        _with_requests(_shifted(until_update, first_step), requested),
        update_events(update.first, first_step),
        _shifted(held, first_step),
    ]
    settled_at = sum(map(len, opening))
    is_once = are_allocations_of(until_update, persistent_blocks(events, num_blocks, gradients), num_blocks)
    repeated, backward_begins = until_update[~is_once], int(np.count_nonzero(~is_once[:backward_at]))
    passes, held_by_last = _shifted(repeated, second_step), _shifted(held, second_step)
    if accumulated is not None:
        opening += [passes, held_by_last]
        passes = _accumulating(repeated, ~is_once, of_gradients, accumulated, second_step + num_blocks)
        held_by_last = _shifted(held, second_step + num_blocks)
    ending = np.concatenate([update_events(update.later, second_step), held_by_last])
    measured = [passes[:backward_begins], passes[backward_begins:], ending]
    begins = sum(map(len, opening)) + np.cumsum([0, *(len(phase) for phase in measured)])
    return Timeline(
        nbytes=nbytes,
        events=np.concatenate([*opening, *measured]),
        marks=tuple(zip(map(int, begins), PHASES, strict=False)),
        settled_at=(settled_at,),
    )


def persistent_blocks(events: Ints, num_blocks: int, gradients: Sequence[int]) -> Ints:
    """Blocks other than gradients that the passes allocate and never free: later steps use them again."""
    freed = np.zeros(num_blocks, np.bool_)
    freed[~events[events < 0]] = True
    freed[np.array(gradients, np.int64)] = True
    return np.flatnonzero(~freed)


def are_allocations_of(events: Ints, blocks: Ints, num_blocks: int) -> npt.NDArray[np.bool_]:
    """For each event, whether it allocates one of these blocks."""
    is_one = np.zeros(num_blocks + 1, np.bool_)  # the last represents every free
    is_one[blocks] = True
    return is_one[np.where(events >= 0, events, num_blocks)]


def state_blocks(update: UpdateTrace) -> Ints:
    """Blocks of the update that outlive a phase: the optimizer's states."""
    states = set(update.states)
    freed = {~event for event in update.later if event < 0}
    states |= {event for event in update.later if event >= 0 and event not in freed}
    return np.array(sorted(states), np.int64)


def _accumulating(
    repeated: Ints, is_repeated: npt.NDArray[np.bool_], gradients: Ints, accumulated: Sequence[int], step: int
) -> Ints:
    """The repeated events of the passes, numbered from `step` on, which free each gradient once it is accumulated."""
    repeated_before = np.cumsum(is_repeated)
    moments = [int(repeated_before[at - 1]) if at else 0 for at in accumulated]
    return np.insert(_shifted(repeated, step), moments, ~(gradients + step))


def _shifted(events: Ints, step: int) -> Ints:
    """The events with their blocks numbered from `step` on."""
    return events + np.where(events >= 0, step, -step)


def _renumbered(events: Sequence[int], numbers: Ints) -> Ints:
    """The events with block n numbered `numbers[n]`."""
    values = np.array(events, np.int64)
    blocks = numbers[np.where(values >= 0, values, ~values)] if len(values) else values
    return np.where(values >= 0, blocks, ~blocks)


def _with_requests(events: Ints, requested: Sequence[int | None]) -> Ints:
    """The events with the allocations of the resident blocks inserted where they are requested."""
    allocations = [(at, number) for number, at in enumerate(requested) if at is not None]
    return np.insert(events, [at for at, _ in allocations], [number for _, number in allocations])
