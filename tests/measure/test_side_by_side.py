"""Cells that take turns step by step: in which order, what a bad turn costs, and what happens without room."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from scripted import (
    FOUR,
    MACHINE,
    OUT_OF_MEMORY,
    WARM,
    Call,
    Hangs,
    Room,
    ScriptedChildren,
    Silent,
    Ticker,
    all_ended,
    crash,
    go,
    num_pairs,
    numbers,
    turns,
)

from gcbench.core.records import Failure, Report
from gcbench.measure import runner
from gcbench.processes.messages import Answer
from gcbench.report import report_file as reports
from gcbench.report import stats

ORDER = FOUR.strategies


def order(children: ScriptedChildren) -> list[list[str]]:
    """Which strategies took each turn, in order; one after another also where their numbers differ."""
    found: list[list[str]] = []
    last: object = None
    for strategy, _, turn in children.calls:
        if turn != last:
            found.append([])
        last = turn
        if turn != WARM:
            found[-1].append(strategy)
    return [each for each in found if each]


def failures(report: Report) -> dict[str, str]:
    return {each.cell.strategy: each.failure.kind for each in report.outcomes if each.failure}


# Order


@pytest.mark.parametrize("num_rounds", [1, 2, 5])
def test_turns_go_there_and_back(tmp_path, num_rounds):
    """The trap: always the same order, where a machine that slows down steadily slows the last cell down most."""
    children = ScriptedChildren()
    go(tmp_path, children, replace(FOUR, rounds=num_rounds))
    assert order(children) == [list(ORDER if number % 2 == 0 else ORDER[::-1]) for number in range(num_rounds)]
    assert all_ended(children)


def test_a_steady_drift_cancels_out(tmp_path):
    """What going there and back is for: each pair of turns has the same time in its middle."""
    children = ScriptedChildren()
    children.step_s = lambda call: 0.1 * (1 + 0.01 * children.clock.now)
    report = go(tmp_path, children, replace(FOUR, rounds=6))
    off = report.outcomes[0].rounds
    for outcome in report.outcomes[1:]:
        found = stats.overhead(outcome.rounds, off)
        assert abs(found.centre) < 0.0005, found


def test_all_live_at_once_and_none_begins_a_turn_before_all_are_warm(tmp_path):
    children = ScriptedChildren()
    go(tmp_path, children, FOUR)
    assert [call[2] for call in children.calls[:5]] == [WARM, WARM, WARM, WARM, 0]
    assert children.most_running == 4 and all_ended(children)


# A turn that goes wrong


@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize("kind", ["crash", "killed", "unsupported"])
@pytest.mark.parametrize("victim", ["off", "every:2", "every:4"])
def test_a_process_that_dies_in_its_turn_costs_its_row_only(tmp_path, victim, kind, turn):
    """The others keep their turns and take the rest; what the victim measured before stays."""
    children = ScriptedChildren(fates={(victim, 1, turn): crash(kind)})
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {victim: kind}
    assert turns(report) == {name: [[0, 1, 2] if name != victim else list(range(turn))] for name in ORDER}
    assert [call for call in children.calls if call[0] == victim][-1] == (victim, 1, turn), "told to go on after it"
    assert all_ended(children)
    assert reports.load(tmp_path) == report


def test_one_that_does_not_warm_up_costs_its_row_only(tmp_path):
    children = ScriptedChildren(fates={("per-layer", 1, WARM): crash(), ("off", 1, WARM): crash("unsupported")})
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {"off": "unsupported", "per-layer": "crash"}
    assert turns(report) == {"off": [], "per-layer": [], "every:2": [[0, 1, 2]], "every:4": [[0, 1, 2]]}
    assert all_ended(children)


def test_where_all_die_the_run_ends(tmp_path):
    """The trap: rounds without anybody in them, for ever."""
    children = ScriptedChildren(fates={(name, 1, 1): crash() for name in ORDER})
    for settings in (FOUR, replace(FOUR, rounds=None, max_time=None)):
        folder = tmp_path / str(settings.rounds)
        folder.mkdir()
        report = go(folder, children, settings)
        assert failures(report) == dict.fromkeys(ORDER, "crash")
    assert all_ended(children)


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.1, 60), (2.0, 80), (20.0, 800)])
def test_a_turn_that_hangs_is_stopped_and_the_others_go_on(tmp_path, step_s, limit_s):
    """The limit is twenty times the longest turn (of two steps), and a minute at least: short steps vary more."""
    children = ScriptedChildren(fates={("per-layer", 1, 1): Hangs()}, step_s=lambda call: step_s)
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {"per-layer": "timeout"}
    message = next(each.failure.message for each in report.outcomes if each.failure)
    assert "a step was still running after" in message and "20 times the longest turn" in message
    assert turns(report)["per-layer"] == [[0]] and turns(report)["every:4"] == [[0, 1, 2]]
    # Four warm up, three take three turns, one takes one, each for two steps.
    assert children.clock.now == pytest.approx(2 * step_s * (4 + 9 + 1) + limit_s)
    assert all_ended(children)


def test_a_slow_turn_that_comes_back_is_kept(tmp_path):
    """The trap: a limit at so many times a usual turn, on a machine that is busy for a minute."""
    children = ScriptedChildren(step_s=lambda call: 29.0 if call == ("every:2", 1, 1) else 0.1)
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {}
    assert turns(report) == {name: [[0, 1, 2]] for name in ORDER}


def test_a_process_has_its_timeout_in_all_of_its_turns_together(tmp_path):
    """The trap: `still running after` what was left of the time, where `--timeout` is what the user can raise."""
    children = ScriptedChildren(fates={("per-layer", 1, 1): Hangs()}, step_s=lambda call: 1.0)
    report = go(tmp_path, children, replace(FOUR, timeout=10.0))
    failed = next(each.failure for each in report.outcomes if each.failure)
    assert failed.kind == "timeout" and "after 10.0 s" in failed.message and "--timeout" in failed.message
    # Warming up and turn 0 took two seconds each; the others, with three turns, stay below their own ten.
    assert children.clock.now == pytest.approx(2 * (4 + 9 + 1) + 10 - 4)
    assert turns(report) == {name: [[0, 1, 2] if name != "per-layer" else [0]] for name in ORDER}


def test_warming_up_for_too_long_is_a_row(tmp_path):
    children = ScriptedChildren(fates={("per-layer", 1, WARM): Hangs()})
    report = go(tmp_path, children, replace(FOUR, timeout=10.0))
    assert failures(report) == {"per-layer": "timeout"}
    assert all_ended(children)


def test_without_a_limit_the_script_itself_says_that_a_child_hangs(tmp_path):
    """This file's own alarm: a child that hangs where nothing would stop it ends the test."""
    with pytest.raises(Silent):
        go(tmp_path, ScriptedChildren(fates={("off", 1, WARM): Hangs()}), replace(FOUR, timeout=None))


