"""What can befall a run while it measures: each costs one row at most, and nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import misbehaving
import pytest
from conftest import PROCESS_TIMEOUT_S, session_members

from gcbench import children
from gcbench import report as reports
from gcbench.records import Report

QUICK = ("--batch", 1, "--seq-len", 16, "--device", "cpu", "--steps", 1)
THREE = ("--strategies", "off,per-layer,every:2")


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """`fate(misbehaving.hangs)` is what happens to the children that measure per-layer."""
    return lambda entry: monkeypatch.setattr(children, "child_entry", SimpleNamespace(main=entry))


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
    assert stored["per-layer"].failure is None and len(stored["per-layer"].rounds) == 2
    assert stored["per-layer"].rounds[0].memory.allocated_bytes == peaks["per-layer"]
    assert "off does not fit in memory; per-layer does" in result.out
    assert "Memory is limited to" in result.err

    exact = cli(*big, "--strategies", "off", "--memory-limit", peaks["off"], "--json")
    assert exact.rows["off"]["status"] == "ok"
    one_less = cli(*big, "--strategies", "off", "--memory-limit", peaks["off"] - 1, "--json")
    assert one_less.rows["off"]["status"] == "oom" and one_less.code == 0


def test_an_allocation_that_fails_is_a_row(cli, model):
    """4 GiB of logits under a limit of 64 MiB: an exception in the child, not the kernel's killer."""
    result = cli(
        *("run", "-m", model(vocab_size=2**15), *QUICK, "--batch", 256, "--seq-len", 128, "--rounds", 1),
        *("--strategies", "off", "--memory-limit", "64MiB", "--json"),
    )
    assert result.code == 0, result.err
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
    kinds = {o.cell.strategy: (o.failure and o.failure.kind, len(o.rounds)) for o in reports.load(folder).outcomes}
    assert kinds == {"off": (None, 2), "per-layer": ("killed", 0), "every:2": (None, 2)}
    assert (folder / "table.csv").exists() and (folder / "plots").exists()


def test_a_child_killed_in_a_later_round_keeps_the_rounds_before(cli, model, fate, tmp_path):
    fate(misbehaving.is_killed_in_its_last_round)
    folder = tmp_path / "run"
    result = cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 3, "--out", folder)
    assert result.code == 1
    kinds = {o.cell.strategy: (o.failure and o.failure.kind, len(o.rounds)) for o in reports.load(folder).outcomes}
    assert kinds == {"off": (None, 3), "per-layer": ("killed", 1), "every:2": (None, 3)}


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
        (misbehaving.raises, "ZeroDivisionError: the learning rate; the whole trace is in report.json"),
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


def test_a_killed_server_costs_one_row_at_most(popen, model):
    """Children are forked from it: the one that runs is lost, and the next ones get another server."""
    process = popen("run", "-m", model(), *QUICK, *THREE, "--rounds", 2, "--json")
    await_line(process, "round 1/2 off")
    (server,) = (pid for pid in session_members(process.pid) if is_server(pid))
    os.kill(server, signal.SIGKILL)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert "Traceback" not in err, err
    statuses = [row["status"] for row in json.loads(out)["rows"]]
    assert statuses in (["ok", "crash", "ok"], ["ok", "ok", "ok"]), err  # all of them when it fell between two children
    assert process.returncode == (1 if "crash" in statuses else 0)


# Interruption


STEPS = ("--rounds", 3, "--steps", 3)
IMPORTING = "the server imports torch"


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        (IMPORTING, 0),
        ("measuring:", 0),
        ("round 1/3 off", 1),
        ("round 1/3 every:2", 3),
        ("round 2/3 off", 4),
        ("round 3/3 per-layer", 8),
    ],
)
def test_ctrl_c_keeps_what_was_measured_and_resume_finishes(popen, cli, model, tmp_path, moment, kept):
    """The traps: a child that goes on measuring alone, a server caught by the signal in the middle of an import and
    printing its trace, and a resumed run that measures again what it had."""
    folder = tmp_path / "run"
    process = popen("run", "-m", model(), *QUICK, *THREE, *STEPS, "--out", folder)
    lines = []
    if moment == IMPORTING:
        await_import(process)
    else:
        lines = await_line(process, moment)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err, err
    await_nobody(process)
    if not lines:
        assert "interrupted before anything was measured" in err
        assert not folder.exists()
        return
    before = reports.load(folder)
    assert kept <= num_rounds(before) <= kept + 1  # one may have ended between its line and the signal
    assert f"{num_rounds(before)} measured rounds are kept in {folder}" in err
    assert f"gcbench run --resume --out {folder}" in err
    assert not list(folder.rglob(".*.tmp"))
    if num_rounds(before):
        assert cli("report", folder).code == 0

    resumed = cli("run", "--resume", "--out", folder)
    assert resumed.code == 0, resumed.err
    after = reports.load(folder)
    assert num_rounds(after) == 9
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        assert new.rounds[: len(old.rounds)] == old.rounds
    assert {r.grad_rel_diff for outcome in after.outcomes for r in outcome.rounds} == {0.0}
    assert len(re.findall(r"^round ", resumed.err, flags=re.MULTILINE)) == 9 - num_rounds(before)


def test_ctrl_c_is_for_the_parent_alone(popen, model):
    """The trap: a server that ends of it by itself, which the parent then takes for a broken library."""
    process = popen("run", "-m", model(), *QUICK, "--strategies", "off", "--rounds", 1)
    os.kill(await_import(process), signal.SIGINT)
    _, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 0, err


