"""Which of a few settings is the fastest, found with few measurements: those that cannot win any more drop out. Pure.

A race in rounds (O. Maron and A. Moore, Hoeffding races, NIPS 1993), with bounds on the logarithm of the ratio to the
leader within a round, so that what slows a whole round down cancels out.
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
"""How far an estimate may be behind the best one and still win. Chosen by judgement, before any measurement.
In 787 pairs from `benchmarks/regret.py`, 95 % of rivals were at most 10 % faster than estimated, against the choice."""
MOST = 5
"""Contenders."""
MOST_ROUNDS = 4
_NOISE = 0.06
"""Of the logarithm of a ratio within a round, before it can be told from the rounds: what a shared machine has."""
_LEAST_NOISE = 0.01
_BOUND = 1.64
"""Standard errors: one in twenty winners is lost at a look, on one side, where the noise is known. From three rounds on
it is taken from the rounds themselves, and simulations lose 6 % (two contenders) to 10 % (five) at that look."""
AS_FAST = 0.005


@dataclass(frozen=True, kw_only=True)
class Standing(Generic[K]):
    """Where a race is.

    Attributes:
        still_in: those that could still be the fastest, the leader first.
        is_settled: whether more rounds would change nothing worth having.
    """

    still_in: tuple[K, ...]
    is_settled: bool


def contenders(candidates: Sequence[Candidate], *, margin: float = MARGIN_FRAC, most: int = MOST) -> list[Candidate]:
    """The candidates that could be the best, the most promising first: of a strategy at most its two best batches."""
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


def standing(rates: Mapping[K, Sequence[float]]) -> Standing[K]:
    """Who is still in after some rounds.

    `rates` has for each contender its tokens per second, one for each round that it ran in, the first rounds first.
    """
    leader = max(rates, key=lambda key: median(rates[key]))
    kept: list[K] = [leader]
    undecided = False
    for key, own in rates.items():
        if key == leader:
            continue
        ratios = [math.log(mine / its) for mine, its in zip(own, rates[leader], strict=False)]
        centre = fmean(ratios)
        spread = max(stdev(ratios), _LEAST_NOISE) if len(ratios) > 2 else _NOISE
        error = _BOUND * spread / math.sqrt(len(ratios))
        if centre + error >= 0:
            kept.append(key)
            undecided |= error > AS_FAST
    rounds = min(map(len, rates.values()))
    return Standing(
        still_in=tuple(sorted(kept, key=lambda key: -median(rates[key]))),
        is_settled=len(kept) == 1 or not undecided or rounds >= MOST_ROUNDS,
    )
