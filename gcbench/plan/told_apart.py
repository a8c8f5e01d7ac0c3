"""Which of several measured settings are told apart in speed, and which of those that are not is taken. Pure."""

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
"""Rounds for an interval: two say nothing of how far apart rounds lie."""


def against(candidate: Candidate, other: Candidate, rounds: Rounds) -> Estimate | None:
    """Its tokens per second over those of `other`, by the rounds that both ran in; None without any."""
    # Seconds of `other` over those of `candidate`, less 1; a sequence more a step counts for the candidate.
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
    """Whether it is not shown to be slower than the leader; too few rounds for an interval show nothing."""
    ratio = against(candidate, leader, rounds)
    if ratio is None or ratio.high is None:
        return True
    return ratio.high >= 1 - AS_FAST_FRAC


def simplest(candidates: Sequence[Candidate]) -> Candidate:
    """Of settings that are not told apart: `off` first, then what every trainer has, then the fewest layers."""
    return min(candidates, key=lambda each: (*each.rank[:2], -each.tokens_per_s))


def decided(
    candidates: Sequence[Candidate], rounds: Rounds
) -> tuple[Candidate | None, list[Candidate], list[Candidate]]:
    """(the choice, the others that it is not told apart from, all candidates with their intervals against it).

    The choice is the simplest of those that fit and are not told apart from the fastest; None where nothing fits.
    """
    fitting = [each for each in candidates if each.fits]
    if not fitting:
        return None, [], list(candidates)
    leader = max(fitting, key=lambda each: each.tokens_per_s)
    alike = [each for each in fitting if each == leader or may_be_as_fast(each, leader, rounds)]
    return beside(candidates, alike, rounds)


def beside(
    candidates: Sequence[Candidate], alike: Sequence[Candidate], rounds: Rounds
) -> tuple[Candidate, list[Candidate], list[Candidate]]:
    """The same, where it is known which are not told apart."""
    choice = simplest(alike)
    now = {each: each if each == choice else _with_interval(each, choice, rounds) for each in candidates}
    return choice, [now[each] for each in alike if each != choice], list(now.values())


def _with_interval(candidate: Candidate, choice: Candidate, rounds: Rounds) -> Candidate:
    ratio = against(candidate, choice, rounds) if candidate in rounds else None
    return candidate if ratio is None else replace(candidate, frac_low=ratio.low, frac_high=ratio.high)


def sentence(choice: Candidate, others: Sequence[Candidate]) -> str:
    """`off at batch 4 is not told apart from every:2 at batch 4 (−12 to 31 %), and is the simplest of them.`"""
    if not others:
        return ""
    named = [_named(each, choice) for each in others[:_MOST_NAMES]]
    if len(others) > _MOST_NAMES:
        named.append(f"{len(others) - _MOST_NAMES} more")
    which = "the simpler one" if len(others) == 1 else "the simplest of them"
    return f"{choice.strategy} at batch {choice.batch_size} is not told apart from {listed(named)}, and is {which}."


def _named(candidate: Candidate, choice: Candidate) -> str:
    told = interval_of(candidate) or f"{100 * (candidate.tokens_per_s / choice.tokens_per_s - 1):+.0f} %, no interval"
    return f"{candidate.strategy} at batch {candidate.batch_size} ({told.replace('-', '−')})"


def interval_of(candidate: Candidate) -> str | None:
    """`−12 to 31 %`: its tokens per second against the choice's; None where there is no interval."""
    if candidate.frac_low is None or candidate.frac_high is None:
        return None
    return interval(candidate.frac_low - 1, candidate.frac_high - 1)
