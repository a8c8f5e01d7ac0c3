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
BY_PROCESSOR = (
    "Settings are compared by processor time (user), which leaves out what other processes take. The tokens/s of the "
    "choice are wall time; those of the other measured settings follow from them by the ratios of processor time."
)


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


def simplest(candidates: Sequence[Candidate], rounds: Rounds | None = None) -> Candidate:
    """The simplest candidate: `off`, else a strategy that every trainer has, else the fewest layers recomputed.

    Of equally simple ones, which differ in the batch size, the fastest.
    """
    speed = _speeds(candidates, rounds or {})
    return min(candidates, key=lambda each: (*each.rank[:2], -speed[each]))


def fastest(candidates: Sequence[Candidate], rounds: Rounds) -> Candidate:
    """The candidate with the most tokens per second, by processor time where the rounds have it."""
    speed = _speeds(candidates, rounds)
    return max(candidates, key=speed.__getitem__)


def _speeds(candidates: Sequence[Candidate], rounds: Rounds) -> dict[Candidate, float]:
    """Tokens per second: by wall time, or in proportion to the ratios of processor time to one of them."""
    one = candidates[0]
    if not all(_is_by_processor(each, one, rounds) for each in candidates):
        return {each: each.tokens_per_s for each in candidates}
    ratios = {each: against(each, one, rounds) for each in candidates}
    return {each: 0.0 if ratio is None else ratio.centre for each, ratio in ratios.items()}


def _is_by_processor(candidate: Candidate, other: Candidate, rounds: Rounds) -> bool:
    if candidate not in rounds or other not in rounds:
        return False
    return stats.overhead_basis(rounds[other], rounds[candidate]) == stats.PROCESSOR_TIME


def basis(choice: Candidate, candidates: Sequence[Candidate], rounds: Rounds) -> tuple[str, ...]:
    """A notice where candidates were compared by processor time."""
    if not any(each != choice and _is_by_processor(each, choice, rounds) for each in candidates):
        return ()
    return (BY_PROCESSOR,)


def decided(
    candidates: Sequence[Candidate], rounds: Rounds
) -> tuple[Candidate | None, list[Candidate], list[Candidate]]:
    """(the choice, those that are indistinguishable from it, all candidates with their intervals against it).

    The choice is the simplest of those that fit and are indistinguishable from the fastest; None where nothing fits.
    """
    fitting = [each for each in candidates if each.fits]
    if not fitting:
        return None, [], list(candidates)
    leader = fastest(fitting, rounds)
    tied = [each for each in fitting if each == leader or may_be_as_fast(each, leader, rounds)]
    return beside(candidates, tied, rounds)


def beside(
    candidates: Sequence[Candidate], tied: Sequence[Candidate], rounds: Rounds
) -> tuple[Candidate, list[Candidate], list[Candidate]]:
    """As `decided`, with the indistinguishable candidates already known.

    Where candidates are compared by processor time, the speeds of the others are put in proportion to the choice's.
    """
    choice = simplest(tied, rounds)
    now = {each: each if each == choice else _with_interval(each, choice, rounds) for each in candidates}
    return choice, [now[each] for each in tied if each != choice], list(now.values())


def _with_interval(candidate: Candidate, choice: Candidate, rounds: Rounds) -> Candidate:
    ratio = against(candidate, choice, rounds) if candidate in rounds else None
    if ratio is None:
        return candidate
    now = replace(candidate, frac_low=ratio.low, frac_high=ratio.high)
    if not _is_by_processor(candidate, choice, rounds):
        return now
    tokens = candidate.step_time_s * candidate.tokens_per_s
    rate = choice.tokens_per_s * ratio.centre
    return replace(now, tokens_per_s=rate, step_time_s=tokens / rate, tokens_per_s_low=None, tokens_per_s_high=None)


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
