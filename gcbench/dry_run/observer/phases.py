"""Splits a script's run into steps and phases, from the events that PyTorch reports, and keeps the peaks of each.

A step ends with its optimizers' steps. What happens between two events belongs to the phase before it, with two
exceptions: what precedes the optimizer after a backward pass, such as clipping gradients, belongs to the optimizer; and
what is allocated after it, such as the next batch, belongs to what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .peaks import Peak

START, FORWARD, BACKWARD, OPTIMIZER, EVALUATION, SAVE = (
    "start",
    "forward",
    "backward",
    "optimizer",
    "evaluation",
    "save",
)
_OF_A_STEP = (FORWARD, BACKWARD, OPTIMIZER)
MOST_LISTED_STEPS = 200


class Meter(Protocol):
    """Reads the peaks since it was last asked."""

    def take(self) -> dict[int, Peak]:
        """Return card -> peak allocated and reserved bytes."""


def raise_to(peaks: dict[str, list[int]], phase: str, peak: Peak) -> None:
    """Raise the phase's peak to this one."""
    known = peaks.get(phase, [0, 0])
    peaks[phase] = [max(known[0], peak[0]), max(known[1], peak[1])]


@dataclass
class Step:
    """One step so far: its peaks by phase, backward passes, and checkpointed calls.

    Attributes:
        checkpointed, recomputed: calls of `torch.utils.checkpoint.checkpoint`, and those of them whose function ran
            again.
        layers_checkpointed, layers_recomputed: the modules among them, each counted once.
    """

    number: int
    peaks: dict[str, list[int]] = field(default_factory=dict)
    backwards: int = 0
    checkpointed: int = 0
    recomputed: int = 0
    layers_checkpointed: set[int] = field(default_factory=set)
    layers_recomputed: set[int] = field(default_factory=set)

    @property
    def peak(self) -> list[int]:
        """Peak allocated and reserved bytes over all phases."""
        values = list(self.peaks.values()) or [[0, 0]]
        return [max(value[0] for value in values), max(value[1] for value in values)]

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "peaks": self.peaks,
            "backwards": self.backwards,
            "checkpointed": self.checkpointed,
            "recomputed": self.recomputed,
            "layers_checkpointed": len(self.layers_checkpointed),
            "layers_recomputed": len(self.layers_recomputed),
        }


