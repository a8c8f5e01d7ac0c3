"""A check as a person reads it: a grid of verdicts, and beneath it what is wrong, why, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gcbench.check.cases import (
    FAILED,
    IDENTICAL,
    NOT_REPEATABLE,
    UNSUPPORTED,
    WITHIN_NOISE,
    WRONG,
    Check,
    Checked,
    Combination,
    Setting,
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

MARKS = {IDENTICAL: "=", WITHIN_NOISE: "≈", WRONG: "✗", FAILED: "!", NOT_REPEATABLE: "?", UNSUPPORTED: "–"}
_MEANINGS = {
    IDENTICAL: "gradients bit-identical to off",
    WITHIN_NOISE: "equal within the noise of the kernels",
    WRONG: "WRONG",
    FAILED: "failed",
    NOT_REPEATABLE: NOTHING_SHOWN,
    UNSUPPORTED: "not possible",
}
PLAIN = "plain: fp32, adamw_torch, all parameters trained, the model's own attention; the other lines say what differs"
_STYLES = {
    IDENTICAL: "green",
    WITHIN_NOISE: "green",
    WRONG: "bold red",
    FAILED: "bold red",
    NOT_REPEATABLE: "bold yellow",
    UNSUPPORTED: "dim",
}


_MOST_LABELS = 4
"""Settings that are named; the table shows all."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Combinations that ended in the same way for the same reason."""

    verdict: str
    message: str
    where: tuple[Combination, ...]
    cause: str | None
    remedy: str | None
    link: str | None


def title(check: Check) -> str:
    """What was trained."""
    known = check.num_params is not None
    size = f" · {format_count(check.num_params)} parameters, {counted(check.num_layers or 0, 'layer')}" if known else ""
    return f"{_name(check)}{size} · {check.device}" + (f" · {check.scaled}" if check.scaled else "")


def _name(check: Check) -> str:
    return model_changes.named(check.model, check.model_changes)


def problems(check: Check) -> tuple[Problem, ...]:
    """What is wrong, worst first, then what was not possible; what has one cause or says the same, together."""
    groups: dict[tuple[str, str], list[tuple[Checked, Combination]]] = {}
    for result in check.results:
        if not result.is_shown:
            asked = check.combinations[result.number]
            # Where a cause is known, or off is to blame, other figures and strategies do not make it another problem.
            said = result.cause or _without_setting(result.message or "", asked)
            key = (result.verdict, NOT_REPEATABLE if result.verdict == NOT_REPEATABLE else said)
            groups.setdefault(key, []).append((result, asked))
    order = (WRONG, FAILED, NOT_REPEATABLE, UNSUPPORTED)
    found = [
        Problem(
            verdict=verdict,
            message=_without_setting(pairs[0][0].message or "", pairs[0][1]),
            where=tuple(asked for _, asked in pairs),
            cause=pairs[0][0].cause,
            remedy=pairs[0][0].remedy,
            link=pairs[0][0].link,
        )
        for (verdict, _), pairs in groups.items()
    ]
    return tuple(sorted(found, key=lambda problem: order.index(problem.verdict)))


def summary(check: Check) -> str:
    """The answer, in a few sentences."""
    counts = {verdict: sum(r.verdict == verdict for r in check.results) for verdict in MARKS}
    done = len(check.results)
    good = counts[IDENTICAL] + counts[WITHIN_NOISE]
    parts = [f"{good} of {counted(done, 'combination')} {'trains' if done == 1 else 'train'} with the gradients of off"]
    if counts[IDENTICAL] and counts[WITHIN_NOISE]:
        parts[0] += f" ({counts[IDENTICAL]} bit by bit)"
    elif counts[IDENTICAL]:
        parts[0] += ", bit by bit"
    for verdict, words in (
        (WRONG, "wrong"),
        (FAILED, "failed"),
        (NOT_REPEATABLE, "not to be judged, as off does not repeat itself"),
        (UNSUPPORTED, "not possible here"),
    ):
        if counts[verdict]:
            parts.append(f"{counts[verdict]} {words}")
    text = "; ".join(parts) + "."
    if any(r.is_bad for r in check.results) and not check.failures:
        text += " What is wrong is wrong with the reentrant variant alone, which is there to show it."
    recomputed = [r for r in check.results if r.layers_recomputed is not None]
    if recomputed and all(r.layers_recomputed == r.layers_expected for r in recomputed):
        text += " Every layer that was to be recomputed was, and no other."
    return text


def _without_setting(message: str, asked: Combination) -> str:
    """A message that begins with the name of its setting, without it: others say the same of theirs."""
    return message.removeprefix(f"{asked.setting.label} ")


def where(problem: Problem, check: Check) -> str:
    """`reentrant with lora and with frozen-base`; one name alone where all that was tried with it is meant."""
    if len(problem.where) > 1 and len(problem.where) == len(check.combinations):
        return "everything that was tried"
    strategies = _whole(check, problem, lambda asked: asked.strategy)
    settings = _whole(check, problem, lambda asked: asked.setting.label)
    if all(asked.setting.label in settings for asked in problem.where):
        return f"all strategies with {_few(settings)}"
    by_strategy: dict[str, list[str]] = {}
    for asked in problem.where:
        by_strategy.setdefault(asked.strategy, []).append(asked.setting.label)
    by_labels: dict[str, list[str]] = {}
    for strategy, labels in by_strategy.items():
        by_labels.setdefault("every setting" if strategy in strategies else _few(labels), []).append(strategy)
    return "; ".join(f"{listed(names)} with {labels}" for labels, names in by_labels.items())


