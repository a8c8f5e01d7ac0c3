"""README.md and docs/ are as the code and the committed results make them, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import typer
import write_pages
from conftest import ROOT

from gcbench.cli import app as cli
from gcbench.core import errors
from gcbench.strategies import kinds

PAGES = write_pages.pages()
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call gcbench, without comments."""
    blocks = [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language == "sh"]
    lines = [line.partition(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("gcbench ")]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_generated_blocks_are_up_to_date(page: Path):
    """The trap: a table pasted by hand goes stale. `make docs` or GCBENCH_REWRITE_GOLDEN=1 writes it anew."""
    text = page.read_text(encoding="utf-8")
    fresh = write_pages.rewritten(text)
    if os.environ.get("GCBENCH_REWRITE_GOLDEN"):
        page.write_text(fresh, encoding="utf-8")
        text = fresh
    assert text == fresh


def test_the_page_of_commands_depends_on_no_terminal(monkeypatch):
    """The trap: help texts that are wrapped or coloured for the terminal at hand."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    narrow = write_pages.commands("")
    monkeypatch.setenv("COLUMNS", "200")
    assert write_pages.commands("") == narrow
    assert "\x1b" not in narrow


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(FENCE.sub("", text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ ([^\n]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(write_pages.anchor, titles), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_has_flags_that_exist(page: Path):
    group = typer.main.get_command(cli.app)
    for line in commands(page):
        if "…" in line or "[OPTIONS]" in line:
            continue
        name, *arguments = shlex.split(line.partition(" | ")[0])[1:]
        command = group.commands[name]
        command.make_context(name, arguments, parent=typer.Context(group, info_name="gcbench"))


def test_the_page_of_strategies_explains_every_kind():
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    for kind in kinds():
        assert f"## `{kind.syntax}`" in text, kind.syntax


def test_every_exit_code_is_explained():
    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    for code in {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}:
        assert f"| {code} |" in text


def test_every_reference_result_has_its_line_on_the_page_of_accuracy():
    """The trap: a published figure that nobody can make again."""
    text = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for path in (ROOT / "results" / "reference").iterdir():
        assert path.name in text or path.stem in text, path.name


def test_every_package_is_on_the_page_of_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in (ROOT / "gcbench").glob("*/__init__.py"):
        assert f"  {package.parent.name}/ " in text, package.parent.name
