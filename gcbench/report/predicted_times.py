"""Renders predicted times: their columns, and what checkpointing costs in predicted time, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gcbench.core.records import Row
from gcbench.core.text_table import UNKNOWN, Column
from gcbench.core.units import format_percent, format_seconds
from gcbench.report.sentences import interval, listed
from gcbench.strategies import OFF

_LEAST_SAVED_FRAC = 0.005
"""A smaller saving is none."""


def table_columns(group: Sequence[Row]) -> tuple[Column, ...]:
    """Return the columns about time of one workload's predictions, with their bands; empty cells without times."""

    def of(text: Callable[[Row], str]) -> tuple[str, ...]:
        return tuple(text(row) for row in group)

    return (
        Column(
            header="step time",
            cells=of(step_time),
            short=of(lambda row: f"{_about(row)}{format_seconds(row.step_time_s)}"),
            shorten=0,
            drop=5,
        ),
        Column(
            header="overhead",
            cells=of(overhead),
            short=of(lambda row: format_percent(row.time_overhead_frac, sign=row.strategy != OFF)),
            shorten=0,
            drop=7,
        ),
        Column(
            header="tokens/s",
            short_header="tok/s",
            cells=of(lambda row: UNKNOWN if row.tokens_per_s is None else f"{_about(row)}{_rounded(row.tokens_per_s)}"),
            drop=1,
        ),
    )


def _about(row: Row) -> str:
    return "" if row.step_time_s is None else "~"


def _rounded(value: float) -> str:
    """Return a number with two digits that count: a prediction has no more."""
    return f"{float(f'{value:.2g}'):,.0f}"


def step_time(row: Row) -> str:
    """Return `~389 ms (311 to 486)`: the centre and the band."""
    if row.step_time_s is None or row.step_time_low_s is None or row.step_time_high_s is None:
        return UNKNOWN
    low, high = format_seconds(row.step_time_low_s), format_seconds(row.step_time_high_s)
    return f"~{format_seconds(row.step_time_s)} ({_without_unit(low, high)} to {high})"


def _without_unit(low: str, high: str) -> str:
    """Return `311` for `311 ms` where the other end has the same unit."""
    number, _, unit = low.rpartition(" ")
    return number if unit == high.rpartition(" ")[2] else low


def overhead(row: Row) -> str:
    """Return `+24 % (16 to 32 %)`: the centre and the band."""
    alone = format_percent(row.time_overhead_frac, sign=row.strategy != OFF)
    limits = interval(row.time_overhead_low_frac, row.time_overhead_high_frac)
    return f"{alone} ({limits})" if limits and row.strategy != OFF else alone


def sentences(cells: Sequence[tuple[Row, str | None]]) -> list[str]:
    """Return what the strategy that saves most costs in predicted time, and where the times come from.

    `cells` are the rows of one workload, each with the reason why it has no time.
    """
    timed = [row for row, _ in cells if row.step_time_s is not None]
    found = []
    priced = [row for row in timed if row.strategy != OFF and row.time_overhead_frac is not None]
    best = max(priced, key=lambda row: row.memory_saved_frac or 0.0, default=None)
    if best is not None and (best.memory_saved_frac or 0.0) >= _LEAST_SAVED_FRAC:
        found.append(f"{best.strategy} saves {format_percent(best.memory_saved_frac)} of peak memory {paid(best)}.")
    sources = dict.fromkeys(row.time_source for row in timed if row.time_source)
    if sources:
        found.append(f"Times are estimates from {' and '.join(sources)}.")
    reasons = {reason: [row.strategy for row, why in cells if why == reason] for _, reason in cells if reason}
    for reason, names in reasons.items():
        of = f" of {listed(names)}" if timed else ""
        found.append(f"The time{of} is not predicted: {reason}.")
    return found


def paid(row: Row) -> str:
    """Return `for about 24 % more time (predicted: 16 to 32 %)`."""
    frac = row.time_overhead_frac or 0.0
    limits = interval(row.time_overhead_low_frac, row.time_overhead_high_frac)
    return f"for about {format_percent(abs(frac))} {'more' if frac >= 0 else 'less'} time (predicted: {limits})"
