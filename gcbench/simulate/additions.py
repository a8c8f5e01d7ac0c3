"""What a real run may add to a step: gradient accumulation, and a loop that holds the model's outputs. No torch.

Neither is part of gcbench's own step, which has one micro-batch and holds the loss alone. Each is replayed: the same
blocks, and those that are added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gcbench.core.prediction import ACCUMULATION, KEPT_OUTPUTS, Addition
from gcbench.simulate.compose.block_kinds import Kind
from gcbench.simulate.compose.whole_step import Assembly
from gcbench.simulate.predictor import Step
from gcbench.simulate.timeline import Peak, Timeline

_WORTH_NAMING = 0.005
"""Share of the peak below which an addition is not named."""


def additions(step: Step, peak_of: Callable[[Timeline], tuple[int, Peak]], now: Peak) -> tuple[Addition, ...]:
    """Find what would add more than 0.5 % to the allocated peak of a step.

    Args:
        peak_of: (bytes that count against the device's memory, the peak) of a step.
        now: the peak of the step without additions.
    """
    lines = {ACCUMULATION: accumulating(step), KEPT_OUTPUTS: with_outputs(step.assembly)}
    allocated = now.memory.allocated_bytes
    named = []
    for name, line in lines.items():
        if line is None:
            continue
        counted, peak = peak_of(line)
        more = peak.memory.allocated_bytes - allocated
        if more > _WORTH_NAMING * allocated:
            named.append(Addition(name=name, nbytes=more, peak_bytes=counted))
    return tuple(named)


def accumulating(step: Step) -> Timeline:
    """The last of several micro-batches: it begins with all gradients allocated, and its own are added to them."""
    return step.accumulating() or _in_full(step.assembly)


def _in_full(assembly: Assembly) -> Timeline:
    """Accumulate in a step traced in full, where it is not known when a gradient is complete.

    A gradient of the micro-batch is freed one event after its allocation.
    """
    line = assembly.timeline
    begin = line.marks[0][0]
    of_gradients = np.flatnonzero(assembly.kinds == Kind.GRADIENTS)
    gradients = line.events[begin:][np.isin(line.events[begin:], of_gradients)]
    copies = len(line.nbytes) + np.arange(len(gradients))
    copy_of = dict(zip(gradients.tolist(), copies.tolist(), strict=True))
    events: list[int] = line.events[:begin].tolist() + copies.tolist()
    marks = dict.fromkeys((at for at, _ in line.marks), 0)
    waiting: list[int] = []
    for place, event in enumerate(line.events[begin:].tolist(), start=begin):
        if place in marks:
            marks[place] = len(events)
        block = event if event >= 0 else ~event
        events.append(~copy_of[block] if event < 0 and block in copy_of else event)
        events.extend(waiting)
        waiting = [~event] if event in copy_of else []
    return replace(
        line,
        nbytes=np.concatenate([line.nbytes, line.nbytes[gradients]]),
        events=np.array(events, np.int64),
        marks=tuple((marks[at], phase) for at, phase in line.marks),
    )


def with_outputs(assembly: Assembly) -> Timeline | None:
    """The step while a variable holds the logits of the one before; None if the model computes none.

    `outputs = model(…)` holds them until the next call has returned: throughout the step.
    """
    line = assembly.timeline
    begin, backward = line.marks[0][0], line.marks[1][0]
    forward = line.events[begin:backward]
    allocations = forward[forward >= 0]
    logits = allocations[assembly.kinds[allocations] == Kind.LOGITS]
    if not len(logits):
        return None
    return replace(
        line,
        nbytes=np.append(line.nbytes, line.nbytes[logits[0]]),
        events=np.insert(line.events, begin, len(line.nbytes)),
        marks=tuple((at + 1, phase) for at, phase in line.marks),
    )
