"""Plots memory and speed against batch size or length: a row of panels for each series of a report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gcbench.core.records import Report
from gcbench.core.units import format_bytes
from gcbench.report import sentences
from gcbench.report.plots import curve_panels
from gcbench.report.plots.figure import (
    GREY,
    LONGEST_LABEL,
    colour,
    head,
    lay_out,
    make_room,
    marker,
    panels,
    shortened,
)
from gcbench.report.sweep import (
    CLOSE,
    DIMENSIONS,
    TOO_LARGE,
    UNUSABLE,
    CountedMemory,
    Dimension,
    Series,
    counted_memory,
    ending,
    series,
    verdict,
    words,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

MOST_SERIES = 4
"""Series in one picture; a note says how many are left out."""
_FILES: dict[Dimension, str] = {"batch_size": "curves-batch.png", "seq_len": "curves-length.png"}
_SUBJECTS: dict[Dimension, str] = {"batch_size": "batch size", "seq_len": "sequence length"}
_LETTERS_PER_INCH = 12


def files(report: Report) -> dict[str, Dimension]:
    """Return file name -> what the x axes show, where cells that fit differ in it alone."""
    return {
        _FILES[dimension]: dimension
        for dimension in DIMENSIONS
        if any(each.has_fit() for each in series(report, dimension))
    }


def caption(dimension: Dimension) -> str:
    """Return the caption and alternative text of the picture."""
    return f"Memory and speed against {_SUBJECTS[dimension]}, by strategy"


def curves_figure(report: Report, dimension: Dimension) -> Figure:
    """Plot a row of panels per series: memory, and where steps were timed, step time and tokens/s."""
    found = [each for each in series(report, dimension) if each.has_fit()]
    shown, memory = found[:MOST_SERIES], counted_memory(report)
    styles = {name: number for number, name in enumerate(dict.fromkeys(name for each in shown for name in each.cells))}
    timed = any(each.has_times() for each in shown)
    if timed:
        across = 2 if len(shown) == 1 else 4
        figure, axes = panels(4 * len(shown), width=5.2 if across == 2 else 4.4, height=3.7, across=across)
    else:
        figure, axes = panels(len(shown), width=7.2 if len(shown) == 1 else 5.4, height=4.2)
    head(figure, report, _subject(dimension, timed), _facts(report, shown))
    bars, has_limit, notes = [], [], _left_out(series(report, dimension))
    for number, each in enumerate(shown):
        label = f" · {shortened(each.label, LONGEST_LABEL)}" if len(shown) > 1 else ""
        mine = axes[4 * number : 4 * number + 4] if timed else axes[number : number + 1]
        has_limit.append(curve_panels.memory_panel(mine[0], each, memory, styles, label))
        if timed:
            curve_panels.time_panel(mine[1], each, styles, label)
            curve_panels.speed_panel(mine[2], each, styles, label)
            curve_panels.bars_panel(mine[3], each, styles, label)
            bars.append(mine[3])
    if memory.limit_bytes is not None and not all(has_limit):
        where = " of some panels" if any(has_limit) else ""
        notes.append(f"{memory.limit_name}, {format_bytes(memory.limit_bytes)}, is above the scale{where}")
    if timed:
        notes.append(_intervals(report, shown))
    notes += _missing(shown)
    _legend(figure, shown, memory if any(has_limit) else None, styles, notes)
    lay_out(figure)
    for panel in bars:
        make_room(panel)
    for panel in axes:
        if panel not in bars:
            curve_panels.thin_ticks(panel)
    return figure


def _left_out(every: Sequence[Series]) -> list[str]:
    """Name the series for which there is no room, and those in which nothing fits."""
    beyond = [each.label for each in every if each.has_fit()][MOST_SERIES:]
    empty = [each.label for each in every if not each.has_fit()]
    notes = [f"not drawn: {', '.join(beyond)}"] if beyond else []
    return [*notes, f"nothing to draw at {', '.join(empty)}"] if empty else notes


def _subject(dimension: Dimension, timed: bool) -> str:
    return f"memory{' and speed' if timed else ''} against {_SUBJECTS[dimension]}"


def _facts(report: Report, shown: Sequence[Series]) -> str:
    """Return `measured · 512 tokens · bf16`: the source, where the device does not say it, and what panels share."""
    source = [report.source] if report.source == "measured" else []
    common = [shown[0].label] if len(shown) == 1 else []
    precisions = dict.fromkeys(each.workload.precision for each in shown)
    return " · ".join([*source, *common, ", ".join(precisions)])


def _missing(shown: Sequence[Series]) -> list[str]:
    """List the cells that are in no panel, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in shown:
        for strategy in each.cells:
            for size, row in each.of(strategy):
                if verdict(row) == UNUSABLE:
                    place = words(each.dimension, size) + (f", {each.label}" if len(shown) > 1 else "")
                    reasons.setdefault((shortened(strategy, LONGEST_LABEL), ending(row)), []).append(place)
    texts = [
        f"{strategy} at {places[0] if len(places) == 1 else f'{len(places)} sizes'} ({why})"
        for (strategy, why), places in reasons.items()
    ]
    return [f"not shown: {'; '.join(texts)}"] if texts else []


