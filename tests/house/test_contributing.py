"""The examples of CONTRIBUTING.md, applied to a copy of the package, do what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
EDIT = re.compile(
    r"(?P<verb>Create|Append to|In) `(?P<path>gcbench/[^`]+)`[^\n]*?(?:after[^`\n]*`(?P<anchor>[^`\n]+)`)?:\n\n"
    r"```(?:toml|python|text)\n(?P<text>.*?)```",
    re.DOTALL,
)
COMMANDS = re.compile(r"```sh\n(.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_an_example_works_as_written(tmp_path: Path, name: str):
    edits, commands = list(EDIT.finditer(SECTIONS[name])), COMMANDS.findall(SECTIONS[name])
    assert edits and commands
    shutil.copytree(ROOT / "gcbench", tmp_path / "gcbench", ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        apply(edit, tmp_path / edit["path"])
    for command in "".join(commands).splitlines():
        ended = run(command, tmp_path)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"


def apply(edit: re.Match[str], path: Path) -> None:
    if edit["verb"] == "Create":
        assert not path.exists()
        path.write_text(edit["text"], encoding="utf-8")
        return
    before = path.read_text(encoding="utf-8")
    if edit["verb"] == "Append to":
        path.write_text(f"{before}\n{edit['text']}", encoding="utf-8")
        return
    assert before.count(edit["anchor"]) == 1, edit["anchor"]
    path.write_text(before.replace(edit["anchor"], f"{edit['anchor']}\n{edit['text'].rstrip()}"), encoding="utf-8")


def run(command: str, package: Path) -> subprocess.CompletedProcess[str]:
    """In a shell that finds `gcbench` and `python`, the package's copy before the checkout."""
    names = [
        f'{name}() {{ "{sys.executable}" {module} "$@"; }}'
        for name, module in (("gcbench", "-m gcbench"), ("python", ""))
    ]
    shell = "; ".join([*names, "set -o pipefail", command])
    (package / "results").mkdir(exist_ok=True)
    reference = package / "results" / "reference"
    if not reference.exists():
        reference.symlink_to(ROOT / "results" / "reference")
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", shell], cwd=package, env=environment, capture_output=True, text=True, timeout=300
    )
