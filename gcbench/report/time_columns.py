"""The columns of a row about time, and what they are for a prediction."""

from __future__ import annotations

from dataclasses import dataclass

from gcbench.core import step_time
from gcbench.core.step_time import StepTime


@dataclass(frozen=True, kw_only=True)
class TimeColumns:
    """The columns of `Row` about time, which are all unknown where no step was timed and none predicted."""

    step_time_s: float | None = None
    step_time_low_s: float | None = None
    step_time_high_s: float | None = None
    tokens_per_s: float | None = None
    time_overhead_frac: float | None = None
    time_overhead_low_frac: float | None = None
    time_overhead_high_frac: float | None = None
    time_source: str | None = None
    time_overhead_basis: str | None = None
    num_turns: int | None = None


def predicted(time: StepTime, off: StepTime | None, *, tokens_per_step: int) -> TimeColumns:
    """Return the columns of a predicted time, with its band; `off` is the predicted time that the overhead is of."""
    overhead = None if off is None else step_time.overhead(time, off)
    return TimeColumns(
        step_time_s=time.seconds,
        step_time_low_s=time.low_s,
        step_time_high_s=time.high_s,
        tokens_per_s=tokens_per_step / time.seconds,
        time_overhead_frac=overhead.frac if overhead else None,
        time_overhead_low_frac=overhead.low_frac if overhead else None,
        time_overhead_high_frac=overhead.high_frac if overhead else None,
        time_source=time.source,
    )
