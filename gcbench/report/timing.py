"""Says how times were measured, which turns were disturbed and by what, and why an interval stayed wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from gcbench.core.records import Outcome, Report, Turn, Workload
from gcbench.core.units import counted, listed
from gcbench.report import stats
from gcbench.strategies import OFF

_MOST_STEAL, _MOST_OTHERS, _MOST_THROTTLED = 0.02, 0.10, 0.02
"""Shares above which a turn counts as disturbed. What the system itself does in the background stays below."""
_LEAST_CLOCK = 0.9
"""Of the highest clock of the workload's turns."""
_MOST_FAULTS = 5_000
"""Pages that a step in its steady state gets from the kernel, at most: 20 MiB. The first steps of a process get its
memory, 100,000 of them."""


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Something that disturbed turns.

    Attributes:
        what: what it is, in words.
        remedy: what would help; empty where nothing can be done about it.
        share: how much of the time it took, as a fraction; None where it has no amount.
        voids: whether the times of the turn are not used.
    """

    what: str
    remedy: str
    share: float | None = None
    voids: bool = False


def disturbances(turn: Turn, *, highest_mhz: float | None) -> tuple[Disturbance, ...]:
    """Return what disturbed a turn; `highest_mhz` is the highest clock of the workload's turns."""
    at = turn.conditions
    found = []
    if at.suspended_s is not None:
        found.append(Disturbance(what="the machine was suspended", remedy="", voids=True))
    if at.clock_step_s is not None:
        way = "back" if at.clock_step_s < 0 else "forward"
        found.append(Disturbance(what=f"the system's clock was set {way}", remedy="", voids=True))
    for share, most, what, remedy in (
        (at.others_frac, _MOST_OTHERS, "other processes used the processors", "end the other processes"),
        (at.steal_frac, _MOST_STEAL, "other virtual machines used the processors", "run when the host is quieter"),
        (at.throttled_frac, _MOST_THROTTLED, "the control group's quota stopped the process", "raise the quota"),
    ):
        if share is not None and share > most:
            found.append(Disturbance(what=what, remedy=remedy, share=share))
    if at.throttle_reasons:
        reasons = listed(list(at.throttle_reasons))
        found.append(Disturbance(what=f"the card lowered its clocks ({reasons})", remedy="cool it, or cap its clocks"))
    elif at.frequency_mhz is not None and highest_mhz is not None and at.frequency_mhz < _LEAST_CLOCK * highest_mhz:
        found.append(Disturbance(what="the clock frequency was lower than before", remedy="fix the clock frequency"))
    if turn.page_faults is not None and turn.page_faults > _MOST_FAULTS * max(len(turn.step_times_s), 1):
        found.append(Disturbance(what="the process still got new memory", remedy="raise --warmup"))
    return tuple(found)


def num_disturbed(outcome: Outcome) -> int:
    """Return how many turns of a cell were disturbed."""
    return sum(map(bool, _by_turn([outcome])))


def paragraphs(report: Report, workload: Workload) -> tuple[str, ...]:
    """Return the sentences on the times of one workload; none where nothing was timed in turns."""
    cells = [outcome for outcome in report.outcomes if outcome.cell.workload == workload]
    timed = [outcome for outcome in cells if any(result.turns for result in outcome.rounds)]
    if not timed:
        return ()
    by_turn = _by_turn(timed)
    found: dict[str, list[Disturbance]] = {}
    for disturbance in (one for each in by_turn for one in each):
        found.setdefault(disturbance.what, []).append(disturbance)
    text = " ".join(part for part in (_how(timed), _what_disturbed(by_turn, found)) if part)
    return (text, *_wide(report, timed, found))


def _how(timed: Sequence[Outcome]) -> str:
    """How the times were measured, and what the overheads are ratios of."""
    rounds = max(len(stats.turns(outcome.rounds)) for outcome in timed)
    off = next((outcome for outcome in timed if outcome.cell.strategy == OFF), None)
    others = [outcome for outcome in timed if outcome is not off]
    one = "one after another" if len(timed) > 1 else "by itself"
    text = f"Timed in {counted(rounds, 'round')}, in which each setting took its steps {one}"
    bases = {stats.overhead_basis(outcome.rounds, off.rounds) for outcome in others} if off else set()
    if stats.PROCESSOR_TIME in bases:
        return (
            f"{text}. Overheads are ratios of processor time (user), which leaves out what other processes take; step "
            "times are wall time."
        )
    return f"{text}. Overheads are ratios of wall time." if bases - {None} else f"{text}. Step times are wall time."


def _what_disturbed(by_turn: Sequence[tuple[Disturbance, ...]], found: Mapping[str, Sequence[Disturbance]]) -> str:
    """How many turns were disturbed, and by what, the most frequent first."""
    if not found:
        return ""
    parts = []
    for what, each in sorted(found.items(), key=lambda item: -len(item[1])):
        shares = [one.share for one in each if one.share is not None]
        amount = f", up to {100 * max(shares):.0f} %" if shares else ""
        dropped = ", whose times are not used" if any(one.voids for one in each) else ""
        parts.append(f"{what} in {len(each)}{amount}{dropped}")
    disturbed = sum(map(bool, by_turn))
    verb = "was" if disturbed == 1 else "were"
    return f"{disturbed} of {counted(len(by_turn), 'turn')} {verb} disturbed: {listed(parts)}."


def _wide(report: Report, timed: Sequence[Outcome], found: Mapping[str, Sequence[Disturbance]]) -> tuple[str, ...]:
    """A sentence for intervals that stayed wider than the target, with the reason and what would help."""
    target = report.settings.get("target_interval")
    off = next((outcome for outcome in timed if outcome.cell.strategy == OFF), None)
    if not isinstance(target, (int, float)) or off is None:
        return ()
    wide = []
    for outcome in timed:
        overhead = None if outcome is off else stats.overhead(outcome.rounds, off.rounds)
        if overhead is not None and overhead.interval is not None and 100 * overhead.half_width > target:
            wide.append(f"{outcome.cell.strategy} (±{100 * overhead.half_width:.0f} points)")
    if not wide:
        return ()
    remedies = list(
        dict.fromkeys(one.remedy for each in found.values() for one in each if one.remedy and not one.voids)
    )
    reason = "its times scatter" if len(wide) == 1 else "their times scatter"
    help_ = listed([*remedies, "raise --max-time"]).replace(" and ", " or ")
    return (
        f"Wider than ±{target:g} points, as {reason}: {listed(wide)}. To narrow "
        f"{'it' if len(wide) == 1 else 'them'}, {help_} (--resume goes on from here).",
    )


def _by_turn(timed: Sequence[Outcome]) -> list[tuple[Disturbance, ...]]:
    """What disturbed each turn of some cells."""
    highest = _highest_mhz(timed)
    return [disturbances(turn, highest_mhz=highest) for outcome in timed for turn in stats.turns(outcome.rounds)]


def _highest_mhz(timed: Sequence[Outcome]) -> float | None:
    """The clock that a workload's turns usually have at best: the median of their upper half."""
    clocks = sorted(
        turn.conditions.frequency_mhz
        for outcome in timed
        for turn in stats.turns(outcome.rounds)
        if turn.conditions.frequency_mhz is not None
    )
    return median(clocks[len(clocks) // 2 :]) if clocks else None
