"""The README is short, shows what the committed results say, and its commands run as they are written."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import write_pages
from conftest import ROOT
from test_docs import FENCE, commands

from gcbench.cli import app as cli
from gcbench.models import catalogue

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
NEEDS_MORE = ("gcbench run ", "gcbench dry-run ")
"""Takes more than a minute without a card; needs a CUDA build of torch (tests/dry_run, where there is one)."""


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) <= 1600


def test_the_first_table_shows_time_paid_with_an_interval_without_zero():
    """The trap: a first example that shows no difference."""
    table = write_pages.BLOCK.search(TEXT)
    assert table and table["name"] == "table"
    paid = re.search(r"per-layer saves \d+ % of peak memory for \d+ % more time \(95 %: (\d+) to \d+ %\)", table[0])
    assert paid and int(paid[1]) > 0


def test_it_names_every_command_or_the_page_that_does():
    pages = TEXT + (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert f"gcbench {command.name or command.callback.__name__}" in pages
    for name in ("run", "predict", "plan", "check"):
        assert f"```sh\ngcbench {name}" in TEXT


def test_it_counts_the_architectures():
    assert f"The {len(catalogue.architectures())}\narchitectures" in TEXT


def test_its_program_is_python():
    for language, text in FENCE.findall(TEXT):
        if language == "python":
            ast.parse(text)


RUN_HERE = [line for line in commands(README) if not line.startswith(NEEDS_MORE)]


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=() if "--from" in line else pytest.mark.slow, id=line[:30]) for line in RUN_HERE]
)
def test_a_command_runs_as_written(tmp_path: Path, line: str):
    """Offline, in an empty folder that has the committed results."""
    (tmp_path / "results").mkdir()
    shutil.copytree(ROOT / "results" / "reference", tmp_path / "results" / "reference")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    program = f'gcbench() {{ "{sys.executable}" -m gcbench "$@"; }}; {line}'
    ended = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.strip()
