"""Writes the generated blocks of README.md and docs/*.md from committed results, `--help` and tables of the code.

    python docs/write_pages.py          (make docs)

A block lies between `<!-- NAME: ARGUMENT -->` and `<!-- end -->`; `BLOCKS` maps each name to the function that writes
it. Nothing depends on the terminal's width or colours. `tests/house/test_docs.py` holds every page to this script.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import statistics
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from gcbench.cli import app as cli
from gcbench.report import report_file
from gcbench.report.formats import markdown
from gcbench.report.predictions import by_workload
from gcbench.report.rows import rows

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
WIDTH = 100
"""Characters of the terminal that `terminal` blocks are shown on."""
BLOCK = re.compile(r"(<!-- (?P<name>[a-z-]+)(?:: (?P<argument>[^\n]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold generated blocks."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """A page with its blocks written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m['name']](m['argument'] or '').strip()}\n{m[4]}", text)


def table(folder: str) -> str:
    """The Markdown table of a committed run or prediction, and the sentences beneath it."""
    stored = report_file.load(ROOT / folder)
    if stored.source == "predicted":
        return "\n\n".join(markdown.prediction(cells) for cells in by_workload(stored).values())
    return markdown.answer(rows(stored))


def terminal(argument: str) -> str:
    """What `gcbench report FOLDER` prints, or lines of it: `FOLDER lines 1-3,…,speed,off+2`: by number, or by how a
    line begins, with the rest of its sentence (or so many lines more)."""
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
    """Standard output of `gcbench report FOLDER`, run from the root of the checkout, `WIDTH` characters wide."""
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
    """The table of `gcbench strategies`."""
    return markdown.strategies()


def columns(_: str) -> str:
    """The columns of CSV and JSON in their order, with the docstrings of `core/records.py`."""
    tree = ast.parse((ROOT / "gcbench" / "core" / "records.py").read_text(encoding="utf-8"))
    row = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Row")
    found: list[list[str]] = []
    for node in row.body:
        if isinstance(node, ast.AnnAssign):
            found.append([f"`{ast.unparse(node.target)}`", ast.unparse(node.annotation).removesuffix(" | None"), ""])
        elif found and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[-1][2] = _words(str(node.value.value))
    return _table(["column", "type", "meaning, where the name does not say it"], found)


def causes(_: str) -> str:
    """The known causes, in the order in which they are tried."""
    text = (ROOT / "gcbench" / "diagnoses" / "known_causes.toml").read_text(encoding="utf-8")
    return _table(
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
    """Every command with its options, from the same definitions as `--help`."""
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
        lines += ["", _table(["argument", ""], [[f"`{each.metavar}`", _words(each.help)] for each in arguments])]
    for panel, options in panels.items():
        shown = [[_spelling(each), _value(each, command.callback), _help(each)] for each in options]
        lines += ["", _table([panel.lower(), "value", ""], shown)]
    return "\n".join(lines)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))


def _words(text: str | None) -> str:
    """A help text as it is, whatever library wraps it."""
    return " ".join((text or "").split())


def _spelling(option: Any) -> str:
    return ", ".join(f"`{each}`" for each in sorted(option.opts, key=lambda each: (each.startswith("--"), 0)))


def _value(option: Any, callback: Any) -> str:
    """What an option takes, from its metavar or the annotation of its parameter."""
    if option.is_flag:
        return ""
    kinds = str(typing.get_type_hints(callback, globalns=vars(sys.modules[cli.__name__])).get(option.name))
    return f"`{option.metavar or ('PATH' if 'Path' in kinds else 'TEXT')}`"


def _help(option: Any) -> str:
    text = _words(option.help)
    if option.default in (None, False) or "default" in text:
        return text
    return f"{text} (default: {option.default})"


