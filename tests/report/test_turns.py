"""Overheads of cells that took turns: which turns pair, which cannot be used, and what the ratio is of."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fixtures_report import outcome, peaks, report, round_result

from gcbench.core.json_codec import decode, encode
from gcbench.core.records import Conditions, Report, RoundResult, Turn
from gcbench.report import stats
from gcbench.report.rows import rows

SUSPENDED = Conditions(suspended_s=3600.0)
SET_BACK = Conditions(clock_step_s=-3600.0)
BUSY = Conditions(steal_frac=0.5, others_frac=0.4, throttled_frac=0.3)


def turn(number: int, *seconds: float, user: float | None = None, at: Conditions = Conditions()) -> Turn:  # noqa: B008
    return Turn(number=number, step_times_s=seconds, user_s=user, system_s=None if user is None else 0.0, conditions=at)


def process(number: int, *turns: Turn) -> RoundResult:
    times = [seconds for each in turns for seconds in each.step_times_s]
    return replace(round_result(number, times), turns=turns)


def even(count: int, seconds: float, **at: object) -> tuple[Turn, ...]:
    return tuple(turn(number, seconds, **at) for number in range(count))


# Pairs


def test_turns_pair_by_number_and_not_by_place():
    """The trap: a cell without turn 1, whose turn 2 is compared with turn 1 of `off`, taken on a busier machine."""
    off = [process(0, turn(0, 1.0), turn(1, 10.0), turn(2, 2.0), turn(3, 3.0))]
    mine = [process(0, turn(0, 1.5), turn(2, 3.0), turn(3, 4.5))]
    found = stats.overhead(mine, off)
    assert found.num_units == 3
    assert found.centre == found.low == found.high == pytest.approx(0.5)


def test_turns_pair_across_processes():
    """A resumed run has a second process, whose turns go on counting."""
    off = [process(1, turn(2, 4.0), turn(3, 8.0)), process(0, turn(0, 1.0), turn(1, 2.0))]
    mine = [process(0, turn(0, 2.0)), process(1, turn(1, 4.0)), process(2, turn(2, 8.0), turn(3, 16.0))]
    found = stats.overhead(mine, off)
    assert (found.num_units, found.centre) == (4, pytest.approx(1.0))


def test_numbers_on_one_side_only_are_ignored():
    off, mine = [process(0, *even(3, 1.0))], [process(0, turn(7, 9.0), turn(2, 1.2), turn(8, 9.0))]
    found = stats.overhead(mine, off)
    assert (found.num_units, found.centre) == (1, pytest.approx(0.2))
    assert stats.overhead([process(0, turn(7, 9.0))], off) is None
    assert stats.overhead_basis([process(0, turn(7, 9.0))], off) is None


def test_a_process_that_took_no_turn_counts_for_nothing():
    """One that a resumed run had warmed up before it was interrupted again."""
    off = [process(0, *even(3, 1.0))]
    mine = [process(0, *even(2, 1.5)), process(1), process(2, turn(2, 1.5))]
    assert stats.overhead(mine, off).num_units == 3
    assert len(stats.turns(mine)) == len(stats.units(mine)) == 3


def test_reports_from_before_there_were_turns_pair_by_round():
    """The trap: a stored report without overheads, or with its rounds in another order."""
    off = [round_result(number, (seconds,)) for number, seconds in ((2, 4.0), (0, 1.0), (1, 2.0))]
    mine = [round_result(number, (seconds,)) for number, seconds in ((0, 1.5), (1, 3.0), (2, 6.0))]
    found = stats.overhead(mine, off)
    assert (found.num_units, found.centre) == (3, pytest.approx(0.5))
    assert stats.overhead_basis(mine, off) == stats.WALL_TIME
    assert stats.units(off) == (1.0, 2.0, 4.0)


def test_a_report_from_before_there_were_turns_can_be_read():
    before = report(
        outcome("off", peaks(1, 2, 3), ((1.0,), (2.0,), (4.0,))),
        outcome("per-layer", peaks(1, 2, 3), ((1.5,), (3.0,), (6.0,))),
    )
    document = encode(before)
    for each in document["outcomes"]:
        for result in each["rounds"]:
            del result["turns"]
    again = decode(Report, document)
    assert again == before
    assert {row.strategy: row.time_overhead_frac for row in rows(again)}["per-layer"] == pytest.approx(0.5)


def test_a_continued_report_pairs_old_rounds_and_new_turns():
    off = [round_result(0, (1.0,)), round_result(1, (2.0,)), process(2, turn(2, 4.0))]
    mine = [round_result(0, (1.5,)), round_result(1, (3.0,)), process(2, turn(2, 6.0))]
    assert stats.overhead(mine, off).num_units == 3


# What the ratio is of


def test_on_a_processor_it_is_of_the_processes_own_time():
    """The trap: wall times, of which another machine took half in one turn and not in the next."""
    off = [process(0, turn(0, 1.0, user=2.0), turn(1, 5.0, user=2.0), turn(2, 1.0, user=2.0))]
    mine = [process(0, turn(0, 9.0, user=3.0), turn(1, 1.5, user=3.0), turn(2, 1.5, user=3.0))]
    found = stats.overhead(mine, off)
    assert stats.overhead_basis(mine, off) == stats.PROCESSOR_TIME
    assert found.centre == found.low == found.high == pytest.approx(0.5)
    assert stats.step_time(mine).centre == 1.5, "the step time itself stays what a clock shows"


def test_processor_time_is_per_step():
    """Turns go on until their steps have taken long enough, so that a faster cell has more steps in one."""
    off = [process(0, *(turn(number, 1.0, 1.0, 1.0, 1.0, user=4.0) for number in range(3)))]
    mine = [process(0, *(turn(number, 1.5, 1.5, user=3.0) for number in range(3)))]
    assert stats.overhead(mine, off).centre == pytest.approx(0.5)


@pytest.mark.parametrize("missing", [None, 0.0])
def test_where_one_turn_has_no_processor_time_all_pairs_are_of_wall_time(missing):
    """The traps: a median of ratios of two kinds, and a division by a processor time of nothing."""
    off = [process(0, *even(3, 1.0, user=4.0))]
    mine = [process(0, turn(0, 1.5, user=4.0), turn(1, 1.5, user=missing), turn(2, 1.5, user=4.0))]
    assert stats.overhead_basis(mine, off) == stats.WALL_TIME
    assert stats.overhead(mine, off).centre == pytest.approx(0.5)
    assert stats.overhead_basis(off, mine) == stats.WALL_TIME


def test_a_turn_that_pairs_with_none_does_not_decide_what_the_ratio_is_of():
    off = [process(0, *even(3, 1.0, user=4.0))]
    mine = [process(0, *even(3, 1.5, user=6.0), turn(9, 1.5))]
    assert stats.overhead_basis(mine, off) == stats.PROCESSOR_TIME


# Turns that cannot be used


@pytest.mark.parametrize("at", [SUSPENDED, SET_BACK])
@pytest.mark.parametrize("side", ["mine", "off"])
def test_a_turn_with_a_suspended_machine_or_a_clock_that_was_set_is_no_pair(at, side):
    spoilt = {"mine": Conditions(), "off": Conditions(), side: at}
    off = [process(0, turn(0, 1.0), turn(1, 500.0 if side == "off" else 1.0, at=spoilt["off"]), *even(4, 1.0)[2:])]
    mine = [process(0, turn(0, 1.5), turn(1, 700.0 if side == "mine" else 1.5, at=spoilt["mine"]), *even(4, 1.5)[2:])]
    found = stats.overhead(mine, off)
    assert found.num_units == 3
    assert found.centre == found.low == found.high == pytest.approx(0.5)
    assert not stats.is_valid(turn(0, 1.0, at=at)) and stats.is_valid(turn(0, 1.0))
    assert max(stats.units(mine)) == 1.5 and max(stats.units(off)) == 1.0


def test_a_busy_or_throttled_machine_spoils_no_turn():
    """The trap: measurements left out because they are slow, which makes every figure look better than it is."""
    mine = [process(0, *even(4, 1.5, at=BUSY))]
    assert all(map(stats.is_valid, mine[0].turns)) and len(stats.units(mine)) == 4
    assert stats.overhead(mine, [process(0, *even(4, 1.0))]).num_units == 4


def test_what_cannot_be_used_stays_in_the_report():
    """Nothing is dropped: it is stored with its conditions, and shown without being part of a figure."""
    spoilt = outcome("per-layer", peaks(1, 2, 3))
    turns = (*even(4, 1.5), turn(4, 900.0, at=SUSPENDED))
    first = replace(process(0, *turns), memory=peaks(1, 2, 3))
    off = replace(process(0, *even(5, 1.0)), memory=peaks(2, 3, 4))
    made = report(replace(outcome("off"), rounds=(off,)), replace(spoilt, rounds=(first,)))
    again = decode(Report, encode(made))
    assert again == made
    assert again.outcomes[1].rounds[0].turns[4].conditions.suspended_s == 3600.0
    row = {row.strategy: row for row in rows(again)}["per-layer"]
    assert row.step_time_s == 1.5 and row.step_time_high_s < 2 and row.time_overhead_frac == pytest.approx(0.5)


def test_a_cell_whose_turns_all_cannot_be_used_has_no_time():
    mine = [process(0, *even(3, 900.0, at=SUSPENDED))]
    assert stats.step_time(mine) is None and stats.overhead(mine, [process(0, *even(3, 1.0))]) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_machine_that_slows_down_for_both_changes_no_overhead(seed):
    """Random slowdowns of whole turns, some of which cannot be used: the overhead is the one that was put in."""
    draw = random.Random(seed)
    true, off, mine = draw.uniform(0.0, 1.0), [], []
    for number in range(draw.randint(3, 12)):
        slower = draw.lognormvariate(0, 0.5)
        spoilt = draw.choice([Conditions(), Conditions(), Conditions(), SUSPENDED, SET_BACK])
        factor = 100.0 if spoilt in (SUSPENDED, SET_BACK) else 1.0
        off.append(turn(number, slower, user=2 * slower))
        mine.append(turn(number, slower * (1 + true) * factor, user=2 * slower * (1 + true) * factor, at=spoilt))
    draw.shuffle(mine)
    found = stats.overhead([process(0, *mine)], [process(0, *off)])
    num_valid = sum(map(stats.is_valid, mine))
    assert (found is None) == (num_valid == 0)
    if found is not None:
        assert found.num_units == num_valid and found.centre == pytest.approx(true)
