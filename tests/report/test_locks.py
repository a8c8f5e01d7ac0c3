"""Locks of folders: one process at a time, and no lock file afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from fixtures_report import mixed_report
from processes import PROCESS_TIMEOUT_S

from gcbench.core.errors import UsageError
from gcbench.report import report_file as reports
from gcbench.report.run_folder import LOCK_NAME, Store

HOLDER = """
import sys, time
from pathlib import Path
from gcbench.report.run_folder import Store
with Store.create(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
COMMANDS = (
    "run -m gpt2 -b 1 --out {0}",
    "run --resume --out {0}",
    "predict -m gpt2 -b 1 --device h100 --out {0}",
    "plan -m gpt2 --device h100 --out {0}",
    "plan --from old --seq-len 64 --device-memory 64GiB --out {0}",
    "check -m gpt2 --out {0}",
)


@pytest.fixture
def holder(tmp_path):
    """A process that writes to `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=PROCESS_TIMEOUT_S)


def test_a_folder_in_use_is_refused_to_every_command_and_shown_by_report(cli, holder, tmp_path):
    """Two runs in one folder ended both with 0, and the report was that of whichever saved last."""
    begun = replace(mixed_report(), settings={"model": "gpt2", "batch_size": [8]})
    reports.save(begun, tmp_path / "run")
    reports.save(begun, tmp_path / "old")
    before = (tmp_path / "run" / "report.json").read_bytes()
    for command in COMMANDS:
        message = ("--out run is being written to by another gcbench", "another --out")
        cli(*command.format("run").split()).refused(2, *message)
    assert cli("report", "run").code == 0
    assert (tmp_path / "run" / "report.json").read_bytes() == before
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK_NAME, "report.json"}


def test_a_killed_process_leaves_no_lock(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=PROCESS_TIMEOUT_S)
    assert (tmp_path / "run" / LOCK_NAME).exists(), "what it leaves"
    with Store.create(tmp_path / "run") as store:
        assert store.folder == tmp_path / "run"
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lock_is_removed_with_its_holder(tmp_path):
    with Store.create(tmp_path / "run"):
        for take in (Store.create, Store.reopen):
            with pytest.raises(UsageError, match="by another gcbench"):
                take(tmp_path / "run")
    assert not (tmp_path / "run" / LOCK_NAME).exists()
    with Store.reopen(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_refused_folder_is_left_to_others(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        Store.create(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_file_system_without_locks_is_written_to_without_one(tmp_path, monkeypatch):
    """Some network file systems have none: better one writer unguarded than none at all."""
    import filelock

    def fails(self, *args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", fails)
    with Store.create(tmp_path / "run") as store:
        reports.save(mixed_report(), store.folder)
    assert reports.load(tmp_path / "run") == mixed_report()


def test_two_at_one_second_have_a_default_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store.new("gpt2", "2026-11-02T10:00:00") as first, Store.new("gpt2", "2026-11-02T10:00:00") as second:
        assert [str(store.folder) for store in (first, second)] == [
            "results/gpt2-20261102-100000",
            "results/gpt2-20261102-100000-2",
        ]


def test_a_default_folder_without_results_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError), Store.new("gpt2", "2026-11-02T10:00:00"):
        raise UsageError("refused")
    assert list((tmp_path / "results").iterdir()) == []