# Memory


def test_without_room_for_two_cells_run_in_rounds(tmp_path):
    """One at a time, with off in each round, and turn numbers that pair; the report says so, once."""
    children, ticker = ScriptedChildren(room=Room(bytes=150)), Ticker()
    report = go(tmp_path, children, FOUR, progress=ticker)
    assert children.most_running == 1 and all_ended(children)
    assert num_pairs(report) == {"per-layer": 3, "every:2": 3, "every:4": 3}
    assert report.notices.count(runner.IN_ROUNDS) == 1
    assert reports.load(tmp_path) == report
    again = go(tmp_path, ScriptedChildren(room=Room(bytes=150)), replace(FOUR, rounds=4), previous=report)
    assert again.notices.count(runner.IN_ROUNDS) == 1
    assert num_pairs(again) == {"per-layer": 4, "every:2": 4, "every:4": 4}


def test_a_device_that_does_not_know_its_memory_runs_in_rounds(tmp_path):
    """The trap: one more process than fits, on a device that nobody can ask."""
    children = ScriptedChildren(room=None)
    report = go(tmp_path, children, FOUR)
    assert children.most_running == 1
    assert num_pairs(report) == {"per-layer": 3, "every:2": 3, "every:4": 3}
    assert runner.IN_ROUNDS in report.notices


def test_rounds_go_there_and_back_too(tmp_path):
    children = ScriptedChildren(room=Room(bytes=150))
    go(tmp_path, children, FOUR)
    taken = [[call[0] for call in children.calls if call[2] == turn] for turn in range(3)]
    assert taken == [list(ORDER), list(ORDER[::-1]), list(ORDER)]


def test_with_room_for_some_they_live_in_groups_with_off(tmp_path):
    """The traps: a group without `off`, and one whose turns have no turn of `off` beside them."""
    children = ScriptedChildren(room=Room(bytes=230))
    alive: list[set[str]] = []
    children.watch = lambda call: alive.append({child.strategy for child in children.running})
    report = go(tmp_path, children, FOUR)
    assert children.most_running == 2 and all_ended(children)
    assert [call for call in children.calls if call[0] == "off" and call[2] == WARM] == [("off", 1, WARM)]
    assert all("off" in each for each in alive)
    assert num_pairs(report) == {"per-layer": 3, "every:2": 3, "every:4": 3}
    assert runner.IN_ROUNDS not in report.notices
    assert turns(report)["off"] == [list(range(9))]


def test_memory_of_one_that_died_is_free_again(tmp_path):
    """The trap: the next group finds no room and everything runs in rounds."""
    children = ScriptedChildren(room=Room(bytes=230), fates={("per-layer", 1, 1): crash()})
    report = go(tmp_path, children, FOUR)
    assert runner.IN_ROUNDS not in report.notices
    assert num_pairs(report) == {"per-layer": 1, "every:2": 3, "every:4": 3}


@pytest.mark.parametrize(("extra", "in_rounds"), [(750, False), (850, True)])
def test_what_runs_out_of_memory_beside_others_is_tried_again(tmp_path, extra, in_rounds):
    """First beside `off` alone, then in rounds. The trap: `oom` in the row of a cell that fits into the memory."""
    children = ScriptedChildren(room=Room(bytes=1000, extra={("every:2", 1, WARM): extra}))
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {}
    assert num_pairs(report) == {"per-layer": 3, "every:2": 3, "every:4": 3}
    assert (runner.IN_ROUNDS in report.notices) == in_rounds
    assert all_ended(children)


