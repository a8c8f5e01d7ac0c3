"""Writes the generated blocks of README.md and docs/*.md from committed results, `--help` and tables of the code.

    python docs/write_pages.py          (make docs)

A block lies between `<!-- NAME: ARGUMENT -->` and `<!-- end -->`; `BLOCKS` maps each name to the function that writes
it. Nothing depends on the terminal's width or colours. `tests/house/test_docs.py` holds every page to this script.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import published_figures
import typer
from published_figures import markdown_table

from gcbench.cli import app as cli
from gcbench.report import report_file
from gcbench.report.formats import markdown
from gcbench.report.predictions import by_workload
from gcbench.report.rows import rows

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
"""Characters of the terminal that `terminal` blocks are shown on."""
BLOCK = re.compile(r"(<!-- (?P<name>[a-z-]+)(?:: (?P<argument>[^\n]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """List the pages that may have generated blocks."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """Return the text of a page with its blocks written again."""
    return BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m['name']](m['argument'] or '').strip()}\n{m[4]}", text)


def table(folder: str) -> str:
    """Return the Markdown table of a committed run or prediction, and the sentences beneath it."""
    stored = report_file.load(ROOT / folder)
    if stored.source == "predicted":
        return "\n\n".join(markdown.prediction(cells) for cells in by_workload(stored).values())
    return markdown.answer(rows(stored))


def terminal(argument: str) -> str:
    """Return what `gcbench report FOLDER` prints, or lines of it, as in `FOLDER lines 1-3,…,speed,off+2`.

    A line is chosen by its number, or by how it begins, with the rest of its sentence or so many lines more.
    """
    folder, _, chosen = argument.partition(" lines ")
    shown = [line.rstrip() for line in reported(folder).rstrip().splitlines()]
    if chosen:
        shown = [line for part in chosen.split(",") for line in _lines(shown, part)]
    return "\n".join(["```text", *shown, "```"])


def _lines(shown: list[str], part: str) -> list[str]:
    if part == "…":
        return ["…"]
    if part[0].isdigit():
        first, _, last = part.partition("-")
        return shown[int(first) - 1 : int(last or first)]
    begin, plus, more = part.rpartition("+")
    counted = plus and more.isdigit()
    start = next(i for i, line in enumerate(shown) if line.strip().startswith(begin if counted else part))
    if counted:
        return shown[start : start + 1 + int(more)]
    end = start + 1
    while end < len(shown) and _indent(shown[end]) >= _indent(shown[start]) + 8:  # the rest of a wrapped sentence
        end += 1
    return shown[start:end]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def reported(folder: str) -> str:
    """Run `gcbench report FOLDER` in the root of the checkout, `WIDTH` characters wide; return its standard output."""
    out = io.StringIO()
    with _narrow(), contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.app(["report", folder], standalone_mode=False)
    return out.getvalue()


@contextlib.contextmanager
def _narrow() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def strategies(_: str) -> str:
    """Return the table of `gcbench strategies`."""
    return markdown.strategies()


def columns(_: str) -> str:
    """Return the columns of CSV and JSON in their order, with the docstrings of `core/records.py`."""
    tree = ast.parse((ROOT / "gcbench" / "core" / "records.py").read_text(encoding="utf-8"))
    row = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Row")
    found: list[list[str]] = []
    for node in row.body:
        if isinstance(node, ast.AnnAssign):
            found.append([f"`{ast.unparse(node.target)}`", ast.unparse(node.annotation).removesuffix(" | None"), ""])
        elif found and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[-1][2] = _words(str(node.value.value))
    return markdown_table(["column", "type", "meaning, where the name does not say it"], found)


def causes(_: str) -> str:
    """Return the known causes, in the order in which they are tried."""
    text = (ROOT / "gcbench" / "diagnoses" / "known_causes.toml").read_text(encoding="utf-8")
    return markdown_table(
        ["name", "what is seen", "cause", "remedy", "thread"],
        [
            [f"`{each['name']}`", each["symptom"], each["cause"], each["remedy"], _thread(each["link"])]
            for each in tomllib.loads(text)["diagnosis"]
        ],
    )


def _thread(link: str) -> str:
    owner, repo, _, number = link.removeprefix("https://github.com/").split("/")[:4]
    return f"[{owner}/{repo}#{number}]({link})"


def commands(_: str) -> str:
    """Return every command with its options, from the same definitions as `--help`."""
    group = typer.main.get_command(cli.app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())  # type: ignore[attr-defined]


def _command(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    panels: dict[str, list[Any]] = {}
    for each in command.params:
        if each.param_type_name == "option" and not each.hidden and "--help" not in each.opts:
            panels.setdefault(getattr(each, "rich_help_panel", None) or "Options", []).append(each)
    usage = " ".join(["gcbench", name, *(each.metavar for each in arguments), "[OPTIONS]"])
    lines = [f"## `gcbench {name}`", "", f"```sh\n{usage}\n```", "", _paragraphs(command.help)]
    if arguments:
        lines += [
            "",
            markdown_table(["argument", ""], [[f"`{each.metavar}`", _words(each.help)] for each in arguments]),
        ]
    for panel, options in panels.items():
        shown = [[_spelling(each), _value(each, command.callback), _help(each)] for each in options]
        lines += ["", markdown_table([panel.lower(), "value", ""], shown)]
    return "\n".join(lines)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))


def _words(text: str | None) -> str:
    """Return a text on one line."""
    return " ".join((text or "").split())


def _spelling(option: Any) -> str:
    return ", ".join(f"`{each}`" for each in sorted(option.opts, key=lambda each: (each.startswith("--"), 0)))


def _value(option: Any, callback: Any) -> str:
    """Return an option's metavar, or one for the annotation of its parameter."""
    if option.is_flag:
        return ""
    kinds = str(typing.get_type_hints(callback, globalns=vars(sys.modules[callback.__module__])).get(option.name))
    return f"`{option.metavar or ('PATH' if 'Path' in kinds else 'TEXT')}`"


def _help(option: Any) -> str:
    text = _words(option.help)
    if option.default in (None, False) or "default" in text:
        return text
    return f"{text} (default: {option.default})"


def index(_: str) -> str:
    """Return the entries of docs/decisions.md by section, which are read from the stored page."""
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    lines: list[str] = []
    for kind, title, after in re.findall(r"^(##|###) ([^\n]+)\n\n(?=([^\n]*))", text, re.MULTILINE):
        mark = " *(superseded in part)*" if after.startswith("*Superseded in part") else ""
        mark = mark or (" *(superseded)*" if after.startswith("*Superseded") else "")
        lines.append(f"- **{title}**" if kind == "##" else f"  - [{title}](#{anchor(title)}){mark}")
    return "\n".join(lines)


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


BLOCKS: dict[str, Callable[[str], str]] = {
    "table": table,
    "terminal": terminal,
    "strategies": strategies,
    "columns": columns,
    "causes": causes,
    "commands": commands,
    "index": index,
    "accuracy": published_figures.accuracy,
    "frontier": published_figures.frontier,
    "frontier-measured": published_figures.frontier_measured,
}


if __name__ == "__main__":
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (fresh := rewritten(text)) != text:
            page.write_text(fresh, encoding="utf-8")
            print(page.relative_to(ROOT))
