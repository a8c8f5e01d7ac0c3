"""Computes centres, 95 % intervals and ratios of step times, with the standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from gcbench.core.records import RoundResult, Turn

CONFIDENCE = 0.95
_UPPER_TAIL = 0.5 + CONFIDENCE / 2
MIN_ROUNDS = 3
"""Fewer rounds give no interval. With two, Student's t has one degree of freedom: where rounds scatter by 6 %, half of
the intervals reach beyond 44 %, one in twenty beyond 190 % and one in twenty not beyond 3.5 %, and an overhead of 30 %
is detected in 36 % of the runs. With three, it is detected in 94 %, and these figures are 13, 30 and 3.4 %."""
_MIN_ORDER_STATISTICS = 6
"""With six units, the smallest and the largest enclose the median with 1 - 2/2^6 = 96.9 %; with five, 93.75 %."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A centre with its 95 % interval, in the unit of the values.

    Attributes:
        low, high: the interval, which contains the centre; both None with fewer than `MIN_ROUNDS` units.
        num_units: number of independent values.
    """

    centre: float
    low: float | None
    high: float | None
    num_units: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, or None when there is no interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def half_width(self) -> float:
        """Half the width of the interval; infinite when there is none."""
        return math.inf if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    def minus(self, offset: float) -> Estimate:
        """Return the estimate shifted down by `offset`."""
        low, high = self.interval or (None, None)
        return Estimate(
            centre=self.centre - offset,
            low=None if low is None else low - offset,
            high=None if high is None else high - offset,
            num_units=self.num_units,
        )


def turns(rounds: Sequence[RoundResult]) -> tuple[Turn, ...]:
    """Return all turns of a cell; each process of a report from before there were turns counts as one."""
    return tuple(
        turn
        for result in sorted(rounds, key=lambda result: result.round)
        for turn in (result.turns or (Turn(number=result.round, step_times_s=result.step_times_s),))
        if turn.step_times_s
    )


def is_valid(turn: Turn) -> bool:
    """Return whether a turn's times can be used: the machine was not suspended, nor its clock set, meanwhile."""
    return turn.conditions.suspended_s is None and turn.conditions.clock_step_s is None


def _valid_turns(rounds: Sequence[RoundResult]) -> list[Turn]:
    return [turn for turn in turns(rounds) if is_valid(turn)]


def units(rounds: Sequence[RoundResult]) -> tuple[float, ...]:
    """Return the seconds per step of each valid turn: the median of its steps."""
    return tuple(statistics.median(turn.step_times_s) for turn in _valid_turns(rounds))


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the median of positive, independent values and its 95 % interval; None without values.

    With six or more values the interval consists of order statistics and assumes nothing about the distribution
    (H. A. David and H. N. Nagaraja, Order Statistics, 3rd ed., 2003, section 7.1). With three to five it is Student's t
    interval of the mean logarithm, exponentiated, which assumes lognormal noise, and is widened to include the median.
    With fewer there is none: see `MIN_ROUNDS`.
    """
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    centre = statistics.median(ordered)
    if n < MIN_ROUNDS:
        return Estimate(centre=centre, low=None, high=None, num_units=n)
    if n >= _MIN_ORDER_STATISTICS:
        rank = median_rank(n)
        low, high = ordered[rank - 1], ordered[n - rank]
    else:
        logs = [math.log(value) for value in ordered]
        half = t_quantile(_UPPER_TAIL, n - 1) * statistics.stdev(logs) / math.sqrt(n)
        low, high = _around(statistics.fmean(logs), half)
    return Estimate(centre=centre, low=min(low, centre), high=max(high, centre), num_units=n)


def step_time(rounds: Sequence[RoundResult]) -> Estimate | None:
    """Return seconds per step over the rounds; None when nothing was timed."""
    return estimate(units(rounds))


PROCESSOR_TIME, WALL_TIME = "processor time", "wall time"
"""What an overhead is a ratio of."""


def overhead_basis(rounds: Sequence[RoundResult], off: Sequence[RoundResult]) -> str | None:
    """Return what `overhead` is a ratio of: processor time where every pair of turns has it; None without pairs."""
    pairs = _pairs(rounds, off)
    return _basis(turn for pair in pairs for turn in pair) if pairs else None


def _basis(used: Iterable[Turn]) -> str:
    """Processor time where all of the turns have it."""
    return PROCESSOR_TIME if all(turn.user_s for turn in used) else WALL_TIME


def overhead(rounds: Sequence[RoundResult], off: Sequence[RoundResult]) -> Estimate | None:
    """Return the time overhead relative to `off`, as a fraction of its time, with its 95 % interval.

    Ratios are formed within a turn, whose steps ran one after the other, so a drift of the machine over the run cancels
    out. On a CPU they are ratios of processor time (user), which does not count what other processes and other virtual
    machines take; on a GPU, of wall time. Turns taken on one side only are ignored, and those in which the machine was
    suspended or its clock set. None when no turn is common.
    """
    pairs = _pairs(rounds, off)
    of_processor = overhead_basis(rounds, off) == PROCESSOR_TIME
    ratio = estimate([_step_s(mine, of_processor) / _step_s(theirs, of_processor) for mine, theirs in pairs])
    return ratio.minus(1) if ratio else None


def _pairs(rounds: Sequence[RoundResult], off: Sequence[RoundResult]) -> list[tuple[Turn, Turn]]:
    """The turns of both with the same number, in order."""
    mine, theirs = ({turn.number: turn for turn in _valid_turns(each)} for each in (rounds, off))
    return [(mine[number], theirs[number]) for number in sorted(mine.keys() & theirs.keys())]


def _step_s(turn: Turn, of_processor: bool) -> float:
    """Seconds of a step: the mean of processor time, or the median of wall time."""
    return (processor_step_s(turn) if of_processor else None) or statistics.median(turn.step_times_s)


def processor_step_s(turn: Turn) -> float | None:
    """Return the processor time of a step, the mean of its turn, which its clock covers; None where there is none."""
    return turn.user_s / len(turn.step_times_s) if turn.user_s else None


_BETWEEN_PROCESSES = 0.01
"""Standard deviation between processes that do the same, as a fraction of their time: each has a memory layout of its
own, which its turns share. User time of `off` in eight processes of gpt2 (benchmarks/repeatability.py has more)."""


def change_basis(before: Sequence[RoundResult], after: Sequence[RoundResult]) -> str | None:
    """Return what `change` compares: processor time where all turns of both have it; None where a side has no times."""
    sides = [_valid_turns(rounds) for rounds in (before, after)]
    return _basis(turn for side in sides for turn in side) if all(sides) else None


def change(before: Sequence[RoundResult], after: Sequence[RoundResult]) -> Estimate | None:
    """Return by which fraction a step takes longer in `after`, a run independent of `before`, with its 95 % interval.

    It compares `change_basis`. The centre is the ratio of the medians. The interval is Welch's for the difference of
    the mean logarithms (B. L. Welch, Biometrika 34, 1947, 28-35), with the variance between processes added where turns
    share one, and widened to include the centre; None with fewer than `MIN_ROUNDS` units on a side. `num_units` counts
    the smaller side. None when a side has no times.
    """
    basis = change_basis(before, after)
    if basis is None:
        return None
    a, b = ([_step_s(turn, basis == PROCESSOR_TIME) for turn in _valid_turns(rounds)] for rounds in (before, after))
    centre = statistics.median(b) / statistics.median(a)
    num_units = min(len(a), len(b))
    if num_units < MIN_ROUNDS:
        return Estimate(centre=centre, low=None, high=None, num_units=num_units).minus(1)
    log_a, log_b = [math.log(value) for value in a], [math.log(value) for value in b]
    part_a, part_b = statistics.variance(log_a) / len(a), statistics.variance(log_b) / len(b)
    variance = part_a + part_b + _between(before) + _between(after)
    half = 0.0
    if variance > 0:
        spread = part_a**2 / (len(a) - 1) + part_b**2 / (len(b) - 1)
        df = variance**2 / spread if spread > 0 else _MOST_DF
        half = t_quantile(_UPPER_TAIL, min(df, _MOST_DF)) * math.sqrt(variance)
    low, high = _around(statistics.fmean(log_b) - statistics.fmean(log_a), half)
    return Estimate(centre=centre, low=min(low, centre), high=max(high, centre), num_units=num_units).minus(1)


_MOST_DF = 1e6
"""Degrees of freedom from which on Student's distribution is the normal one."""


