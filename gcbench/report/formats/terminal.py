"""Renders the tables on the screen: one per workload, with as many columns as fit, and sentences below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gcbench.core.records import Report, Row
from gcbench.core.text_table import UNKNOWN as UNKNOWN
from gcbench.core.text_table import Column as Column
from gcbench.core.text_table import Table as Table
from gcbench.core.text_table import fit as fit
from gcbench.core.text_table import plain as plain
from gcbench.core.text_table import show as print_all
from gcbench.core.units import format_bytes, format_percent, format_seconds
from gcbench.report import additions, largest, sentences, timing
from gcbench.report import explanation as explained
from gcbench.report import predictions as predicted
from gcbench.report.overview import overview
from gcbench.report.predictions import PredictedCell
from gcbench.report.rows import by_workload, failed_proof, hides_saving, rows, workload
from gcbench.strategies import OFF

if TYPE_CHECKING:
    from rich.console import RenderableType

NAME = "terminal"
SUFFIX = ".txt"


def tables(report: Report) -> list[RenderableType]:
    """Return a renderable per workload, which fits its columns to the width; before several, an overview.

    A prediction that was made with --explain adds the explanations of its peaks.
    """
    if report.source == "predicted":
        return _predicted(report, explain=report.settings.get("explain") is True)
    where = f"emulated on {sentences.emulated_card(report)}" if report.source == "emulated" else ""
    groups = by_workload(rows(report)).values()
    return [
        *_overview(report),
        *(part for group in groups for part in (_table(group, where), *_timing(report, group))),
        *largest.summaries(report),
        *_about_model(report),
    ]


def show(report: Report, *, explain: bool = False) -> None:
    """Print the tables to standard output, as wide as the screen.

    With `explain`, or for a prediction that was made with it, print the explanations of the peaks too.
    """
    print_all(_predicted(report, explain=True) if explain and report.source == "predicted" else tables(report))


def _overview(report: Report) -> list[RenderableType]:
    table = overview(report)
    return [table] if table is not None else []


def render(report: Report, *, width: int = 120) -> str:
    """Render the tables as plain text, `width` characters wide."""
    return plain(tables(report), width=width)


def table_columns(group: Sequence[Row]) -> tuple[Column, ...]:
    """Return the columns of one workload's table, as text."""

    def of(text: Callable[[Row], str]) -> tuple[str, ...]:
        return tuple(text(row) for row in group)

    memory = (
        Column(header="strategy", cells=of(lambda r: r.strategy), right=False),
        Column(header="layers recomputed", short_header="layers", cells=of(_recomputed), shorten=2, drop=6),
        Column(header="peak", cells=of(lambda r: format_bytes(r.peak_allocated_bytes))),
        Column(header="peak in", cells=of(lambda r: r.peak_phase or UNKNOWN), right=False, drop=3),
        Column(header="saved", cells=of(lambda r: format_percent(r.memory_saved_frac))),
    )
    if sentences.is_emulated(group):
        return (
            *memory,
            Column(header="reserved", cells=of(lambda r: format_bytes(r.peak_reserved_bytes)), drop=4),
            Column(header="result", cells=of(_result), right=False),
        )
    return (
        *memory,
        Column(header="step time", cells=of(step_time), short=of(lambda r: format_seconds(r.step_time_s)), shorten=4),
        Column(
            header="overhead (95 %)" if any(sentences.interval(*_limits(row)) for row in group) else "overhead",
            cells=of(overhead),
            short_header="overhead",
            short=of(_overhead_shortly),
            shorten=1,
        ),
        Column(
            header="tokens/s",
            short_header="tok/s",
            cells=of(lambda r: sentences.tokens(r.tokens_per_s)),
            shorten=2,
            drop=5,
        ),
        Column(header="proof", cells=of(proof), right=False),
    )


