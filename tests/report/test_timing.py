"""How times were measured, what disturbed them and why an interval stayed wide: said, and never in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_report import outcome, peaks, report, round_result, workload

from gcbench.core.records import Conditions, Turn
from gcbench.report import stats, timing
from gcbench.report.formats import markdown, terminal
from gcbench.report.rows import rows

QUIET = Conditions(steal_frac=0.0, others_frac=0.01, throttled_frac=0.0, frequency_mhz=2300.0)


def turn(number, wall, *, user=None, faults=10, at=QUIET):
    return Turn(
        number=number,
        step_times_s=(wall,),
        user_s=wall if user is None else user,
        system_s=0.1,
        page_faults=faults,
        conditions=at,
    )


def cell(strategy, turns):
    """A cell whose one process took these turns."""
    times = [turn.step_times_s[0] for turn in turns]
    result = replace(round_result(0, times, memory=peaks(100, 200, 150)), turns=tuple(turns))
    return replace(outcome(strategy), rounds=(result,))


def made(off, other, **settings):
    return report(cell("off", off), cell("per-layer", other), settings={"target_interval": 5.0, **settings})


def said(found):
    return " ".join(timing.paragraphs(found, workload()))


def even(scale, *, count=4, at=QUIET, faults=10):
    return [turn(number, scale * (1 + 0.01 * number), at=at, faults=faults) for number in range(count)]


def test_a_quiet_run_says_how_and_names_no_disturbance():
    text = said(made(even(1.0), even(1.25)))
    assert text.startswith("Timed in 4 rounds") and "ratios of processor time (user)" in text
    assert "disturbed" not in text and "Wider" not in text


def test_without_processor_time_overheads_are_ratios_of_wall_time():
    """The trap: a sentence that promises processor time for a card."""
    gone = [replace(each, user_s=None, system_s=None) for each in even(1.0)]
    text = said(made(gone, even(1.25)))
    assert "Overheads are ratios of wall time." in text and "processor time" not in text


@pytest.mark.parametrize(
    ("at", "faults", "words"),
    [
        (replace(QUIET, others_frac=0.5), 10, "other processes used the processors in 4, up to 50 %"),
        (replace(QUIET, steal_frac=0.3), 10, "other virtual machines used the processors in 4, up to 30 %"),
        (replace(QUIET, throttled_frac=0.2), 10, "the control group's quota stopped the process in 4, up to 20 %"),
        (replace(QUIET, throttle_reasons=("power cap",)), 10, "the card lowered its clocks (power cap) in 4"),
        (QUIET, 100_000, "the process still got new memory in 4"),
        (replace(QUIET, suspended_s=30.0), 10, "the machine was suspended in 4, whose times are not used"),
        (replace(QUIET, clock_step_s=-60.0), 10, "the system's clock was set back in 4, whose times are not used"),
        (replace(QUIET, clock_step_s=60.0), 10, "the system's clock was set forward in 4, whose times are not used"),
    ],
)
def test_each_disturbance_is_counted_and_named(at, faults, words):
    found = made(even(1.0), even(1.25, at=at, faults=faults))
    assert f"4 of 8 turns were disturbed: {words}." in said(found)
    assert [row.num_turns_disturbed for row in rows(found)] == [0, 4]


def test_a_lower_clock_than_in_other_turns_is_noticed():
    slow = replace(QUIET, frequency_mhz=1500.0)
    other = [*even(1.25, count=3), turn(3, 1.25, at=slow)]
    assert "1 of 8 turns was disturbed: the clock frequency was lower than before in 1." in said(made(even(1.0), other))


def test_unknown_conditions_are_no_disturbance():
    """The trap: None compared with a threshold, on systems without /proc."""
    found = made(even(1.0, at=Conditions()), even(1.25, at=Conditions(), faults=None))
    assert "disturbed" not in said(found)


def test_a_suspended_machine_is_noticed_and_not_averaged():
    """A step of an hour is in the report, and in no figure."""
    slept = turn(2, 3600.0, at=replace(QUIET, suspended_s=3599.0))
    found = made(even(1.0, count=5), [*even(1.25, count=2), slept, turn(3, 1.3), turn(4, 1.3)])
    row = rows(found)[1]
    assert row.step_time_s < 2 and row.time_overhead_high_frac < 1
    assert (row.num_turns, row.num_turns_disturbed) == (5, 1)
    assert len(stats.turns(found.outcomes[1].rounds)) == 5


def test_a_wide_interval_is_said_to_be_wide_with_what_would_help():
    scattered = [turn(number, wall, at=replace(QUIET, others_frac=0.4)) for number, wall in enumerate((1, 1.6, 1.1, 2))]
    text = said(made(even(1.0), scattered))
    assert "Wider than ±5 points, as its times scatter: per-layer (±" in text
    assert "To narrow it, end the other processes or raise --max-time (--resume goes on from here)." in text


def test_a_fixed_number_of_rounds_has_no_target_to_miss():
    scattered = [turn(number, wall) for number, wall in enumerate((1, 1.6, 1.1, 2))]
    found = report(cell("off", even(1.0)), cell("per-layer", scattered), settings={"rounds": 4})
    assert "Wider" not in said(found)


def test_reports_from_before_there_were_turns_say_nothing_of_them():
    old = report(
        outcome("off", peaks(1, 2, 3), [[1.0], [1.1], [1.0]]),
        outcome("per-layer", peaks(1, 2, 3), [[1.3], [1.4], [1.3]]),
    )
    assert timing.paragraphs(old, workload()) == ()
    row = rows(old)[1]
    assert row.time_overhead_basis == "wall time" and row.num_turns == 3


def test_screen_and_page_carry_the_sentences():
    found = made(even(1.0), even(1.25))
    assert "Timed in 4 rounds" in terminal.render(found).replace("\n", " ")
    assert "Timed in 4 rounds" in markdown.render(found)
