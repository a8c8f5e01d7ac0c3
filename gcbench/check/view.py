"""Renders a check as text and Markdown: a grid of verdicts, and for each problem its message, cause and remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gcbench.check.cases import (
    FAILED,
    IDENTICAL,
    NOT_REPEATABLE,
    RUNS,
    UNSUPPORTED,
    WITHIN_NOISE,
    WRONG,
    Check,
    CheckResult,
    CheckSetting,
    Combination,
    rows,
)
from gcbench.core import model_changes
from gcbench.core.text_table import plain as as_text
from gcbench.core.text_table import show as print_all
from gcbench.core.text_table import unbroken
from gcbench.core.units import counted, format_count, format_seconds
from gcbench.report.rows import NOTHING_SHOWN
from gcbench.report.sentences import listed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

MARKS = {IDENTICAL: "=", WITHIN_NOISE: "≈", RUNS: "○", WRONG: "✗", FAILED: "!", NOT_REPEATABLE: "?", UNSUPPORTED: "–"}
_MEANINGS = {
    IDENTICAL: "gradients bit-identical to off",
    WITHIN_NOISE: "equal to off within the kernels' run-to-run noise",
    RUNS: "ran without an error; its gradients were not compared",
    WRONG: "WRONG",
    FAILED: "failed",
    NOT_REPEATABLE: NOTHING_SHOWN,
    UNSUPPORTED: "unsupported",
}
PLAIN = (
    "plain: fp32, adamw_torch, all parameters trained, the model's default attention; other rows are named by what "
    "differs"
)
_STYLES = {
    IDENTICAL: "green",
    WITHIN_NOISE: "green",
    RUNS: "green",
    WRONG: "bold red",
    FAILED: "bold red",
    NOT_REPEATABLE: "bold yellow",
    UNSUPPORTED: "dim",
}


_MOST_LABELS = 4
"""The most settings to list by name in a sentence; the table shows all."""


@dataclass(frozen=True, kw_only=True)
class SharedProblem:
    """Combinations with the same verdict for the same reason."""

    verdict: str
    message: str
    where: tuple[Combination, ...]
    cause: str | None
    remedy: str | None
    link: str | None


def title(check: Check) -> str:
    """Name the model that was trained, its size and the device."""
    known = check.num_params is not None
    size = f" · {format_count(check.num_params)} parameters, {counted(check.num_layers or 0, 'layer')}" if known else ""
    return f"{_name(check)}{size} · {check.device}" + (f" · {check.scaled}" if check.scaled else "")


def _name(check: Check) -> str:
    return model_changes.named(check.model, check.model_changes)


def problems(check: Check) -> tuple[SharedProblem, ...]:
    """Group results without a good verdict by verdict and cause, or message; worst first, unsupported last."""
    groups: dict[tuple[str, str], list[tuple[CheckResult, Combination]]] = {}
    for result in check.results:
        if not result.is_shown and result.verdict != RUNS:
            combination = check.combinations[result.number]
            # Where the cause is known, or is in off, results with other figures are the same problem.
            reason = result.cause or _without_setting(result.message or "", combination)
            key = (result.verdict, NOT_REPEATABLE if result.verdict == NOT_REPEATABLE else reason)
            groups.setdefault(key, []).append((result, combination))
    order = (WRONG, FAILED, NOT_REPEATABLE, UNSUPPORTED)
    grouped = [
        SharedProblem(
            verdict=verdict,
            message=_without_setting(pairs[0][0].message or "", pairs[0][1]),
            where=tuple(combination for _, combination in pairs),
            cause=pairs[0][0].cause,
            remedy=pairs[0][0].remedy,
            link=pairs[0][0].link,
        )
        for (verdict, _), pairs in groups.items()
    ]
    return tuple(sorted(grouped, key=lambda problem: order.index(problem.verdict)))


def summary(check: Check) -> str:
    """Summarize the verdicts in a few sentences."""
    counts = {verdict: sum(r.verdict == verdict for r in check.results) for verdict in MARKS}
    done = len(check.results)
    good = counts[IDENTICAL] + counts[WITHIN_NOISE]
    parts = [f"{good} of {counted(done, 'combination')} {'trains' if done == 1 else 'train'} with the gradients of off"]
    if check.is_emulated:
        runs = "runs" if done == 1 else "run"
        ran = f"{counts[RUNS]} of {counted(done, 'combination')} {runs}"
        parts = [f"{ran} on the emulated card, which computes nothing"]
    elif counts[IDENTICAL] and counts[WITHIN_NOISE]:
        parts[0] += f" ({counts[IDENTICAL]} bit-identical)"
    elif counts[IDENTICAL]:
        parts[0] += ", bit-identical"
    for verdict, words in (
        (WRONG, "wrong"),
        (FAILED, "failed"),
        (NOT_REPEATABLE, "without a verdict, as off does not repeat itself"),
        (UNSUPPORTED, "unsupported"),
    ):
        if counts[verdict]:
            parts.append(f"{counts[verdict]} {words}")
    text = "; ".join(parts) + "."
    if any(r.is_bad for r in check.results) and not check.failures:
        text += " Only the reentrant variant fails, which is tested for comparison and does not fail the check."
    recomputed = [r for r in check.results if r.layers_recomputed is not None]
    if recomputed and all(r.layers_recomputed == r.layers_expected for r in recomputed):
        text += " Exactly the planned layers were recomputed."
    if check.is_emulated:
        text += " Gradients have no values there; check them without --emulate, on the CPU or a card that is here."
    return text


def _without_setting(message: str, combination: Combination) -> str:
    """Strip the name of the setting from the start of a message, so that messages of several settings are equal."""
    return message.removeprefix(f"{combination.setting.label} ")


def where(problem: SharedProblem, check: Check) -> str:
    """Name a problem's combinations: `reentrant with lora and with frozen-base`; `all strategies with lora`."""
    if len(problem.where) > 1 and len(problem.where) == len(check.combinations):
        return "all combinations"
    strategies = _whole(check, problem, lambda combination: combination.strategy)
    settings = _whole(check, problem, lambda combination: combination.setting.label)
    if all(combination.setting.label in settings for combination in problem.where):
        return f"all strategies with {_few(settings)}"
    by_strategy: dict[str, list[str]] = {}
    for combination in problem.where:
        by_strategy.setdefault(combination.strategy, []).append(combination.setting.label)
    by_labels: dict[str, list[str]] = {}
    for strategy, labels in by_strategy.items():
        by_labels.setdefault("every setting" if strategy in strategies else _few(labels), []).append(strategy)
    return "; ".join(f"{listed(names)} with {labels}" for labels, names in by_labels.items())