@pytest.mark.parametrize("victim", ["off", "every:2"])
@pytest.mark.parametrize("turn", [0, 2])
def test_what_runs_out_of_memory_in_its_turn_is_tried_alone(tmp_path, victim, turn):
    children = ScriptedChildren(room=Room(bytes=1000, extra={(victim, 1, turn): 650}))
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {}
    assert num_pairs(report) == {"per-layer": 3, "every:2": 3, "every:4": 3}
    assert runner.IN_ROUNDS in report.notices
    assert all_ended(children)


@pytest.mark.parametrize("good_turns", [None, 0, 1])
def test_what_runs_out_of_memory_alone_too_is_a_row(tmp_path, good_turns):
    """And it ends: nothing is tried for ever. `None`: it does not even warm up."""
    bad = {("every:2", 1, turn): OUT_OF_MEMORY for turn in range(good_turns or 0, 9)}
    if good_turns is None:
        bad["every:2", 1, WARM] = OUT_OF_MEMORY
    children = ScriptedChildren(fates=bad)
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {"every:2": "oom"}
    assert numbers(report)["every:2"] == list(range(good_turns or 0))
    assert {"per-layer": 3, "every:4": 3}.items() <= num_pairs(report).items()
    assert all_ended(children)


def test_off_alone_that_does_not_fit_is_a_row_and_the_others_go_on(tmp_path):
    children = ScriptedChildren(room=Room(bytes=350, needs={"off": 400}))
    report = go(tmp_path, children, FOUR)
    assert failures(report) == {"off": "oom"}
    assert {name: len(each) for name, each in numbers(report).items()} == {
        **dict.fromkeys(ORDER, 3),
        "off": 0,
    }
    assert all_ended(children)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_cell_has_its_pairs_or_a_reason(tmp_path, seed):
    """Random memory, sizes, deaths and hangs: the run ends, each cell has all its turns or a failure, none is lost."""
    draw = random.Random(seed)
    needs = {name: draw.choice([50, 100, 300, 600]) for name in ORDER}
    room = Room(
        bytes=draw.choice([280, 700, 1000, 3000]),
        needs=needs,
        extra={(draw.choice(ORDER), 1, draw.choice([WARM, 0, 1, 2])): draw.choice([0, 200, 500])},
    )
    fates: dict[Call, Answer | Hangs] = {}
    for _ in range(draw.choice([0, 1, 2])):
        fates[draw.choice(ORDER), 1, draw.choice([WARM, 0, 1, 2, 5])] = draw.choice([crash(), Hangs(), OUT_OF_MEMORY])
    children = ScriptedChildren(room=room, fates=fates, step_s=lambda call: draw.uniform(0.05, 3.0))
    report = go(tmp_path, children, replace(FOUR, timeout=3600.0))
    assert all_ended(children)
    failed, pairs, taken = failures(report), num_pairs(report), numbers(report)
    for name in ORDER:
        assert name in failed or len(taken[name]) >= 3, (taken, failed)
        assert name in failed or "off" in failed or name == "off" or pairs[name] >= 3, (taken, failed)
        assert taken[name] == sorted(set(taken[name])), "a number twice, which pairs with another turn"
        assert (
            failed.get(name) != "oom"
            or needs[name] + max(room.extra.values()) > room.bytes
            or any(fate == OUT_OF_MEMORY for call, fate in fates.items() if call[0] == name)
        ), "it would have fit"
    assert reports.load(tmp_path) == report


# What is stored


def test_on_a_card_there_is_no_processor_time(tmp_path):
    """So overheads are ratios of wall times there."""
    card = replace(MACHINE, device="cuda:0", device_name="A card")
    on_card, on_cpu = (go(folder, ScriptedChildren(machine=machine), FOUR) for folder, machine in _two(tmp_path, card))
    assert stats.overhead_basis(on_card.outcomes[1].rounds, on_card.outcomes[0].rounds) == stats.WALL_TIME
    assert stats.overhead_basis(on_cpu.outcomes[1].rounds, on_cpu.outcomes[0].rounds) == stats.PROCESSOR_TIME


def _two(tmp_path, card):
    for name in ("card", "cpu"):
        (tmp_path / name).mkdir()
    return ((tmp_path / "card", card), (tmp_path / "cpu", MACHINE))


def test_a_failure_has_the_output_of_its_process(tmp_path):
    answer = Answer(failure=Failure(kind="crash", message="it fell over", detail="the last words"))
    report = go(tmp_path, ScriptedChildren(fates={("per-layer", 1, 1): answer}), FOUR)
    assert report.outcomes[1].failure.detail == "the last words"
    hung = go(tmp_path, ScriptedChildren(fates={("per-layer", 1, 1): Hangs()}), FOUR)
    assert hung.outcomes[1].failure.detail == "its log"