def _between(rounds: Sequence[RoundResult]) -> float:
    """The variance that a cell's mean has between processes; 0 where each process is one unit, which shows it."""
    shared = [result for result in rounds if len(result.turns) > 1]
    return _BETWEEN_PROCESSES**2 / len([result for result in rounds if result.turns]) if shared else 0.0


@cache
def median_rank(n: int) -> int:
    """Return the largest r for which the r-th smallest and r-th largest of n values enclose the median with 95 %.

    The number of values below the median is binomial(n, 1/2), so the coverage is 1 - 2 P(binomial < r), exactly.
    Raises ValueError for n < 6, where even the extremes do not suffice.
    """
    if n < _MIN_ORDER_STATISTICS:
        raise ValueError(f"{n} values cannot enclose the median with 95 %; it takes {_MIN_ORDER_STATISTICS}")
    rank, outside = 1, 1
    while 2 * (outside + math.comb(n, rank)) <= (1 - CONFIDENCE) * 2**n:
        outside += math.comb(n, rank)
        rank += 1
    return rank


@cache
def t_quantile(probability: float, df: float) -> float:
    """Return the t below which Student's distribution has `probability` (0.5 to under 1); `df` need not be whole.

    Found by bisection on the distribution function to the last bit; agrees with the table of the NIST/SEMATECH
    e-Handbook, section 1.3.6.7.2.
    """
    low, high = 0.0, 1.0
    while _t_upper_tail(high, df) > 1 - probability:
        low, high = high, high * 2
    while low < (middle := (low + high) / 2) < high:
        if _t_upper_tail(middle, df) > 1 - probability:
            low = middle
        else:
            high = middle
    return high


def _t_upper_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0: half the incomplete beta I_x(df/2, 1/2) at x = df/(df + t^2) (DLMF 8.17, Student's t)."""
    return 0.5 * _incomplete_beta(df / (df + t * t), df / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised I_x(a, b) by its continued fraction, DLMF 8.17.22, evaluated with Lentz's method."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    tiny = 1e-300
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        previous = fraction
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(fraction - previous) <= 1e-16 * abs(fraction):
            break
    return math.exp(log_front) * fraction / a


def _around(log_centre: float, half: float) -> tuple[float, float]:
    """Return the interval of a logarithm, exponentiated."""
    return math.exp(log_centre - half), math.exp(log_centre + half)