def _few(labels: Sequence[str]) -> str:
    return " and with ".join(labels) if len(labels) <= _MOST_LABELS else f"{labels[0]} and {len(labels) - 1} others"


def _whole(check: Check, problem: SharedProblem, name: Callable[[Combination], str]) -> list[str]:
    """The strategies, or settings, of which all combinations, and more than one, are in the problem."""
    tested, affected = Counter(map(name, check.combinations)), Counter(map(name, problem.where))
    return [each for each in affected if affected[each] == tested[each] > 1]


def _grid(check: Check) -> tuple[list[str], list[CheckSetting], dict[tuple[CheckSetting, str], CheckResult]]:
    results = {(check.combinations[r.number].setting, check.combinations[r.number].strategy): r for r in check.results}
    names = list(dict.fromkeys(c.strategy for c in check.combinations))
    return names, list(dict.fromkeys(c.setting for c in check.combinations)), results


@dataclass(frozen=True, kw_only=True)
class View:
    """A check as a rich renderable."""

    check: Check

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        names, settings, results = _grid(self.check)
        yield Text(title(self.check), style="bold")
        label_width = max(len(setting.label) for setting in settings) + 2
        for block in _blocks(names, options.max_width - label_width):
            rows = [s for s in settings if any((s, name) in results for name in block)]
            if not rows:  # the check ended before it reached them
                continue
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
            table.add_column("", no_wrap=True)
            for name in block:
                table.add_column(Text("\n".join(_parts(name))), justify="center", vertical="bottom")
            for setting in rows:
                cells = [results.get((setting, name)) for name in block]
                table.add_row(
                    setting.label,
                    *(Text(MARKS[c.verdict], style=_STYLES[c.verdict]) if c else Text("") for c in cells),
                )
            yield table
            yield Text("")
        used = {result.verdict for result in self.check.results}
        for verdict in MARKS:
            if verdict in used:
                yield Text(f"{MARKS[verdict]} {_MEANINGS[verdict]}")
        yield Text(PLAIN, style="dim")
        for problem in problems(self.check):
            yield Text("")
            yield Text.assemble((f"{MARKS[problem.verdict]} {where(problem, self.check)}", "bold"))
            for name, text in _details(problem):
                if name == "see":
                    yield unbroken(f"  {name:<8}{text}")
                    continue
                grid = Table.grid(padding=(0, 2, 0, 0))
                grid.add_column(width=8)
                grid.add_column(overflow="fold")
                grid.add_row(f"  {name}", text)
                yield grid
        yield Text("")
        for notice in self.check.notices:
            yield Text(notice, style="bold")
        yield Text(summary(self.check))
        yield Text(times(self.check), style="dim")


