"""Failures during a run: each costs one row at most, and nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import misbehaving
import pytest
from processes import PROCESS_TIMEOUT_S, await_line, await_members, await_nobody, is_server, session_members

from gcbench.core.records import Outcome
from gcbench.measure import runner, side_by_side
from gcbench.processes import children
from gcbench.report import report_file as reports

QUICK = ("--batch", 1, "--seq-len", 16, "--device", "cpu", "--steps", 1)
THREE = ("--strategies", "off,per-layer,every:2")


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """`fate(misbehaving.hangs)` is what happens to the children that measure per-layer."""
    return lambda entry: monkeypatch.setattr(children, "child", SimpleNamespace(main=entry))


def num_turns(outcome: Outcome) -> int:
    return sum(len(result.turns) for result in outcome.rounds)


def ends(folder: Path) -> dict[str, tuple[str | None, int]]:
    """By strategy: the kind of its failure, if any, and how many turns it took."""
    return {
        each.cell.strategy: (each.failure.kind if each.failure else None, num_turns(each))
        for each in reports.load(folder).outcomes
    }


# Out of memory


def test_a_limit_between_the_strategies_lets_one_through(cli, model, tmp_path):
    """The trap: a limit that is only checked by the address space lets through what the card would refuse."""
    big = ("run", "-m", model(), *QUICK, "--batch", 8, "--seq-len", 64, "--rounds", 2)
    free = cli(*big, "--strategies", "off,per-layer", "--json")
    peaks = {strategy: row["peak_allocated_bytes"] for strategy, row in free.rows.items()}
    limit = (peaks["off"] + peaks["per-layer"]) // 2

    folder = tmp_path / "run"
    result = cli(*big, "--strategies", "off,per-layer", "--memory-limit", limit, "--out", folder)
    assert result.code == 0, result.err
    stored = {outcome.cell.strategy: outcome for outcome in reports.load(folder).outcomes}
    assert stored["off"].failure.kind == "oom" and stored["off"].rounds == ()
    assert re.search(r"the step needs [\d.]+ MiB and the limit is [\d.]+ MiB", stored["off"].failure.message)
    assert "--batch" in stored["off"].failure.message
    assert stored["per-layer"].failure is None and num_turns(stored["per-layer"]) == 2
    assert stored["per-layer"].rounds[0].memory.allocated_bytes == peaks["per-layer"]
    assert "off does not fit in memory; per-layer does" in result.out
    assert "Memory is limited to" in result.err

    exact = cli(*big, "--strategies", "off", "--memory-limit", peaks["off"], "--json")
    assert exact.rows["off"]["status"] == "ok"
    one_less = cli(*big, "--strategies", "off", "--memory-limit", peaks["off"] - 1, "--json")
    assert one_less.rows["off"]["status"] == "oom" and one_less.code == 1, "nothing fits"


def test_an_allocation_that_fails_is_a_row(cli, model):
    """4 GiB of logits under a limit of 64 MiB: an exception in the child, not the kernel's killer."""
    result = cli(
        *("run", "-m", model(vocab_size=2**15), *QUICK, "--batch", 256, "--seq-len", 128, "--rounds", 1),
        *("--strategies", "off", "--memory-limit", "64MiB", "--json"),
    )
    assert result.code == 1 and "error: nothing fits into 64.00 MiB" in result.err, "a row, and then the sentence"
    assert result.rows["off"]["status"] == "oom"
    assert "memory ran out in the forward phase; try a smaller --batch" in result.rows["off"]["message"]
    assert result.rows["off"]["step_time_s"] is None


def test_a_memory_error_is_out_of_memory(cli, model, fate):
    fate(misbehaving.runs_out_of_memory)
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--json")
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["ok", "oom", "ok"]


def test_a_kill_by_the_kernel_for_memory_is_out_of_memory(cli, model, fate, monkeypatch):
    """The trap: the kernel sends the same signal as a person does; only its own count tells them apart."""
    count = iter(range(100))
    monkeypatch.setattr(children, "_kernel_kills", lambda: next(count))
    fate(misbehaving.kills_itself)
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--json")
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["ok", "oom", "ok"]
    assert "the kernel killed the process" in result.rows["per-layer"]["message"]


@pytest.mark.parametrize(
    ("exitcode", "by_kernel", "kind", "said"),
    [
        (-signal.SIGKILL, True, "oom", "the kernel killed the process"),
        (-signal.SIGKILL, False, "killed", "SIGKILL"),
        (-signal.SIGTERM, False, "killed", "SIGTERM"),
        (-signal.SIGTERM, True, "killed", "SIGTERM"),
        (-signal.SIGSEGV, False, "crash", "SIGSEGV"),
        (-signal.SIGABRT, True, "crash", "SIGABRT"),
        (1, False, "crash", "ended with code 1"),
        (1, True, "crash", "the last words"),
        (0, False, "crash", "ended with code 0"),
        (None, False, "crash", "ended with code None"),
    ],
)
def test_what_the_end_of_a_child_means(exitcode, by_kernel, kind, said):
    failure = children._died(exitcode, "first\nthe last words\n  \n", by_kernel=by_kernel)
    assert failure.kind == kind
    assert said in failure.message
    assert failure.detail.startswith("first")


# A child that does not come back


