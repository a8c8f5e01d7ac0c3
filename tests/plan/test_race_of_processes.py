"""The race of `plan --measure` with scripted processes: who takes how many turns, also where not all fit at once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from scripted import FACTS, MACHINE, SETTINGS, SOURCE, WARM, Call, Hangs, Room, ScriptedChildren, Ticker, crash, numbers

from gcbench.job.resolve import begin, resolve
from gcbench.measure.recorder import Recorder
from gcbench.plan import racing
from gcbench.plan.confirm import _race
from gcbench.report.run_folder import Store

NAMES = ("per-layer", "every:2", "every:4")
RACING = replace(SETTINGS, strategies=NAMES, rounds=racing.MOST_ROUNDS)


def raced(tmp_path, speeds: dict[str, float], **given):
    """(children, recorder, number of rounds, strategies not eliminated) of a race; `speeds` are seconds of a step."""
    children = ScriptedChildren(step_s=lambda call: speeds[call[0]], **given)
    job = resolve(RACING, FACTS, MACHINE, model_notices=())
    recorder = Recorder(begin(job, MACHINE, FACTS, "gcbench plan"), Store(tmp_path))

    def watch(call: Call) -> None:
        assert len(children.calls) < 100, "it has no end"

    children.watch = watch
    planned = SimpleNamespace(source_or_raise=SOURCE, settings=SimpleNamespace(timeout=3600.0))
    num_rounds, left = _race(recorder, job, job.cells, planned, children=children, progress=Ticker())
    assert children.running == [] and children.num_opened == children.num_closed
    return children, recorder, num_rounds, {cell.strategy for cell in left}


def test_a_clear_winner_needs_one_round(tmp_path):
    children, recorder, num_rounds, left = raced(tmp_path, {"per-layer": 1.0, "every:2": 2.0, "every:4": 3.0})
    assert (num_rounds, left) == (1, {"per-layer"})
    assert numbers(recorder.report) == {name: [0] for name in NAMES}
    assert children.most_running == 3


def test_what_is_eliminated_takes_no_more_turns(tmp_path):
    _, recorder, num_rounds, left = raced(tmp_path, {"per-layer": 1.0, "every:2": 1.0, "every:4": 3.0})
    assert left == {"per-layer", "every:2"}
    assert num_rounds == len(numbers(recorder.report)["per-layer"]) > 1 == len(numbers(recorder.report)["every:4"])


@pytest.mark.parametrize("fate", [crash(), Hangs()])
def test_one_that_fails_leaves_the_race(tmp_path, fate):
    speeds = dict.fromkeys(NAMES, 1.0)
    _, recorder, num_rounds, left = raced(tmp_path, speeds, fates={("every:2", 1, 1): fate})
    assert left == {"per-layer", "every:4"} and num_rounds > 1
    assert [each.failure is not None for each in recorder.report.outcomes] == [False, True, False]


def test_where_all_fail_the_race_ends(tmp_path):
    _, _, num_rounds, left = raced(
        tmp_path, dict.fromkeys(NAMES, 1.0), fates={(name, 1, WARM): crash() for name in NAMES}
    )
    assert (num_rounds, left) == (0, set())


@pytest.mark.parametrize("room", [Room(bytes=150), None])
def test_without_room_for_two_they_race_in_rounds(tmp_path, room):
    children, recorder, _, left = raced(tmp_path, {"per-layer": 1.0, "every:2": 1.0, "every:4": 3.0}, room=room)
    assert children.most_running == 1 and left == {"per-layer", "every:2"}
    assert all(numbers(recorder.report).values())


@pytest.mark.parametrize("slowest", NAMES)
def test_with_room_for_some_all_of_them_are_measured(tmp_path, slowest):
    """The traps: the winner of the first group wins the race before the others took a turn, and a race without an
    end between cells of two groups, which take no more turns in common."""
    speeds = {name: 3.0 if name == slowest else 1.0 for name in NAMES}
    children, recorder, _, left = raced(tmp_path, speeds, room=Room(bytes=230))
    assert children.most_running == 2
    assert all(numbers(recorder.report).values())
    assert left == set(NAMES) - {slowest}
