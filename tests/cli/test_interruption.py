"""Ctrl-C and kills at any moment: no process stays, measurements are stored, and --resume finishes."""

from __future__ import annotations

import os
import re
import signal

import pytest
from processes import PROCESS_TIMEOUT_S, await_import, await_line, await_members, await_nobody

from gcbench.core.records import Report
from gcbench.core.units import counted
from gcbench.report import report_file as reports

QUICK = ("--batch", 1, "--seq-len", 16, "--device", "cpu", "--steps", 1)
THREE = ("--strategies", "off,per-layer,every:2")
LONG = ("--rounds", 1000)
BUSY = ("--rounds", 1, "--steps", 100_000)
IMPORTING = "the server imports torch"


@pytest.mark.parametrize(
    ("moment", "cells", "turns"),
    [
        (IMPORTING, 0, 0),
        ("measuring:", 0, 0),
        ("off, batch", 1, 0),
        ("every:2, batch", 3, 0),
        ("round 1/1000", 3, 3),
    ],
)
def test_ctrl_c_stores_what_was_measured_and_resume_finishes(popen, cli, model, tmp_path, moment, cells, turns):
    """The traps: children that go on measuring alone, a server caught by the signal in the middle of an import and
    printing its trace, and a resumed run that measures again what it had."""
    folder = tmp_path / "run"
    process = popen("run", "-m", model(), *QUICK, *THREE, *LONG, "--out", folder)
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
    stored = num_turns(before)
    assert num_measured(before) >= cells and sum(stored) >= turns
    if num_measured(before):
        assert counted(num_measured(before), "measured cell") in err and f"kept in {folder}" in err
    else:
        assert "interrupted before anything was measured" in err
    assert not sum(stored) or counted(sum(stored), "timed turn") in err
    assert f"gcbench run --resume --out {folder}" in err
    assert not list(folder.rglob(".*.tmp"))
    if num_measured(before):
        assert cli("report", folder).code == 0

    rounds = max(stored) + 2
    resumed = cli("run", "--resume", "--out", folder, "--rounds", rounds)
    assert resumed.code == 0, resumed.err
    after = reports.load(folder)
    assert all(number >= rounds for number in num_turns(after))
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        assert new.rounds[: len(old.rounds)] == old.rounds
        assert len(new.rounds) == len(old.rounds) + 1
        assert [result.memory is not None for result in new.rounds] == [True] + [False] * (len(new.rounds) - 1)
    assert {r.grad_rel_diff for outcome in after.outcomes for r in outcome.rounds} == {0.0}


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
    process = popen("run", "-m", model(), *QUICK, *THREE, *LONG, "--out", folder)
    await_line(process, "round 1/1000")
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 130, err
    assert " kept in " in err and "Traceback" not in err
    assert all(outcome.failure is None for outcome in reports.load(folder).outcomes)
    await_nobody(process)


@pytest.mark.parametrize("moment", ["off, batch", "round 1/"])
def test_a_parent_that_is_killed_leaves_no_children(popen, model, moment):
    """The traps: a child that trains on alone, or waits for its turn, with the machine's memory in its hands."""
    process = popen("run", "-m", model(), *QUICK, *THREE, *(LONG if moment == "round 1/" else BUSY))
    await_line(process, moment)
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
    ("change", "message"),
    [
        (("--batch", 2), "batch_size [1] is now [2]"),
        (("--seed", 1), "seed 0 is now 1"),
        (("--strategies", "off"), "strategies "),
        (("--set", "hidden_act=gelu"), "set None is now"),
        (("--memory-limit", "1GiB"), f"memory_limit None is now {2**30}"),
    ],
)
def test_resuming_with_other_settings_is_refused(cli, model, tmp_path, change, message):
    """The trap: two workloads in one table that nothing distinguishes."""
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, *THREE, "--rounds", 1, "--out", folder).code == 0
    before = (folder / "report.json").read_bytes()
    cli("run", "--resume", "--out", folder, *change).refused(2, "--resume", message, "take a new --out")
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


def num_measured(report: Report) -> int:
    """Cells that have something measured."""
    return sum(bool(outcome.rounds) for outcome in report.outcomes)


def num_turns(report: Report) -> list[int]:
    """The turns of each cell."""
    return [sum(len(result.turns) for result in outcome.rounds) for outcome in report.outcomes]
