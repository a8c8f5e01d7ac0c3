"""Ctrl-C and SIGTERM end every command with a message and exit code 130; no process stays, results are stored."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from processes import PROCESS_TIMEOUT_S, await_import, await_line, await_nobody

from gcbench.check import command as check_command
from gcbench.cli import app as command_line
from gcbench.cli import entry, listings, results
from gcbench.measure import command as run_command
from gcbench.predict import command as predict_command
from gcbench.report import report_file as reports

PREDICT = ("--batch", "1,2,3,4", "--seq-len", "8,16,32", "--device", "a10")
COMMANDS = (
    "models",
    "devices",
    "strategies",
    "report run",
    "compare run run",
    "env",
    "predict -m gpt2 -b 1",
    "check -m gpt2",
    "run -m gpt2 -b 1",
)


HANDLED_BY = {
    "report": (results, "report"),
    "compare": (results, "compare"),
    "predict": (predict_command, "run"),
    "check": (check_command, "run"),
    "run": (run_command, "run"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_reports_an_interruption(cli, monkeypatch, command, number):
    """Typer made of Ctrl-C an exit code without a word."""
    name = command.split()[0]

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(*HANDLED_BY.get(name, (listings, name)), interrupted)
    result = cli(*command.split())
    assert (result.code, result.out, result.err) == (130, "", "error: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a second one must not cut off the message"


def test_a_command_that_ends_by_itself_leaves_the_signals_as_they_were(cli):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cli("models").code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interruption_of_the_imports_is_reported(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert "typer" in sys.modules, "and it is what takes the time"


def test_an_interrupted_prediction_ends_at_once_and_stores_its_cells(popen, model, cli, tmp_path):
    """The trap: the pool waits for what each of its children is at, and begins the next."""
    process = popen("predict", "-m", model(), *PREDICT, "--out", tmp_path / "out")
    while not (tmp_path / "out" / "report.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert f"predicted and stored in {tmp_path / 'out'}; show them with: gcbench report {tmp_path / 'out'}" in err
    await_nobody(process)
    done = [outcome for outcome in reports.load(tmp_path / "out").outcomes if outcome.prediction]
    assert 0 < len(done) < 48
    assert cli("report", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json"}


def test_an_interrupted_check_stores_what_was_checked(popen, model, tmp_path):
    process = popen("check", "-m", model(), "--out", tmp_path / "out")
    await_line(process, "checking: 0 of")
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert "error: interrupted" in err
    assert (tmp_path / "out").exists() is ("kept in" in err)
    await_nobody(process)


@pytest.mark.parametrize("command", ["check", "plan --seq-len 8 --device a10"])
def test_while_torch_is_imported_nothing_is_left_running(popen, model, command, tmp_path):
    """The trap: the server goes on importing for seconds, with a terminal's prompt already back."""
    name, *rest = command.split()
    process = popen(name, "-m", model(), *rest)
    await_import(process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 130
    assert "error: interrupted before" in err and "Traceback" not in err
    await_nobody(process)
    assert not list(tmp_path.glob("results/*"))