def _blocks(names: Sequence[str], width: int) -> Iterator[list[str]]:
    """Split the columns into blocks that fit into the width."""
    block: list[str] = []
    block_width = 0
    for name in names:
        column_width = max(map(len, _parts(name))) + 2
        if block and block_width + column_width > width:
            yield block
            block, block_width = [], 0
        block.append(name)
        block_width += column_width
    yield block


def _parts(name: str) -> list[str]:
    """Break a long strategy name into lines, after `+` and `:`."""
    return name.replace("+", "+\n").replace(":", ":\n").split("\n") if len(name) > 9 else [name]


def _details(problem: SharedProblem) -> Iterator[tuple[str, str]]:
    yield "seen", problem.message
    for name, text in (("cause", problem.cause), ("remedy", problem.remedy), ("see", problem.link)):
        if text is not None:
            yield name, text


def times(check: Check) -> str:
    """Say how long the check took."""
    return f"{format_seconds(check.wall_s)}, of which {format_seconds(check.steps_s)} in training steps"


def markdown(check: Check) -> str:
    """Render the whole check as Markdown."""
    names, settings, results = _grid(check)
    lines = [f"# gcbench check: {_name(check)}", "", title(check), "", f"`{check.command}`", ""]
    lines += ["| | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines += ["| --- |" + " :-: |" * len(names)]
    for setting in settings:
        cells = [results.get((setting, name)) for name in names]
        lines.append(f"| {setting.label} | " + " | ".join(_cell(c) for c in cells) + " |")
    lines += ["", *(f"- {notice}" for notice in check.notices), *([""] if check.notices else [])]
    lines += [summary(check), ""]
    for problem in problems(check):
        lines += [f"## {problem.verdict}: {where(problem, check)}", ""]
        lines += [f"- {name}: {text}" for name, text in _details(problem)]
        lines.append("")
    lines += [times(check), "", ", ".join(f"{name} {version}" for name, version in check.versions.items())]
    return "\n".join(lines) + "\n"


def _cell(result: CheckResult | None) -> str:
    if result is None:
        return ""
    if result.verdict == WITHIN_NOISE and result.grad_rel_diff:
        return f"within noise ({result.grad_rel_diff:.1g})"
    return f"**{result.verdict}**" if result.is_bad else result.verdict


def show(check: Check) -> None:
    """Print a check on standard output, as wide as the screen."""
    print_all([View(check=check)])


def rendered(check: Check, format: str) -> str:
    """Render a check in one of the text formats of `gcbench report`."""
    from dataclasses import asdict

    from gcbench.report.formats import csv_table, json_rows

    if format == "markdown":
        return markdown(check)
    if format == "terminal":
        return plain(check, width=120)
    table = [asdict(row) for row in rows(check)]
    return csv_table.table(table) if format == "csv" else json_rows.document(table)


def plain(check: Check, *, width: int) -> str:
    """Render a check as text without styles, at most `width` characters wide."""
    return as_text([View(check=check)], width=width)
