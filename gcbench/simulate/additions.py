"""What a real run may add to a step: gradient accumulation, and a loop that keeps the model's outputs. No torch.

Neither is part of gcbench's own step, which has one micro-batch and keeps the loss alone. Each is replayed: the same
blocks, with those that are there besides.
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
"""Of the peak; what adds less is not named."""


def additions(step: Step, weighed: Callable[[Timeline], tuple[int, Peak]], now: Peak) -> tuple[Addition, ...]:
    """What would add at least 0.5 % to what tensors take at a step's peak.

    Args:
        weighed: (bytes that count against the device's memory, the peak) of a step.
        now: the peak of the step as it is.
    """
    lines = {ACCUMULATION: accumulating(step), KEPT_OUTPUTS: with_outputs(step.assembly)}
    allocated = now.memory.allocated_bytes
    found = []
    for name, line in lines.items():
        if line is None:
            continue
        held, peak = weighed(line)
        more = peak.memory.allocated_bytes - allocated
        if more > _WORTH_NAMING * allocated:
            found.append(Addition(name=name, nbytes=more, peak_bytes=held))
    return tuple(found)


def accumulating(step: Step) -> Timeline:
    """The last of several micro-batches: all gradients are there when it begins, and its own are added to them."""
    return step.accumulating() or _in_full(step.assembly)


def _in_full(assembly: Assembly) -> Timeline:
    """The same where it is not known when a gradient is complete: its own block goes with the event after it came."""
    line = assembly.timeline
    begin = line.marks[0][0]
    of_gradients = np.flatnonzero(assembly.kinds == Kind.GRADIENTS)
    taken = np.isin(line.events[begin:], of_gradients)
    gradients = line.events[begin:][taken]
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
    """The step while the logits of the one before are in a variable; None where the model makes none.

    `outputs = model(…)` holds them until the next call has returned: all through the step.
    """
    line = assembly.timeline
    begin, backward = line.marks[0][0], line.marks[1][0]
    forward = line.events[begin:backward]
    taken = forward[forward >= 0]
    logits = taken[assembly.kinds[taken] == Kind.LOGITS]
    if not len(logits):
        return None
    return replace(
        line,
        nbytes=np.append(line.nbytes, line.nbytes[logits[0]]),
        events=np.insert(line.events, begin, len(line.nbytes)),
        marks=tuple((at + 1, phase) for at, phase in line.marks),
    )
