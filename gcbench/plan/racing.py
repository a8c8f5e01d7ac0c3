"""Finds the fastest of a few candidates with few measurements, by eliminating those that can no longer win. Pure.

A race in rounds (O. Maron and A. Moore, Hoeffding races, NIPS 1993), with bounds on the logarithm of the ratio to the
leader within a round, so that a slowdown of the whole round cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Generic, TypeVar

from gcbench.plan.decision import Candidate

K = TypeVar("K", bound=Hashable)

MARGIN_FRAC = 0.12
"""Candidates up to this much slower than the best by estimate are measured. Chosen by judgement, before any
measurement. In 787 pairs from `benchmarks/regret.py`, 95 % of rivals were at most 10 % faster than estimated,
against the choice."""
MOST = 5
"""Candidates in a race."""
MOST_ROUNDS = 4
_NOISE = 0.06
"""Standard deviation of the log ratio within a round, assumed for the first two rounds: that of a shared machine.

In the turns of `benchmarks/regret.py` the median over pairs is 0.03 on two idle cores, and 0.10 by processor time (0.5
by wall time) on two cores that up to ten processes share. To assume 0.1 there brings one race more of 72 within 5 % of
the best, for a sixth more steps.
"""
_LEAST_NOISE = 0.01
_BOUND = 1.64
"""Standard errors: each round loses one in twenty winners, one-sided, if the noise is known. From three rounds on it is
estimated from the rounds, and simulations lose 6 % (two candidates) to 10 % (five) in that round."""
AS_FAST = 0.005
"""Relative differences below this do not matter."""


@dataclass(frozen=True, kw_only=True)
class RaceState(Generic[K]):
    """The state of a race after some rounds.

    Attributes:
        still_in: those that could still be the fastest, the leader first.
        is_settled: whether more rounds would not change the choice by more than `AS_FAST`.
    """

    still_in: tuple[K, ...]
    is_settled: bool


def contenders(candidates: Sequence[Candidate], *, margin: float = MARGIN_FRAC, most: int = MOST) -> list[Candidate]:
    """The candidates worth measuring, fastest first: at most `most`, and at most two batches of a strategy."""
    fitting = sorted((each for each in candidates if each.fits), key=lambda each: -each.tokens_per_s)
    if not fitting:
        return []
    best = fitting[0].tokens_per_s
    chosen: list[Candidate] = []
    for each in fitting:
        of_strategy = sum(other.strategy == each.strategy for other in chosen)
        if each.tokens_per_s >= best * (1 - margin) and of_strategy < 2 and len(chosen) < most:
            chosen.append(each)
    return chosen


def state(rates: Mapping[K, Sequence[float]]) -> RaceState[K]:
    """Determine which candidates can still win.

    `rates` maps each candidate to its tokens per second in each round, from the first round on.
    """
    leader = max(rates, key=lambda key: median(rates[key]))
    still_in: list[K] = [leader]
    undecided = False
    for key, own in rates.items():
        if key == leader:
            continue
        ratios = [math.log(mine / its) for mine, its in zip(own, rates[leader], strict=False)]
        centre = fmean(ratios)
        spread = max(stdev(ratios), _LEAST_NOISE) if len(ratios) > 2 else _NOISE
        error = _BOUND * spread / math.sqrt(len(ratios))
        if centre + error >= 0:
            still_in.append(key)
            undecided |= error > AS_FAST
    rounds = min(map(len, rates.values()))
    return RaceState(
        still_in=tuple(sorted(still_in, key=lambda key: -median(rates[key]))),
        is_settled=len(still_in) == 1 or not undecided or rounds >= MOST_ROUNDS,
    )
