"""Start-up, and what a reader of the code may rely on: every command explained, every module told, none too long."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT
from fixtures_report import mixed_report
from parent_imports import HEAVY, imported

from gcbench.report import report_file as reports

MODULES = sorted((ROOT / "gcbench").rglob("*.py"))


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("run", "--help"), 0),
        (("run", "--modle", "gpt2"), 2),
        (("run", "--model", "gpt2", "--batch", "0"), 2),
        (("nonsense",), 2),
        (("models",), 0),
        (("strategies",), 0),
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(args, code):
    """The trap: two to four seconds of imports before a word about a wrong flag."""
    ended, names = imported(*args)
    assert ended == code
    assert not names & set(HEAVY)


@pytest.mark.parametrize("format", ["terminal", "markdown", "csv", "json"])
def test_a_stored_run_is_shown_without_torch(tmp_path, format):
    reports.save(mixed_report(), tmp_path)
    code, names = imported("report", tmp_path, "--format", format)
    assert code == 0
    assert not names & {"torch", "transformers"}


def test_plots_are_drawn_without_torch(tmp_path):
    reports.save(mixed_report(), tmp_path)
    code, names = imported("report", tmp_path, "--format", "png")
    assert code == 0
    assert "matplotlib" in names and not names & {"torch", "transformers"}


def test_the_parent_of_a_run_never_imports_torch(model):
    """The trap: 400 MB in the process that has to survive when memory runs out."""
    code, names = imported(
        *("run", "-m", model(), "-b", 1, "--seq-len", 8, "--strategies", "off", "--rounds", 1, "--steps", 1),
        *("--device", "cpu", "--quiet", "--out", model() / "run"),
    )
    assert code == 0
    assert not names & {"torch", "transformers"}


def test_every_command_is_explained_in_the_help(cli):
    from gcbench.cli.app import app

    told = cli("--help")
    assert told.code == 0
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert {"run", "compare", "report", "models", "strategies", "env"} <= set(names)
    for name in names:
        assert re.search(rf"^\W*{name}\s+\S.*\S", told.out, flags=re.MULTILINE), name
        own = cli(name, "--help")
        assert own.code == 0 and name in own.out


def test_no_arguments_show_the_help(cli):
    assert "Usage:" in cli().out


def test_both_words_for_the_subject_are_in_the_help(cli):
    """People look for "gradient" and for "activation" checkpointing."""
    told = cli("run", "--help").out
    assert "Gradient checkpointing" in told and "activation checkpointing" in told


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for_and_stays_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)) or (path.name == "__init__.py" and not text.strip())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_set_up_at_import(path):
    """No logging, no environment, no device: whoever imports a module decides about these.

    But for the two modules that are there for what their import does.
    """
    if path.name in ("preload.py", "sitecustomize.py"):
        pytest.skip("imported at the start of child processes alone, for what its import does")
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), f"line {statement.lineno} does something at import"
