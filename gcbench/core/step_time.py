"""The record of a predicted step time, and the bands around it and around its overhead.

A band is where a measurement is expected, not a confidence interval. Its width comes from the errors of predictions
against measurements: for cards, against published steps and gcbench's own (benchmarks/published_times.py prints which
share of them the bands contain), for this machine, against the steps of benchmarks/regret.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Basis = Literal["card", "this machine"]
"""Whether the times are those of a card's kernels, or of this very machine's processor."""


@dataclass(frozen=True, kw_only=True)
class _Errors:
    """How far measurements may be from predictions.

    Attributes:
        low, high: a measured step time over the predicted one.
        overhead, overhead_of: of an overhead, in fractions of the step of `off`: so much, and so much of itself. The
            errors of two steps cancel out in part, so this is less than `low` and `high` give.
    """

    low: float
    high: float
    overhead: float
    overhead_of: float


_ERRORS: dict[Basis, _Errors] = {
    # Of 85 published and own steps on six cards, measured over predicted is within this in 94 %.
    "card": _Errors(low=0.80, high=1.25, overhead=0.02, overhead_of=0.25),
    # 341 steps of small models on a CPU (results/reference/regret-cpu-amd-epyc.json): 0.93 to 1.15 in nine of ten,
    # and of 30 overheads of per-layer 27 within this.
    "this machine": _Errors(low=0.90, high=1.17, overhead=0.02, overhead_of=0.10),
}
_WAITING_LOW, _WAITING_HIGH, _WAITING_OVERHEAD = 0.3, 0.75, 0.5
"""By how much bands widen where the device waits for Python all the time: half to double the time of a processor."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The predicted time of one training step.

    Attributes:
        waiting_frac: the share of the step in which the device waits for Python to launch kernels, from 0 to 1.
        source: where the times of its operators come from, in words.
    """

    seconds: float
    basis: Basis
    source: str
    waiting_frac: float = 0.0

    @property
    def low_s(self) -> float:
        """The lower end of its band."""
        return self.seconds * (_ERRORS[self.basis].low - _WAITING_LOW * self.waiting_frac)

    @property
    def high_s(self) -> float:
        """The upper end of its band."""
        return self.seconds * (_ERRORS[self.basis].high + _WAITING_HIGH * self.waiting_frac)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Additional time relative to a step of `off`, with its band; all fractions."""

    frac: float
    low_frac: float
    high_frac: float


def overhead(step: StepTime, off: StepTime) -> Overhead:
    """The predicted overhead of a step relative to that of `off`."""
    frac = step.seconds / off.seconds - 1
    if step == off:
        return Overhead(frac=0.0, low_frac=0.0, high_frac=0.0)
    errors = _ERRORS[step.basis]
    waiting = max(step.waiting_frac, off.waiting_frac)
    side = errors.overhead + errors.overhead_of * abs(frac) + _WAITING_OVERHEAD * waiting
    return Overhead(frac=frac, low_frac=frac - side, high_frac=frac + side)
