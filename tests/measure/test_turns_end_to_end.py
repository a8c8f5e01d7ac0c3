"""A real, tiny run whose cells take turns in processes that live side by side."""

from __future__ import annotations

import pytest

from gcbench.measure import runner
from gcbench.report import report_file as reports
from gcbench.report import stats

TINY = ("--batch", 1, "--seq-len", 16, "--device", "cpu", "--steps", 2, "--strategies", "off,per-layer")


def test_each_cell_has_one_process_and_its_turns(cli, model, tmp_path):
    """With what was observed of each turn: processor time, pages, and the machine's state."""
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *TINY, "--rounds", 3, "--out", folder)
    assert result.code == 0, result.err
    report = reports.load(folder)
    for outcome in report.outcomes:
        (process,) = outcome.rounds
        assert [turn.number for turn in process.turns] == [0, 1, 2]
        assert process.memory is not None and process.memory.process_bytes > process.memory.allocated_bytes
        for turn in process.turns:
            assert len(turn.step_times_s) == 2 and min(turn.step_times_s) > 0
            assert turn.user_s > 0 and turn.system_s >= 0 and turn.page_faults >= 0
            assert stats.is_valid(turn)
        assert process.step_times_s == tuple(seconds for turn in process.turns for seconds in turn.step_times_s)
        # One warm-up step, one that measures memory, and the timed ones; all of them take time.
        assert process.num_steps == 2 + 6 and process.steps_s >= sum(process.step_times_s)
        assert process.wall_s > process.steps_s and process.grad_rel_diff == 0.0
    off, other = report.outcomes
    assert stats.overhead_basis(other.rounds, off.rounds) == stats.PROCESSOR_TIME
    assert stats.overhead(other.rounds, off.rounds).num_units == 3
    assert runner.IN_ROUNDS not in report.notices


def test_without_room_the_same_cells_run_in_rounds(cli, model, tmp_path, monkeypatch):
    """The same figures from one process for each turn: memory in the first, gradients in all of them."""
    monkeypatch.setattr("gcbench.measure.side_by_side._ROOM", float("inf"))
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *TINY, "--rounds", 3, "--out", folder)
    assert result.code == 0, result.err
    report = reports.load(folder)
    assert runner.IN_ROUNDS in report.notices
    for outcome in report.outcomes:
        assert [turn.number for result in outcome.rounds for turn in result.turns] == [0, 1, 2]
        assert {len(result.turns) for result in outcome.rounds} <= {0, 1}
        assert [result.memory is not None for result in outcome.rounds] == [True] + [False] * (len(outcome.rounds) - 1)
        assert {result.grad_rel_diff for result in outcome.rounds} == {0.0}
    off, other = report.outcomes
    assert stats.overhead(other.rounds, off.rounds).num_units == 3


@pytest.mark.parametrize("limit", [("--max-time", 0.01), ("--target-interval", 100, "--max-time", 60)])
def test_a_run_without_a_number_of_rounds_ends(cli, model, limit):
    """At once, where the time is up or any interval will do: after three turns, or after four."""
    result = cli("run", "-m", model(), *TINY, *limit, "--json")
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["ok", "ok"]
    assert result.rows["per-layer"]["time_overhead_low_frac"] is not None