def test_a_killed_child_costs_one_row(cli, model, fate, tmp_path):
    fate(misbehaving.kills_itself)
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 2, "--out", folder)
    assert result.code == 1
    assert "1 of 3 cells crashed, timed out or were killed" in result.err
    assert "was killed" in result.out or "killed" in result.out
    assert ends(folder) == {"off": (None, 2), "per-layer": ("killed", 0), "every:2": (None, 2)}
    assert (folder / "table.csv").exists() and (folder / "plots").exists()


def test_a_child_killed_in_a_later_turn_keeps_the_turns_before(cli, model, fate, tmp_path):
    fate(misbehaving.is_killed_in_its_second_turn)
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 3, "--out", folder)
    assert result.code == 1
    assert ends(folder) == {"off": (None, 3), "per-layer": ("killed", 1), "every:2": (None, 3)}


def test_a_child_that_stops_in_its_turn_does_not_block_the_others(cli, model, fate, tmp_path, monkeypatch):
    """The trap: one process that waits for ever, and two others that wait for it, with nobody to say so."""
    monkeypatch.setattr(side_by_side, "_HANGS_AFTER_S", 3.0)
    fate(misbehaving.stops_in_its_second_turn)
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 3, "--out", folder)
    assert result.code == 1
    assert ends(folder) == {"off": (None, 3), "per-layer": ("timeout", 1), "every:2": (None, 3)}
    assert "a step was still running after" in result.out


def test_a_child_that_runs_out_of_memory_beside_others_is_measured_alone(cli, model, fate, tmp_path):
    fate(misbehaving.runs_out_of_memory_in_its_second_turn)
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 3, "--out", folder)
    assert result.code == 0, result.err
    assert {kind for kind, _ in ends(folder).values()} == {None}
    assert ends(folder)["per-layer"] == (None, 3)
    assert runner.IN_ROUNDS in reports.load(folder).notices


def test_a_child_killed_from_outside_while_it_runs(popen, model, tmp_path):
    """The real thing: found by its process, killed in the middle of its steps; `off` after it is measured still."""
    process = popen(
        *("run", "-m", model(), *QUICK, "--strategies", "per-layer", "--rounds", 1, "--steps", 100_000, "--json"),
    )
    server_and_tracker = await_line(process, "measuring:") and 3
    child = await_members(process, at_least=server_and_tracker + 1)[-1]
    os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 1, err
    assert '"status": "killed"' in out
    assert "Traceback" not in err


def test_a_hanging_child_is_stopped_at_its_time(cli, model, fate):
    fate(misbehaving.hangs)
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 2, "--timeout", 5, "--json")
    assert result.code == 1
    assert [row["status"] for row in result.rows.values()] == ["ok", "timeout", "ok"]
    assert "still running after 5.00 s and stopped; raise --timeout" in result.rows["per-layer"]["message"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (misbehaving.exits, "ended with code 3 and no result (libfoo: giving up)"),
        (misbehaving.faults, "SIGSEGV"),
        (misbehaving.raises, "ZeroDivisionError: the learning rate; the full traceback is in report.json"),
    ],
)
def test_a_crashing_child_costs_one_row(cli, model, fate, tmp_path, entry, said):
    fate(entry)
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 2, "--out", folder, "--json")
    assert result.code == 1
    assert [row["status"] for row in result.rows.values()] == ["ok", "crash", "ok"]
    assert said in result.rows["per-layer"]["message"]
    assert "Traceback" not in result.err
    crashed = reports.load(folder).outcomes[1].failure
    if entry is misbehaving.raises:
        assert "was divided by nothing" in crashed.detail and "Traceback" in crashed.detail


def test_a_precision_that_the_model_refuses_is_unsupported(cli, model, fate):
    """Some kernels exist for some types only, which nobody knows before the first step: a result, exit 0."""
    fate(misbehaving.refuses_the_precision)
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--precision", "fp16-mixed", "--json")
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["ok", "unsupported", "ok"]
    assert "not implemented for 'Half'; try another --precision" in result.rows["per-layer"]["message"]


def test_a_child_that_dies_before_anything_is_known(cli, model, fate, tmp_path):
    fate(misbehaving.describes_nothing)
    result = cli("run", "-m", model(), *QUICK, "--out", tmp_path / "run")
    result.refused(3, "SIGKILL")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("moment", "num_rounds"), [("off, batch", 2), ("round 1/50", 50)])
def test_a_killed_server_costs_one_row_at_most(popen, model, moment, num_rounds):
    """Children are forked from it: one that it is starting may be lost, the next ones get another server, and those
    that wait for their turn live on. The traps: that all of them seem to have ended with the server, and a child
    that was forked and not reported, which answers on the line of the next one."""
    process = popen("run", "-m", model(), *QUICK, *THREE, "--rounds", num_rounds, "--json")
    await_line(process, moment)
    (server,) = (pid for pid in session_members(process.pid) if is_server(pid))
    os.kill(server, signal.SIGKILL)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert "Traceback" not in err, err
    statuses = [row["status"] for row in json.loads(out)["rows"]]
    assert statuses in (["ok", "crash", "ok"], ["ok", "ok", "ok"]), err  # all of them when it fell between two children
    assert process.returncode == (1 if "crash" in statuses else 0)
    await_nobody(process)
