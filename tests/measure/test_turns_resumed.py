"""Runs that are interrupted and go on: nothing measured is lost, and nothing is measured again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import FOUR, WARM, Call, Room, ScriptedChildren, all_ended, go, num_pairs, numbers, turns

from gcbench.core.records import Report, RoundResult
from gcbench.report import report_file as reports

ROOMS = {"all": (10**6, 4 + 4 * 3), "groups": (230, 4 + 3 * 2 * 3), "rounds": (150, 1 + 4 * 3)}
"""Bytes, and how many calls a run makes there."""


@pytest.mark.parametrize(
    ("kind", "at"), [(kind, at) for kind, (_, num_calls) in ROOMS.items() for at in range(num_calls)]
)
def test_an_interruption_at_any_moment_loses_one_turn_and_leaves_no_process(tmp_path, kind, at):
    """What was stored before the call that is interrupted is stored after it, and a resumed run completes it."""
    room = Room(bytes=ROOMS[kind][0])
    stored: list[Report] = []

    def interrupt(call: Call) -> None:
        stored.append(reports.load(tmp_path))
        if len(stored) > at:
            raise KeyboardInterrupt

    interrupted = ScriptedChildren(watch=interrupt, room=room)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, interrupted, FOUR)
    assert all_ended(interrupted)
    kept = reports.load(tmp_path)
    assert kept == stored[-1]
    assert sum(map(len, numbers(kept).values())) == sum(call[2] != WARM for call in interrupted.calls)

    resumed = go(tmp_path, ScriptedChildren(room=room), FOUR, previous=kept)
    assert num_pairs(resumed) == {"per-layer": 3, "every:2": 3, "every:4": 3}
    for old, new in zip(kept.outcomes, resumed.outcomes, strict=True):
        assert new.rounds[: len(old.rounds)] == old.rounds
        assert [result.memory is not None for result in new.rounds] == [True] + [False] * (len(new.rounds) - 1)
        assert [result.round for result in new.rounds] == list(range(len(new.rounds)))
    done = ScriptedChildren(room=room)
    assert go(tmp_path, done, FOUR, previous=resumed) == resumed
    assert done.num_opened == 0


def test_a_resumed_run_starts_only_what_lacks_turns(tmp_path):
    """The trap: minutes of warming up for a cell that takes no turn, and an empty process in the report."""
    two = replace(FOUR, strategies=("off", "per-layer", "every:2"))

    def interrupt(call: Call) -> None:
        if call == ("every:2", 1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, ScriptedChildren(watch=interrupt), two)
    children = ScriptedChildren()
    report = go(tmp_path, children, two, previous=reports.load(tmp_path))
    assert [task.cell.strategy for task in children.tasks] == ["off", "every:2"]
    assert turns(report) == {"off": [[0, 1, 2], [3]], "per-layer": [[0, 1, 2]], "every:2": [[0, 1], [3]]}


def test_a_run_from_before_there_were_turns_is_continued(tmp_path):
    """The trap: its rounds count as none, and new turns get the numbers of old rounds and replace them in pairs."""
    now = go(tmp_path, ScriptedChildren(), replace(FOUR, rounds=2))
    old = replace(now, outcomes=tuple(replace(each, rounds=_as_before(each.rounds[0])) for each in now.outcomes))
    children = ScriptedChildren()
    assert go(tmp_path, children, replace(FOUR, rounds=2), previous=old).outcomes == old.outcomes
    assert children.num_opened == 0
    longer = go(tmp_path, children, replace(FOUR, rounds=3), previous=old)
    assert turns(longer) == {name: [[], [], [2]] for name in FOUR.strategies}
    assert num_pairs(longer) == {"per-layer": 3, "every:2": 3, "every:4": 3}


def _as_before(result: RoundResult) -> tuple[RoundResult, ...]:
    """A process for each of its turns, as it was."""
    return tuple(
        replace(
            result,
            round=turn.number,
            memory=None if turn.number else result.memory,
            step_times_s=turn.step_times_s,
            turns=(),
        )
        for turn in result.turns
    )


def test_the_gradients_of_a_second_process_are_compared_with_the_first_of_off(tmp_path):
    stored = go(tmp_path, ScriptedChildren(), replace(FOUR, rounds=1))
    report = go(tmp_path, ScriptedChildren(), replace(FOUR, rounds=2), previous=stored)
    assert {result.grad_rel_diff for each in report.outcomes for result in each.rounds} == {0.0}
