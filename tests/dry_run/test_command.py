"""Flags of `gcbench dry-run`, and the environment of its command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from gcbench.core.errors import UsageError
from gcbench.dry_run import process
from gcbench.dry_run.observer import SETTINGS_VARIABLE

FORM = "gcbench dry-run --device rtx-4090 -- python train.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--device", "rtx-4090", "--"), f"write it after --, like: {FORM}"),
        (("--", "python", "x.py"), f"--device is missing; name the card to emulate, like: {FORM}"),
        (("--device", "cuda", "--", "python"), "is no card to emulate"),
        (("--device", "rtx-4090", "--steps", "0", "--", "python"), "--steps: '0' is not a whole number"),
        (("--device", "rtx-4090", "--num-devices", "99", "--", "python"), "--num-devices: '99'"),
        (("--device", "rtx-4090", "--device-memory", "24", "--", "python"), "did you mean 24GiB?"),
        (("--device", "rtx-4090", "--snapshot", "/no/such/s.pickle", "--", "python"), "there is no folder /no/such"),
    ],
)
def test_a_wrong_flag_is_one_sentence(cli, args, message):
    found = cli("dry-run", *args)
    assert found.code == 2 and message in found.err and found.out == ""


def test_all_mistakes_are_told_together(cli):
    found = cli("dry-run", "--steps", "x")
    assert found.code == 2 and found.err.count("\n- ") + found.err.startswith("- ") >= 2


def test_an_unknown_card_has_near_names(cli):
    cli("dry-run", "--device", "rtx-4091", "--", "python", "x.py").refused(3, "rtx-4091", "near names: rtx-4090")


def test_the_commands_own_flags_are_not_ours(cli):
    """The trap: without --, `python train.py --lr 1` would be a wrong flag of gcbench."""
    found = cli("dry-run", "--device", "rtx-4091", "python", "train.py", "--lr", "1")
    assert found.code == 3 and "rtx-4091" in found.err


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no program 'pyton'"):
        process.interpreter_of(["pyton", "train.py"])


def test_the_interpreter_is_that_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, first in (("tool", f"#!{sys.executable}\n"), ("other", "#!/bin/sh\n")):
        (tmp_path / name).write_text(first, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert process.interpreter_of([sys.executable, "x.py"]) == Path(sys.executable)
    assert process.interpreter_of(["tool"]) == Path(sys.executable)
    assert process.interpreter_of(["other"]) == Path(sys.executable)


def test_the_environment_is_the_commands_alone(tmp_path):
    before = dict(os.environ)
    added = process.child_environment(
        {"PYTHONPATH": "/mine", "HOME": "/home/me"},
        {"LD_PRELOAD": "lib.so"},
        folder=tmp_path,
        max_steps=3,
        snapshot=Path("s.pickle"),
    )
    assert added["PYTHONPATH"].split(os.pathsep) == [str(process.STARTUP_FOLDER), "/mine"]
    assert (added["HOME"], added["LD_PRELOAD"]) == ("/home/me", "lib.so")
    settings = json.loads(added[SETTINGS_VARIABLE])
    assert settings == {"folder": str(tmp_path), "steps": 3, "snapshot": str(Path("s.pickle").absolute())}
    assert dict(os.environ) == before


def test_the_startup_folder_holds_nothing_else():
    """It is first in PYTHONPATH: any other module in it would hide one of the script's."""
    assert [path.name for path in process.STARTUP_FOLDER.iterdir() if path.suffix == ".py"] == ["sitecustomize.py"]
    assert not (process.STARTUP_FOLDER / "__init__.py").exists()


@pytest.mark.parametrize("code", [0, 7])
def test_a_command_ends_with_its_own_exit_code(tmp_path, code):
    ended = process.run(
        [sys.executable, "-c", f"raise SystemExit({code})"], os.environ, folder=tmp_path, to_stderr=True
    )
    assert (ended.exit_code, ended.was_interrupted, ended.observed) == (code, False, ())