def _few(labels: Sequence[str]) -> str:
    return " and with ".join(labels) if len(labels) <= _MOST_LABELS else f"{labels[0]} and {len(labels) - 1} others"


def _whole(check: Check, problem: Problem, name: Callable[[Combination], str]) -> list[str]:
    """Those names, of strategies or of settings, of which all that was tried, and more than once, is in the problem."""
    tried, met = Counter(map(name, check.combinations)), Counter(map(name, problem.where))
    return [each for each in met if met[each] == tried[each] > 1]


def _grid(check: Check) -> tuple[list[str], list[Setting], dict[tuple[Setting, str], Checked]]:
    found = {(check.combinations[r.number].setting, check.combinations[r.number].strategy): r for r in check.results}
    names = list(dict.fromkeys(c.strategy for c in check.combinations))
    return names, list(dict.fromkeys(c.setting for c in check.combinations)), found


@dataclass(frozen=True, kw_only=True)
class View:
    """A rich renderable."""

    check: Check

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        names, settings, found = _grid(self.check)
        yield Text(title(self.check), style="bold")
        label_width = max(len(setting.label) for setting in settings) + 2
        for block in _blocks(names, options.max_width - label_width):
            rows = [s for s in settings if any((s, name) in found for name in block)]
            if not rows:  # the check ended before them
                continue
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
            table.add_column("", no_wrap=True)
            for name in block:
                table.add_column(Text("\n".join(_parts(name))), justify="center", vertical="bottom")
            for setting in rows:
                cells = [found.get((setting, name)) for name in block]
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
            for name, said in _told(problem):
                if name == "see":
                    yield unbroken(f"  {name:<8}{said}")
                    continue
                grid = Table.grid(padding=(0, 2, 0, 0))
                grid.add_column(width=8)
                grid.add_column(overflow="fold")
                grid.add_row(f"  {name}", said)
                yield grid
        yield Text("")
        for notice in self.check.notices:
            yield Text(notice, style="bold")
        yield Text(summary(self.check))
        yield Text(times(self.check), style="dim")


def _blocks(names: Sequence[str], width: int) -> Iterator[list[str]]:
    """As many columns beside each other as there is room for."""
    block: list[str] = []
    taken = 0
    for name in names:
        wide = max(map(len, _parts(name))) + 2
        if block and taken + wide > width:
            yield block
            block, taken = [], 0
        block.append(name)
        taken += wide
    yield block


def _parts(name: str) -> list[str]:
    """A strategy's name in lines: broken at its joints."""
    return name.replace("+", "+\n").replace(":", ":\n").split("\n") if len(name) > 9 else [name]


def _told(problem: Problem) -> Iterator[tuple[str, str]]:
    yield "seen", problem.message
    for name, said in (("cause", problem.cause), ("remedy", problem.remedy), ("see", problem.link)):
        if said is not None:
            yield name, said


def times(check: Check) -> str:
    """What it took."""
    return f"{format_seconds(check.wall_s)}, of which {format_seconds(check.steps_s)} in training steps"


def markdown(check: Check) -> str:
    """The whole check as Markdown."""
    names, settings, found = _grid(check)
    lines = [f"# gcbench check: {_name(check)}", "", title(check), "", f"`{check.command}`", ""]
    lines += ["| | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines += ["| --- |" + " :-: |" * len(names)]
    for setting in settings:
        cells = [found.get((setting, name)) for name in names]
        lines.append(f"| {setting.label} | " + " | ".join(_cell(c) for c in cells) + " |")
    lines += ["", *(f"- {notice}" for notice in check.notices), *([""] if check.notices else [])]
    lines += [summary(check), ""]
    for problem in problems(check):
        lines += [f"## {problem.verdict}: {where(problem, check)}", ""]
        lines += [f"- {name}: {said}" for name, said in _told(problem)]
        lines.append("")
    lines += [times(check), "", ", ".join(f"{name} {version}" for name, version in check.versions.items())]
    return "\n".join(lines) + "\n"


def _cell(result: Checked | None) -> str:
    if result is None:
        return ""
    if result.verdict == WITHIN_NOISE and result.grad_rel_diff:
        return f"within noise ({result.grad_rel_diff:.1g})"
    return f"**{result.verdict}**" if result.is_bad else result.verdict


def show(check: Check) -> None:
    """Print it on standard output, as wide as the screen is."""
    print_all([View(check=check)])


def rendered(check: Check, format: str) -> str:
    """The check in one of the formats of `gcbench report` that are text."""
    from dataclasses import asdict

    from gcbench.report.formats import csv_table, json_rows

    if format == "markdown":
        return markdown(check)
    if format == "terminal":
        return plain(check, width=120)
    table = [asdict(row) for row in rows(check)]
    return csv_table.table(table) if format == "csv" else json_rows.document(table)


def plain(check: Check, *, width: int) -> str:
    """The same as text without styles."""
    return as_text([View(check=check)], width=width)
