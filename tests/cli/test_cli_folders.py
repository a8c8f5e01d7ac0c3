"""Folders that cannot be written, a disk that fills up, reports that cannot be read, and what standard output holds."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path

import pytest
from conftest import table
from fixtures_report import mixed_report

from gcbench.core.files import write_text
from gcbench.core.json_codec import encode
from gcbench.core.records import SCHEMA
from gcbench.measure import session
from gcbench.report import publish, run_folder
from gcbench.report import report_file as reports

QUICK = ("--batch", 1, "--seq-len", 16, "--rounds", 1, "--steps", 1, "--device", "cpu", "--strategies", "off,per-layer")


# The run folder


def test_an_output_folder_with_a_run_in_it_is_never_overwritten(cli, model, tmp_path):
    folder = tmp_path / "run"
    assert cli("run", "-m", model(), *QUICK, "--out", folder).code == 0
    before = (folder / "report.json").read_bytes()
    cli("run", "-m", model(), *QUICK, "--out", folder).refused(2, "exists and is not empty", "--resume")
    assert (folder / "report.json").read_bytes() == before


def test_an_output_folder_with_other_things_in_it(cli, model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    result = cli("run", "-m", model(), *QUICK, "--out", tmp_path / "photos")
    result.refused(2, "exists and is not empty", "choose another --out")
    assert "--resume" not in result.err


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/gcbench", "/dev/null"])
def test_an_output_folder_that_cannot_be_written(cli, model, tmp_path, place):
    (tmp_path / "file").touch()
    cli("run", "-m", model(), *QUICK, "--out", place).refused(2, f"--out {place} ", "choose another --out")


def test_a_relative_output_folder_is_below_the_current_one(cli, model, tmp_path):
    assert cli("run", "-m", model(), *QUICK, "--out", "here/and/there").code == 0
    assert (tmp_path / "here/and/there/report.json").exists()


class FullDisk:
    """`write_text` on a disk that is full below `folder` from the `first`-th report on, until `free`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, first: int) -> None:
        self.folder, self.first, self.saves, self.free = folder, first, 0, False
        self.real = write_text
        for module in (reports, run_folder, publish):
            monkeypatch.setattr(module, "write_text", self.write_text)

    def write_text(self, path: Path, text: str) -> None:
        self.saves += path.name == reports.REPORT_NAME
        if self.saves >= self.first and path.is_relative_to(self.folder) and not self.free:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(path, text)


def test_a_disk_that_fills_up_costs_neither_the_run_nor_the_results(cli, model, tmp_path, monkeypatch):
    """The trap: hours of measuring thrown away by the last write; or exit 0 with half a report in the folder."""
    folder, refuge = tmp_path / "run", tmp_path / "refuge"
    refuge.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(refuge))
    FullDisk(monkeypatch, folder, first=2)
    result = cli("run", "-m", model(), *QUICK, "--out", folder)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert result.err.count("warning:") == 1, result.err
    assert "No space left on device" in result.err
    assert "per-layer" in result.out and "identical" in result.out
    (kept,) = refuge.glob("gcbench-run-*")
    assert str(kept) in result.err and "move them once there is room" in result.err
    assert [len(outcome.rounds) for outcome in reports.load(kept).outcomes] == [1, 1]
    left = reports.load(folder)  # the old report is whole: a write that fails leaves what was there
    assert [len(outcome.rounds) for outcome in left.outcomes] == [0, 0]
    assert not list(folder.glob(".*.tmp"))