class Phases:
    """The run so far.

    Args:
        meter: reads the peaks since it was last asked.
        on_step: is called after each finished step.
    """

    def __init__(self, meter: Meter, on_step: Callable[[], object] = lambda: None) -> None:
        self._meter = meter
        self._on_step = on_step
        self._optimizer_ran = False
        self._backward_depth = 0
        self._optimizer_depth = 0
        self._gap_start: dict[int, Peak] | None = None
        self.phase = START
        self.step = Step(number=1)
        self.num_steps = 0
        self.first: Step | None = None
        self.highest_later: Step | None = None
        self.later_peaks: dict[str, list[int]] = {}
        self.listed: list[list[int]] = []
        self.outside: dict[str, list[int]] = {}
        self.by_card: dict[int, list[int]] = {}
        self.evaluations = 0

    @property
    def done_steps(self) -> int:
        """Finished steps: one whose optimizer has run counts before the next begins."""
        return self.num_steps + (1 if self._optimizer_ran else 0)

    @property
    def is_recomputing(self) -> bool:
        """Whether a backward pass is running."""
        return self._backward_depth > 0

    def forward_begins(self, *, with_gradients: bool) -> None:
        """Note that an outermost module is called, outside a backward pass."""
        if self._backward_depth:
            return
        if not with_gradients:
            if self.phase != EVALUATION:
                self.evaluations += 1
            self._enter(EVALUATION)
            return
        self._finish_step()
        self._enter(FORWARD)

    def backward_begins(self) -> None:
        """Note the beginning of a backward pass, possibly within another."""
        self._backward_depth += 1
        if self._backward_depth == 1:
            self._finish_step()
            if self.phase != FORWARD:
                self._enter(FORWARD)  # a loss that no module computed
            self._enter(BACKWARD)
            self.step.backwards += 1

    def backward_ends(self) -> None:
        """Note the end of a backward pass, however it ended."""
        self._backward_depth -= 1
        if self._backward_depth == 0:
            self.measure()

    def optimizer_begins(self) -> None:
        """Note an optimizer's step, which may run within the backward pass."""
        self._optimizer_depth += 1
        if self._backward_depth:
            self.measure()
            return
        # What ran since the backward pass was for the optimizer; `backward_ends` has taken the pass's own peak.
        self.phase = OPTIMIZER
        self.measure()

    def optimizer_ends(self) -> None:
        """Note the end of an optimizer's step; others may follow in the same step."""
        self._optimizer_depth = max(0, self._optimizer_depth - 1)
        if self._backward_depth:
            self._fold(OPTIMIZER)
        else:
            self._enter(OPTIMIZER)
            self._gap_start = self._meter.take()  # what is held now, as nothing has happened since
        self._optimizer_ran = True
        if not self._backward_depth:
            self._on_step()

    def save_begins(self) -> str:
        """Note that a file is written, and return the phase to go back to."""
        before = self.phase
        self._enter(SAVE)
        return before

    def save_ends(self, before: str) -> None:
        """Note that the file is written."""
        self.measure()
        self.phase = before

    def measure(self) -> None:
        """Read the peaks since the last event, for the phase that is running."""
        self._fold(self.phase)

    def _enter(self, phase: str) -> None:
        if self._gap_start is None:
            self.measure()
            self.phase = phase
        else:
            self.phase = phase
            self._fold_gap(phase)

    def _fold_gap(self, phase: str) -> None:
        """Count what has been allocated since the optimizer for the phase that follows; if nothing was, nothing."""
        before, self._gap_start = self._gap_start or {}, None
        taken = self._meter.take()
        self._keep(phase, {card: peak for card, peak in taken.items() if peak != before.get(card)})

    def _fold(self, phase: str) -> None:
        self._gap_start = None
        self._keep(phase, self._meter.take())

    def _keep(self, phase: str, peaks: dict[int, Peak]) -> None:
        if not peaks:
            return
        highest = (0, 0)
        for card, peak in peaks.items():
            known = self.by_card.get(card, [0, 0])
            self.by_card[card] = [max(known[0], peak[0]), max(known[1], peak[1])]
            highest = max(highest[0], peak[0]), max(highest[1], peak[1])
        raise_to(self.step.peaks if phase in _OF_A_STEP else self.outside, phase, highest)

    def _finish_step(self) -> None:
        """Close the step whose optimizer has run, at the beginning of the next."""
        if not self._optimizer_ran:
            return
        if self._gap_start is None:
            self.measure()
        self._optimizer_ran = False
        self.phase = FORWARD
        step, self.step = self.step, Step(number=self.step.number + 1)
        self.num_steps += 1
        if self.first is None:
            self.first = step
        else:
            if self.highest_later is None or step.peak > self.highest_later.peak:
                self.highest_later = step
            for phase, peak in step.peaks.items():
                raise_to(self.later_peaks, phase, (peak[0], peak[1]))
        if len(self.listed) < MOST_LISTED_STEPS:
            self.listed.append(step.peak)

    def as_json(self) -> dict[str, Any]:
        """Return the record so far, with the running step as an unfinished one."""
        first, later, peaks, listed, count = (
            self.first,
            self.highest_later,
            dict(self.later_peaks),
            list(self.listed),
            self.num_steps,
        )
        unfinished: Step | None = self.step
        if self._optimizer_ran:  # it is complete but for what follows it
            count += 1
            listed += [self.step.peak] if len(listed) < MOST_LISTED_STEPS else []
            unfinished = None
            if first is None:
                first = self.step
            else:
                if later is None or self.step.peak > later.peak:
                    later = self.step
                for phase, peak in self.step.peaks.items():
                    raise_to(peaks, phase, (peak[0], peak[1]))
        has_begun = unfinished is not None and bool(unfinished.peaks)
        return {
            "num_steps": count,
            "first": None if first is None else first.as_json(),
            "later": None if later is None else later.as_json(),
            "later_peaks": peaks,
            "unfinished": unfinished.as_json() if has_begun and unfinished is not None else None,
            "listed": listed,
            "outside": self.outside,
            "by_card": {str(card): peak for card, peak in self.by_card.items()},
            "evaluations": self.evaluations,
        }
