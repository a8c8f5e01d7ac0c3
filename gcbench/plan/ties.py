"""Chooses among measured candidates whose speeds may be indistinguishable: then the simplest. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gcbench.core.records import RoundResult
from gcbench.plan.decision import AS_FAST_FRAC, Candidate
from gcbench.report import stats
from gcbench.report.sentences import interval, listed
from gcbench.report.stats import Estimate

Rounds = Mapping[Candidate, Sequence[RoundResult]]
_MOST_NAMES = 3
_LEAST_UNITS = 3
"""Rounds for an interval: two are too few to estimate the spread."""


def against(candidate: Candidate, other: Candidate, rounds: Rounds) -> Estimate | None:
    """Tokens per second of `candidate` over those of `other`, from the rounds they share; None without any."""
    # Seconds of `other` over those of `candidate`, less 1; the batch sizes turn it into a ratio of tokens per second.
    paid = stats.overhead(rounds[other], rounds[candidate])
    if paid is None:
        return None
    more = candidate.batch_size / other.batch_size
    low, high = (paid.interval if paid.num_units >= _LEAST_UNITS else None) or (None, None)
    return Estimate(
        centre=more * (1 + paid.centre),
        low=None if low is None else more * (1 + low),
        high=None if high is None else more * (1 + high),
        num_units=paid.num_units,
    )


def may_be_as_fast(candidate: Candidate, leader: Candidate, rounds: Rounds) -> bool:
    """Whether it is not significantly slower than the leader; without an interval nothing is significant."""
    ratio = against(candidate, leader, rounds)
    if ratio is None or ratio.high is None:
        return True
    return ratio.high >= 1 - AS_FAST_FRAC


def simplest(candidates: Sequence[Candidate]) -> Candidate:
    """The simplest candidate: `off`, else a strategy that every trainer has, else the fewest layers recomputed."""
    return min(candidates, key=lambda each: (*each.rank[:2], -each.tokens_per_s))


def decided(
    candidates: Sequence[Candidate], rounds: Rounds
) -> tuple[Candidate | None, list[Candidate], list[Candidate]]:
    """(the choice, those that are indistinguishable from it, all candidates with their intervals against it).

    The choice is the simplest of those that fit and are indistinguishable from the fastest; None where nothing fits.
    """
    fitting = [each for each in candidates if each.fits]
    if not fitting:
        return None, [], list(candidates)
    leader = max(fitting, key=lambda each: each.tokens_per_s)
    tied = [each for each in fitting if each == leader or may_be_as_fast(each, leader, rounds)]
    return beside(candidates, tied, rounds)


def beside(
    candidates: Sequence[Candidate], tied: Sequence[Candidate], rounds: Rounds
) -> tuple[Candidate, list[Candidate], list[Candidate]]:
    """As `decided`, with the indistinguishable candidates already known."""
    choice = simplest(tied)
    now = {each: each if each == choice else _with_interval(each, choice, rounds) for each in candidates}
    return choice, [now[each] for each in tied if each != choice], list(now.values())


def _with_interval(candidate: Candidate, choice: Candidate, rounds: Rounds) -> Candidate:
    ratio = against(candidate, choice, rounds) if candidate in rounds else None
    return candidate if ratio is None else replace(candidate, frac_low=ratio.low, frac_high=ratio.high)


def sentence(choice: Candidate, others: Sequence[Candidate]) -> str:
    """`off at batch 4 is as fast within the noise as every:2 at batch 4 (−12 to 31 %), and is the simpler one.`"""
    if not others:
        return ""
    named = [_named(each, choice) for each in others[:_MOST_NAMES]]
    if len(others) > _MOST_NAMES:
        named.append(f"{len(others) - _MOST_NAMES} more")
    which = "the simpler one" if len(others) == 1 else "the simplest of them"
    name = f"{choice.strategy} at batch {choice.batch_size}"
    return f"{name} is as fast within the noise as {listed(named)}, and is {which}."


def _named(candidate: Candidate, choice: Candidate) -> str:
    change = interval_of(candidate) or f"{100 * (candidate.tokens_per_s / choice.tokens_per_s - 1):+.0f} %, no interval"
    return f"{candidate.strategy} at batch {candidate.batch_size} ({change.replace('-', '−')})"


def interval_of(candidate: Candidate) -> str | None:
    """`−12 to 31 %`: the change in tokens per second against the choice; None without an interval."""
    if candidate.frac_low is None or candidate.frac_high is None:
        return None
    return interval(candidate.frac_low - 1, candidate.frac_high - 1)