@pytest.mark.parametrize("to_group", [False, True])
def test_a_polite_kill_is_like_ctrl_c(popen, model, tmp_path, to_group):
    """A batch system's warning before its time is up, sent to the parent or to all of its processes."""
    folder = tmp_path / "run"
    process = popen("run", "-m", model(), *QUICK, *THREE, *STEPS, "--out", folder)
    await_line(process, "round 1/3 off")
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 130, err
    assert "are kept in" in err and "Traceback" not in err
    assert all(outcome.failure is None for outcome in reports.load(folder).outcomes)
    await_nobody(process)


def test_a_parent_that_is_killed_leaves_no_children(popen, model):
    """The trap: a child that trains on alone, with the machine's memory in its hands."""
    process = popen("run", "-m", model(), *QUICK, "--strategies", "off", "--rounds", 1, "--steps", 100_000)
    await_line(process, "measuring:")
    await_members(process, at_least=4)
    process.kill()
    process.wait()
    await_nobody(process)


def test_resuming_a_finished_run_changes_nothing(cli, model, tmp_path):
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--out", folder).code == 0
    before = (folder / "report.json").read_bytes()
    resumed = cli("run", "--resume", "--out", folder)
    assert resumed.code == 0, resumed.err
    assert (folder / "report.json").read_bytes() == before
    assert "identical" in resumed.out


def test_resuming_with_more_rounds_adds_them(cli, model, tmp_path):
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--out", folder).code == 0
    before = reports.load(folder)
    resumed = cli("run", "--resume", "--out", folder, "--rounds", 2)
    assert resumed.code == 0, resumed.err
    for old, new in zip(before.outcomes, reports.load(folder).outcomes, strict=True):
        assert new.rounds[:1] == old.rounds and [r.round for r in new.rounds] == [0, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--batch", 2), "batch_size [1] is now [2]"),
        (("--seed", 1), "seed 0 is now 1"),
        (("--strategies", "off"), "strategies "),
        (("--set", "hidden_act=gelu"), "set None is now"),
        (("--memory-limit", "1GiB"), f"memory_limit None is now {2**30}"),
    ],
)
def test_resuming_with_other_settings_is_refused(cli, model, tmp_path, change, said):
    """The trap: two workloads in one table, told apart by nothing."""
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--out", folder).code == 0
    before = (folder / "report.json").read_bytes()
    cli("run", "--resume", "--out", folder, *change).refused(2, "--resume", said, "take a new --out")
    assert (folder / "report.json").read_bytes() == before


def test_resuming_on_another_machine_is_refused(cli, model, tmp_path):
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--out", folder).code == 0
    path = folder / "report.json"
    path.write_text(re.sub(r'"device_name": "[^"]*"', '"device_name": "Another CPU"', path.read_text()))
    cli("run", "--resume", "--out", folder).refused(2, "--resume", "Another CPU", "take a new --out")


def test_resuming_with_a_model_that_has_changed_is_refused(cli, model, tmp_path):
    """The trap: the folder's config.json edited between the halves of a run."""
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--out", folder).code == 0
    model("llama", intermediate_size=128)
    cli("run", "--resume", "--out", folder, "--rounds", 2).refused(2, "--resume", "take a new --out")


# What the tests above wait for


def await_line(process: subprocess.Popen[str], start: str) -> list[str]:
    """The lines on standard error up to the first that begins with `start`; the rest is left for `communicate`."""
    lines, line = [], b""
    watchdog = threading.Timer(PROCESS_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        while byte := os.read(process.stderr.fileno(), 1):  # no more at a time: what a buffer took would be lost
            line += byte
            if byte == b"\n":
                lines.append(line.decode())
                line = b""
                if lines[-1].startswith(start):
                    return lines
    finally:
        watchdog.cancel()
    raise AssertionError(f"{start!r} was never said: {''.join(lines)}")


def is_server(pid: int) -> bool:
    """Whether a process is the one that children are forked from, and not one of them, which have its command line."""
    parent = int(_read(pid, "stat").rpartition(b")")[2].split()[1])
    return b"forkserver" in _read(pid, "cmdline") and b"forkserver" not in _read(parent, "cmdline")


def _read(pid: int, name: str) -> bytes:
    """A file of /proc; empty when the process has ended."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def await_members(process: subprocess.Popen[str], *, at_least: int) -> list[int]:
    """The processes of the run's session once there are so many: the parent, its two helpers, then a child."""
    return _await(lambda: session_members(process.pid), lambda members: len(members) >= at_least)


def await_import(process: subprocess.Popen[str]) -> int:
    """The server, once it is in the middle of importing torch: its library is mapped, its Python half is not read."""

    def importing() -> list[int]:
        return [pid for pid in session_members(process.pid) if b"libtorch_cpu" in _read(pid, "maps")]

    return _await(importing, bool)[0]


def await_nobody(process: subprocess.Popen[str]) -> None:
    """The server may be in the middle of importing torch, and looks up after that."""
    _await(lambda: session_members(process.pid), lambda members: not members, seconds=15)


def _await(look, holds, *, seconds: float = 60):
    """Polls, because the end of somebody else's process is no event that can be waited for."""
    deadline = time.monotonic() + seconds
    while not holds(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)
    return seen


def num_rounds(report: Report) -> int:
    return sum(len(outcome.rounds) for outcome in report.outcomes)