def _intervals(report: Report, shown: Sequence[Series]) -> str:
    has_any = any(
        row.step_time_low_s is not None for each in shown for name in each.cells for _, row in each.timed(name)
    )
    if not has_any:
        return "predicted times without a band" if report.source == "predicted" else "too few rounds for an interval"
    what = "band of the prediction" if report.source == "predicted" else "95 % interval"
    return f"bars on the points: {what}; points at one size are set side by side"


def _legend(
    figure: Figure,
    shown: Sequence[Series],
    memory: CountedMemory | None,
    styles: dict[str, int],
    notes: Sequence[str],
) -> None:
    """Add a legend below all panels: strategies, lines and marks, and the notes above them."""
    from matplotlib.lines import Line2D

    handles: list[Artist] = [
        Line2D([], [], color=colour(style), marker=marker(style), markersize=7, label=shortened(name, LONGEST_LABEL))
        for name, style in styles.items()
    ]
    drawn = {verdict(row) for each in shown for cells in each.cells.values() for row in cells.values()}
    if memory is not None:
        text = f"{memory.limit_name}, {format_bytes(memory.limit_bytes)}"
        handles.append(Line2D([], [], color=curve_panels.LIMIT_COLOUR, linewidth=1.2, label=text))
        if memory.usable_bytes is not None:
            text = f"usable, {format_bytes(memory.usable_bytes)} (less the reserve)"
            handles.append(Line2D([], [], color=curve_panels.LIMIT_COLOUR, linewidth=1.0, linestyle=":", label=text))
    if TOO_LARGE in drawn:
        is_predicted = all(row.source == "predicted" for cells in shown[0].cells.values() for row in cells.values())
        text = "does not fit" if is_predicted else sentences.FAILURES["oom"]
        handles.append(Line2D([], [], color=GREY, marker="x", linestyle="none", markeredgewidth=1.4, label=text))
    if CLOSE in drawn:
        hollow = Line2D([], [], color=GREY, marker="o", linestyle="none", label="hollow: too close to tell")
        hollow.set_markerfacecolor("white")
        handles.append(hollow)
    width = figure.get_figwidth()
    longest = max(len(str(handle.get_label())) for handle in handles)
    most = max(1, int(width / (0.55 + longest / _LETTERS_PER_INCH)))
    columns = math.ceil(len(handles) / math.ceil(len(handles) / most))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=textwrap.fill(" · ".join(notes), round(_LETTERS_PER_INCH * width)) or None,
        title_fontsize=9,
    )
    legend.get_title().set_color(GREY)