def index(_: str) -> str:
    """The entries of docs/decisions.md by section; the page itself is read, since a block is given no text."""
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    lines: list[str] = []
    for kind, title, after in re.findall(r"^(##|###) ([^\n]+)\n\n(?=([^\n]*))", text, re.MULTILINE):
        mark = " *(superseded in part)*" if after.startswith("*Superseded in part") else ""
        mark = mark or (" *(superseded)*" if after.startswith("*Superseded") else "")
        lines.append(f"- **{title}**" if kind == "##" else f"  - [{title}](#{anchor(title)}){mark}")
    return "\n".join(lines)


def anchor(title: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def accuracy(_: str) -> str:
    """How far off predictions, plans and proofs are; every figure from a file in results/reference."""
    grids = _stored("accuracy")["truths"]
    card = grids["truth-nvidia-h100-80gb-hbm3"]
    cpus = [grid["figures"] for name, grid in grids.items() if "-cpu-" in name]
    seen = card["figures"]
    reserved = max(abs(each["reserved_error"]) for each in card["errors"] if each["reserved_error"] is not None)
    here = f"H100, torch {card['machine']['versions']['torch'].partition('+')[0]}"
    workloads = len({each["case"] for each in card["errors"]})
    cells = f"{seen['cells']} of {seen['cells'] + seen['without a prediction']} cells, {workloads} workloads"
    choices = _choices()
    fits = [choice for choice in choices if choice.fits]
    speeds = [choice.speed_frac for choice in choices]
    trained, types = _families()
    on_cpu = sum(each["cells"] for each in cpus)
    return _table(
        ["figure", "compared with", "cases", "error", "not validated"],
        [
            [
                "peak allocated, CUDA",
                here,
                cells,
                f"median {_percent(seen['median'], 4)}, worst {_percent(seen['worst'], 3)}; "
                f"right phase in {_percent(seen['phases'])}",
                "other cards",
            ],
            [
                "peak reserved, CUDA",
                here,
                "the same",
                f"median {_percent(seen['reserved, median'], 3)}, worst {_percent(reserved, 1)}",
                "other cards",
            ],
            [
                "peak, CPU",
                "two processors",
                f"{on_cpu} cells",
                f"worst {_percent(max(each['worst'] for each in cpus), 4)}; "
                f"right phase in {_percent(min(each['phases'] for each in cpus))}",
                "other processors",
            ],
            [
                "the choice of `plan`",
                "all settings measured, CPU",
                f"{len(choices)} budgets",
                f"fits in {len(fits)}; speed over the best: median {_percent(statistics.median(speeds), 1)}, "
                f"worst {_percent(min(speeds), 1)}",
                "absolute times; choices on a card",
            ],
            [
                "gradients",
                "`off`, CPU, scaled down",
                f"{types} model types",
                f"{trained} train with those of `off` under every strategy but `reentrant`",
                "full size",
            ],
        ],
    )


def _percent(fraction: float, places: int = 0) -> str:
    return f"{100 * fraction:.{places}f} %"


def _choices() -> list[Any]:
    sys.path.append(str(ROOT / "benchmarks"))
    try:
        import regret
    finally:
        sys.path.pop()
    return [
        each for workload in _stored("regret-cpu-amd-epyc")["workloads"].values() for each in regret.scores(workload)
    ]


def _families() -> tuple[int, int]:
    """How many types of causal LMs train with the gradients of off under every strategy that they can take but
    `reentrant`, and of how many."""
    types = _stored("families")["types"]
    same = {"identical", "within noise"}
    good = 0
    for each in types:
        verdicts = [row["verdict"] for row in each.get("rows", ()) if row["strategy"] != "reentrant"]
        tried = {verdict for verdict in verdicts if verdict != "unsupported"}
        good += bool(tried) and tried <= same
    return good, len(types)


def _stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


BLOCKS: dict[str, Callable[[str], str]] = {
    "table": table,
    "terminal": terminal,
    "strategies": strategies,
    "columns": columns,
    "causes": causes,
    "commands": commands,
    "index": index,
    "accuracy": accuracy,
}


if __name__ == "__main__":
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (fresh := rewritten(text)) != text:
            page.write_text(fresh, encoding="utf-8")
            print(page.relative_to(ROOT))
