"""Summarizes a grid of cells in one table: a row per workload, a column per strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from gcbench.core.records import Report, Row, Workload
from gcbench.core.text_table import UNKNOWN, Column, Table
from gcbench.core.units import format_bytes, format_percent
from gcbench.report import sentences
from gcbench.report.rows import by_workload, failed_proof, rows
from gcbench.strategies import OFF

_SHAPE = "batch × tokens"


def overview(report: Report) -> Table | None:
    """Return the overview of a run or prediction; None for a single workload."""
    groups = by_workload(rows(report))
    if len(groups) < 2:
        return None
    columns, content = columns_of(groups, is_predicted=report.source == "predicted")
    cells = sum(map(len, groups.values()))
    return Table(
        title=f"Overview of {cells} cells: {content}", subtitle=_in_common(report, list(groups)), columns=columns
    )


def columns_of(groups: dict[Workload, tuple[Row, ...]], *, is_predicted: bool) -> tuple[tuple[Column, ...], str]:
    """Return the columns, and in words what they show."""
    cell: Callable[[Row], str] = _predicted if is_predicted else _measured
    names = dict.fromkeys(row.strategy for group in groups.values() for row in group)
    found = {(workload, row.strategy): cell(row) for workload, group in groups.items() for row in group}
    columns = (
        Column(header=_SHAPE, cells=_labels(list(groups)), right=False),
        *(Column(header=name, cells=tuple(found.get((each, name), UNKNOWN) for each in groups)) for name in names),
    )
    if not is_predicted:
        is_emulated = sentences.is_emulated(row for group in groups.values() for row in group)
        return columns, f"peak allocated, {'on an emulated card' if is_emulated else 'and time against off'}"
    limit = next(
        (row.device_memory_bytes for group in groups.values() for row in group if row.device_memory_bytes), None
    )
    fits = "" if limit is None else f"; (no) does not fit in {format_bytes(limit)}"
    return columns, f"peak allocated{fits}"


def _labels(workloads: Sequence[Workload]) -> tuple[str, ...]:
    """Return a label for each workload: batch and length, and whatever else differs between them."""
    differing = [
        f.name
        for f in fields(Workload)
        if f.name not in ("batch_size", "seq_len") and len({getattr(each, f.name) for each in workloads}) > 1
    ]
    return tuple(
        " · ".join(
            [f"{each.batch_size} × {each.seq_len}", *(str(getattr(each, name) or UNKNOWN) for name in differing)]
        )
        for each in workloads
    )


def _in_common(report: Report, workloads: Sequence[Workload]) -> str:
    """Return `gpt2 · fp32 · adamw_torch`: the parts that all titles share."""
    is_emulated = report.source == "emulated"
    titles = [sentences.title(each, device=not is_emulated).split(" · ") for each in workloads]
    common = (part for part in titles[0] if all(part in title for title in titles))
    shared = [part for part in common if not part.startswith("batch ")]
    return " · ".join([*shared, *([f"emulated on {sentences.emulated_card(report)}"] if is_emulated else [])])


def _measured(row: Row) -> str:
    if row.status != "ok":
        return sentences.how_it_ended(row)
    if failed_proof(row):
        return "FAILED" if row.source == "emulated" else "proof failed"
    peak = format_bytes(row.peak_allocated_bytes)
    if row.time_overhead_frac is None or row.strategy == OFF:
        return peak
    low, high = row.time_overhead_low_frac, row.time_overhead_high_frac
    unsure = low is not None and high is not None and low <= 0 <= high
    return f"{peak}, {'none shown' if unsure else format_percent(row.time_overhead_frac, sign=True)}"


def _predicted(row: Row) -> str:
    if row.peak_allocated_bytes is None:
        return UNKNOWN if row.status == "ok" else sentences.how_it_ended(row)
    fails = row.spare_bytes is not None and row.spare_bytes < 0
    return f"{format_bytes(row.peak_allocated_bytes)}{' (no)' if fails else ''}"