def test_a_disk_with_room_again_has_the_results_in_the_end(cli, model, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    disk = FullDisk(monkeypatch, folder, first=2)
    publish = session.publish

    def publish_with_room(*args, **kwargs):
        disk.free = True
        publish(*args, **kwargs)

    monkeypatch.setattr(session, "publish", publish_with_room)
    result = cli("run", "-m", model(), *QUICK, "--out", folder)
    assert result.code == 0, result.err
    assert [len(outcome.rounds) for outcome in reports.load(folder).outcomes] == [1, 1]
    assert table(folder)["per-layer"]["status"] == "ok"


def test_tables_that_could_not_be_written_are_reported_at_the_end(cli, model, tmp_path, monkeypatch):
    """The trap: the report fits on the disk, its tables and plots do not, and the run ends with 0."""
    folder = tmp_path / "run"
    disk = FullDisk(monkeypatch, folder, first=10_000)
    publish, close = session.publish, run_folder.Store.close

    def publish_without_room(*args, **kwargs):
        disk.first = 0
        publish(*args, **kwargs)

    def close_with_room(self):
        disk.free = True
        close(self)

    monkeypatch.setattr(session, "publish", publish_without_room)
    monkeypatch.setattr(run_folder.Store, "close", close_with_room)
    result = cli("run", "-m", model(), *QUICK, "--out", folder)
    assert result.code == 1
    assert f"make them with gcbench report {folder}" in result.err
    assert [len(outcome.rounds) for outcome in reports.load(folder).outcomes] == [1, 1]


def test_a_refused_run_leaves_a_folder_of_the_users_own(cli, model, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert cli("run", "-m", model(), *QUICK, "--seq-len", 100_000, "--out", folder).code == 2
    assert folder.is_dir()
    assert cli("run", "-m", model(), *QUICK, "--seq-len", 100_000, "--out", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()


# Stored results


DAMAGED = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[]",
    "no fields": lambda text: "{}",
    "a field of another type": lambda text: text.replace('"rounds": [', '"rounds": 3, "x": [', 1),
    "an unknown field": lambda text: text.replace('"created"', '"cremated"', 1),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("command", ["report {0}", "compare {0} {0}", "run --resume --out {0}"])
def test_a_damaged_report(cli, tmp_path, damage, command):
    reports.save(mixed_report(), tmp_path / "run")
    path = tmp_path / "run" / reports.REPORT_NAME
    path.write_text(DAMAGED[damage](path.read_text()))
    before = path.read_bytes()
    result = cli(*shlex.split(command.format(shlex.quote(str(tmp_path / "run")))))
    result.refused(4, str(path), "is damaged", "restore it")
    assert path.read_bytes() == before


def test_a_report_that_is_not_text(cli, tmp_path):
    (tmp_path / "report.json").write_bytes(b"\xff\x00")
    cli("report", tmp_path).refused(4, "cannot be read")


@pytest.mark.parametrize("command", ["report {0}", "compare {0} {0}", "run --resume --out {0}"])
def test_a_report_of_a_newer_gcbench(cli, tmp_path, command):
    """Told as newer even when its fields are unknown: they always will be."""
    document = {**encode(mixed_report()), "schema": SCHEMA + 1, "hologram": []}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(document))
    result = cli(*shlex.split(command.format(shlex.quote(str(tmp_path / "run")))))
    result.refused(4, f"has schema {SCHEMA + 1}", "upgrade gcbench")


@pytest.mark.parametrize("command", ["report nowhere", "compare nowhere nowhere"])
def test_no_report(cli, command):
    cli(*command.split()).refused(4, "there is no nowhere/report.json")


def test_resuming_nothing(cli, tmp_path):
    cli("run", "--resume").refused(2, "add --out DIR")
    cli("run", "--resume", "--out", "nowhere").refused(2, "nowhere holds no run")
    assert not (tmp_path / "nowhere").exists()


def test_a_report_that_cannot_be_written_where_it_should(cli, tmp_path):
    reports.save(mixed_report(), tmp_path / "run")
    (tmp_path / "file").touch()
    for format in ("csv", "png"):
        result = cli("report", "run", "--format", format, "--out", "file/below")
        result.refused(2, "--out file/below cannot be written")


# Standard output


@pytest.mark.parametrize(
    "command", ["report run", "report run --format json", "compare run run", "models", "strategies", "env --device cpu"]
)
def test_json_is_one_document_on_standard_output(cli, tmp_path, command):
    """The trap: a notice or a progress bar between the braces. `json.loads` takes one document and no more."""
    reports.save(mixed_report(), tmp_path / "run")
    result = cli(*command.split(), *([] if "--format" in command else ["--json"]))
    assert result.code == 0, result.err
    assert result.document["schema"] == SCHEMA
    assert result.document["rows"]


def test_json_of_a_run_is_one_document_whatever_else_is_printed(cli, model):
    result = cli("run", "-m", model(), *QUICK, "--json")
    assert result.code == 0, result.err
    assert list(result.document) == ["schema", "rows"]
    assert "Weights are random" in result.err and "round 1/1" in result.err


def test_quiet_prints_nothing_to_standard_error(cli, model):
    result = cli("run", "-m", model(), *QUICK, "--quiet")
    assert result.code == 0
    assert result.err == ""
    assert "per-layer" in result.out