def step_time(row: Row) -> str:
    """Return `84.3 ms ±2 %`, with the larger half of the interval relative to the centre."""
    text = format_seconds(row.step_time_s)
    if row.step_time_s is None or row.step_time_low_s is None or row.step_time_high_s is None:
        return text
    side = max(row.step_time_s - row.step_time_low_s, row.step_time_high_s - row.step_time_s)
    return f"{text} ±{format_percent(side / row.step_time_s)}"


def overhead(row: Row) -> str:
    """Return `+27 % (22 to 33 %)`."""
    limits = sentences.interval(*_limits(row))
    return f"{_overhead_alone(row)} ({limits})" if limits and row.strategy != OFF else _overhead_alone(row)


def _limits(row: Row) -> tuple[float | None, float | None]:
    return row.time_overhead_low_frac, row.time_overhead_high_frac


def proof(row: Row) -> str:
    """Return the verdict in short, or how a failed cell ended."""
    if row.status != "ok":
        return sentences.FAILURES[row.status]
    return "FAILED" if failed_proof(row) else row.proof or UNKNOWN


def _result(row: Row) -> str:
    """Return how a cell on an emulated card ended, where there is no proof by gradients."""
    if row.status == "ok" and row.peak_allocated_bytes is not None:
        return "FAILED" if failed_proof(row) else "ran"
    return proof(row)


def _table(group: Sequence[Row], where: str) -> Table:
    proven = [(number, row) for number, row in enumerate(group) if row.status == "ok" and not hides_saving(row)]
    bold = set()
    if len(proven) > 1:
        peaks = [(row.peak_allocated_bytes, number) for number, row in proven if row.peak_allocated_bytes is not None]
        times = [(row.step_time_s, number) for number, row in proven if row.step_time_s is not None]
        bold |= {(min(peaks)[1], "peak")} if peaks else set()
        bold |= {(min(times)[1], "step time")} if times else set()
    return Table(
        title=sentences.title(next(iter(by_workload(group))), device=not where),
        subtitle=where,
        columns=table_columns(group),
        notes=sentences.notes(group),
        summary=sentences.summary(group),
        bold=frozenset(bold),
    )


def _predicted(report: Report, *, explain: bool) -> list[RenderableType]:
    from rich.text import Text

    parts: list[RenderableType] = _overview(report)
    where = f"predicted for {predicted.target(report)}"
    for cells in predicted.by_workload(report).values():
        parts.append(_predicted_table(cells, where))
        if explain:
            parts += explained.explanations(cells, tried=report.settings.get("explain") is True)
    if explain:
        parts += explained.term_list(report)
    return [*parts, *largest.summaries(report), *_about_model(report), Text(predicted.not_measured(report))]


def _timing(report: Report, group: Sequence[Row]) -> list[RenderableType]:
    """Render how the times of one workload were measured."""
    from rich.text import Text

    return [Text(text, style="dim") for text in timing.paragraphs(report, workload(group[0]))]


def _about_model(report: Report) -> list[RenderableType]:
    """Render how the model differs from its config."""
    from rich.text import Text

    return [Text(notice, style="bold") for notice in report.model_notices]


def _predicted_table(cells: Sequence[PredictedCell], where: str) -> Table:
    group = [cell.row for cell in cells]
    best = predicted.choice(cells)
    return Table(
        title=sentences.title(next(iter(by_workload(group))), device=False),
        subtitle=where,
        columns=predicted.table_columns(group),
        notes=predicted.notes(group),
        summary="\n".join(additions.paragraphs(cells)),
        bold=frozenset({(cells.index(best), "strategy")} if best and len(cells) > 1 else ()),
    )


def _recomputed(row: Row) -> str:
    return UNKNOWN if row.layers_recomputed is None else f"{row.layers_recomputed}/{row.num_layers}"


def _overhead_shortly(row: Row) -> str:
    """Return the overhead without its interval, and no figure where the interval includes 0."""
    low, high = _limits(row)
    unsure = low is not None and high is not None and low <= 0 <= high and row.strategy != OFF
    return "none shown" if unsure else _overhead_alone(row)


def _overhead_alone(row: Row) -> str:
    return format_percent(row.time_overhead_frac, sign=row.strategy != OFF)
