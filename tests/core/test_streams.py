"""Output in any encoding, onto full disks and into closed pipes: a sentence and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from fixtures_report import mixed_report
from processes import PROCESS_TIMEOUT_S

from gcbench.cli import app as command_line
from gcbench.core import streams
from gcbench.core.errors import OutputError, ReaderGone
from gcbench.core.files import write_text
from gcbench.report import report_file as reports

ENCODINGS = ("ascii", "cp1252", "latin-1", "shift_jis")
COMMANDS = (
    "report run",
    "report run --format markdown",
    "report run --format csv",
    "compare run run",
    "devices",
    "models",
    "strategies",
    "--help",
    "run --help",
    "report nowhere…",
)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_writes_in_every_encoding(tmp_path, monkeypatch, command, encoding):
    """`PYTHONIOENCODING=ascii`, and cp1252, which is the encoding of a pipe on Windows."""
    reports.save(mixed_report(), tmp_path / "run")
    code, out, err = called(monkeypatch, tmp_path, command.split(), encoding)
    assert code == (4 if "nowhere" in command else 0)
    assert "Traceback" not in err and (out or err)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", ["report run --json", "compare run run --json", "devices --json"])
def test_json_is_equal_in_every_encoding(tmp_path, monkeypatch, command, encoding):
    """The traps: `...` in the place of a name, `\\U0001f600`, which JSON does not know, and bytes that are no UTF-8."""
    report = mixed_report()
    name = "模型 … é 😀"
    reports.save(renamed(report, name), tmp_path / "run")
    _, out, _ = called(monkeypatch, tmp_path, command.split(), encoding)
    _, utf8, _ = called(monkeypatch, tmp_path, command.split(), "utf-8")
    assert out.isascii()
    assert json.loads(out) == json.loads(utf8)
    assert (name in utf8) is not command.startswith("devices")


def test_characters_that_an_encoding_lacks_are_replaced_readably():
    text = "gpt2 · batch 2 × 64 · −3 % ±1 … ≈ Δ ✗ 模 é ─┼ ▇"
    assert streams.spelled(text, "ascii") == "gpt2 - batch 2 x 64 - -3 % +-1 ... ~ d x \\u6a21 e -+ #"
    assert streams.spelled(text, "utf-8") == text
    assert streams.spelled("84 ms ±2 % · × …", "cp1252") == "84 ms ±2 % · × …"


def test_a_table_keeps_its_columns_when_characters_are_replaced(tmp_path, monkeypatch):
    """The trap: `±` becomes two characters after the widths were computed."""
    reports.save(mixed_report(), tmp_path / "run")
    _, out, _ = called(monkeypatch, tmp_path, ["report", "run"], "ascii")
    lines = out.splitlines()
    header = next(number for number, line in enumerate(lines) if "step time" in line)
    places = [[place for place, char in enumerate(line) if char == "|"] for line in lines[header + 2 : header + 5]]
    assert "+-" in lines[header + 2]
    assert places[0]
    assert places[0] == places[1] == places[2]


def test_bytes_of_a_path_that_are_not_text_are_unchanged(monkeypatch):
    out = bytes_stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    with streams.guarded():
        print("b\udcffd")
        streams.print_json(json.dumps("b\udcffd", ensure_ascii=False))
    out.flush()
    assert out.buffer.getvalue() == b'b\xffd\n"b\\udcffd"'


def test_files_contain_such_bytes_too(tmp_path):
    write_text(tmp_path / "a.md", "b\udcffd")
    write_text(tmp_path / "a.json", '"b\udcffd"')
    assert (tmp_path / "a.md").read_bytes() == b"b\xffd"
    assert json.loads((tmp_path / "a.json").read_text()) == "b\udcffd"


class Full(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number: int, *, late: bool = False) -> None:
        super().__init__()
        self.number, self.late = number, late

    def write(self, text: str) -> int:
        if not self.late:
            raise OSError(self.number, os.strerror(self.number))
        return len(text)

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("command", ["devices", "models --json", "report run", "--help", "--version"])
def test_a_full_disk_below_standard_output_is_a_sentence(tmp_path, monkeypatch, capsys, command, late):
    """`gcbench report X > /dev/full`; a small output fails only when it is flushed."""
    reports.save(mixed_report(), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gcbench", *command.split()])
    monkeypatch.setattr(sys, "stdout", Full(errno.ENOSPC, late=late))
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err == ("error: standard output cannot be written (No space left on device); redirect it to another file\n")


def test_a_closed_pipe_is_not_reported_as_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gcbench", "models"])
    monkeypatch.setattr(sys, "stdout", Full(errno.EPIPE))
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_errors_of_standard_error_are_ignored(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gcbench", "nonsense"])
    monkeypatch.setattr(sys, "stderr", Full(errno.ENOSPC))
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_an_output_error_names_the_folder_of_the_results():
    with pytest.raises(OutputError, match="the results are in results/x"), streams.stored_in("results/x"):
        raise OutputError("standard output cannot be written")
    with pytest.raises(ReaderGone), streams.stored_in("results/x"):
        raise ReaderGone


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("models > /dev/full", 2, "standard output cannot be written"),
        ("--help >&-", 2, "standard output is closed"),
        ("models 2>&- >/dev/null", 0, ""),
        ("nonsense 2>/dev/full", 2, ""),
        ("models | true", 141, ""),
    ],
)
def test_streams_of_a_real_process(redirected, code, said):
    """At the interpreter's end too: "Exception ignored … BrokenPipeError" comes after the program's last word."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m gcbench {redirected}; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
    )
    assert done.returncode == code, done
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


def bytes_stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def called(monkeypatch, folder, args, encoding) -> tuple[int, str, str]:
    """Exit code, standard output and error of a call with both in an encoding."""
    out, err = bytes_stream(encoding), bytes_stream(encoding)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "argv", ["gcbench", *args])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out.flush()
        err.flush()
    return int(ended.value.code or 0), *(stream.buffer.getvalue().decode(encoding) for stream in (out, err))


def renamed(report, name):
    """The report as one of a model of this name."""
    return reports.decode(
        reports.Report, json.loads(json.dumps(reports.encode(report)).replace('"gpt2"', json.dumps(name)))
    )
