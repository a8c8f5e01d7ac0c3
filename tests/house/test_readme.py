"""The README shows what the committed run says, and speaks of every command and exit code there is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from gcbench.check import cases as checks
from gcbench.check import view
from gcbench.cli import app as cli
from gcbench.core import errors, json_codec
from gcbench.core.records import Report
from gcbench.models import catalogue
from gcbench.report import report_file as reports
from gcbench.report.formats.markdown import answer, prediction, strategies
from gcbench.report.predictions import by_workload
from gcbench.report.rows import rows
from gcbench.strategies import kinds

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def shown(report: Report) -> str:
    if report.source == "predicted":
        return "\n\n".join(prediction(cells) for cells in by_workload(report).values())
    return answer(rows(report))


def holds(pattern: re.Pattern[str], written: Callable[[re.Match[str]], str]) -> None:
    """The README has such a part, and it is as it would be written now; GCBENCH_REWRITE_GOLDEN=1 writes it anew."""
    text = README.read_text(encoding="utf-8")
    fresh = pattern.sub(written, text)
    if os.environ.get("GCBENCH_REWRITE_GOLDEN"):
        README.write_text(fresh, encoding="utf-8")
    assert pattern.search(text)
    assert fresh == README.read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_runs():
    """The trap: a table pasted by hand goes stale. GCBENCH_REWRITE_GOLDEN=1 writes it anew."""
    holds(TABLE, lambda m: f"{m[1]}\n{shown(reports.load(ROOT / m[2]))}\n\n{m[3]}")


STRATEGIES = re.compile(r"(<!-- strategies -->\n).*?(<!-- end of strategies -->)", re.DOTALL)


def test_the_table_of_strategies_is_that_of_the_code():
    """The trap: a strategy that the README has never heard of."""
    holds(STRATEGIES, lambda m: f"{m[1]}\n{strategies()}\n\n{m[2]}")


CHECK = re.compile(r"(<!-- check: (\S+) -->\n).*?(<!-- end of check -->)", re.DOTALL)


def test_the_check_is_the_committed_one():
    """As the terminal shows it, 100 characters wide."""

    def shown_check(folder: str) -> str:
        stored = json.loads((ROOT / folder / "check.json").read_text(encoding="utf-8"))
        return view.plain(json_codec.decode(checks.Check, stored), width=100).strip()

    holds(CHECK, lambda m: f"{m[1]}\n```text\n{shown_check(m[2])}\n```\n\n{m[3]}")


PLAN = re.compile(r"(<!-- plan: (\S+) -->\n).*?(<!-- end of plan -->)", re.DOTALL)


def test_the_plan_is_the_committed_one():
    """As the terminal shows it, 100 characters wide."""
    holds(PLAN, lambda m: f"{m[1]}\n```text\n{(ROOT / m[2] / 'plan.txt').read_text('utf-8').strip()}\n```\n\n{m[3]}")


def test_the_page_of_strategies_explains_every_kind():
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    for kind in kinds():
        assert f"## `{kind.syntax}`" in text, kind.syntax
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_every_command_and_exit_code_is_there():
    text = README.read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert f"gcbench {command.callback.__name__}" in text
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    for code in codes:
        assert f"| {code} |" in text
    assert f"{len(catalogue.architectures())} architectures" in text
