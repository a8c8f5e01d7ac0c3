"""Plots a report: peak memory by phase, memory saved versus time overhead, and memory over predicted steps."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gcbench.core.records import PHASES, Phase, Report, Row, Workload
from gcbench.core.units import GIB, MIB, format_bytes
from gcbench.report.plots import curves, memory_over_step
from gcbench.report.plots.figure import (
    GREY,
    LONGEST_LABEL,
    colour,
    head,
    lay_out,
    make_room,
    marker,
    panels,
    quiet,
    shortened,
    write,
)
from gcbench.report.plots.label_placement import MARGIN, Box, Label, place
from gcbench.report.plots.lettering import choose_font
from gcbench.report.rows import NOT_REPEATABLE, by_workload, failed_proof, hides_saving, rows
from gcbench.report.sentences import how_it_ended
from gcbench.strategies import OFF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MEMORY = "memory.png"
TRADEOFF = "tradeoff.png"
_OWN = re.compile(r"(memory|tradeoff|curves-(batch|length)|step(-b\d+-s\d+)?)\.png")
"""Every name that `draw` may give to a file."""
LABEL = "strategy-label"
"""The gid of the labels that must not overlap."""

_REACH, _LEAST_REACH = 4, 100.0
"""How far the x axis extends for intervals: so many times the spread of the centres, or so many percent."""
_PHASE_COLOURS: dict[Phase, str] = {"forward": "#56B4E9", "backward": "#E69F00", "optimizer": "#009E73"}
_PHASE_HATCHES: dict[Phase, str] = {"forward": "", "backward": "////", "optimizer": "...."}


def remove_stale(report: Report, folder: Path) -> None:
    """Remove the plots of an earlier state of this report from its own folder `folder`; raises OSError."""
    current = drawable(report)
    for path in folder.glob("*.png"):
        if path.name not in current and _OWN.fullmatch(path.name):
            path.unlink(missing_ok=True)


def drawable(report: Report) -> tuple[str, ...]:
    """Return the names of the files that `draw` writes for this report."""
    return tuple(_figures(report))


def draw(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write the plots for which the report has data into `folder`, each atomically; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(write(figure(), folder / name) for name, figure in _figures(report).items())


def _figures(report: Report) -> dict[str, Callable[[], Figure]]:
    """Return file name -> function that draws the figure, where the report has data for it."""
    table = rows(report)
    figures: dict[str, Callable[[], Figure]] = {}
    if any(row.peak_allocated_bytes is not None for row in table):
        figures[MEMORY] = partial(memory_figure, report)
    if _panels(table):
        figures[TRADEOFF] = partial(tradeoff_figure, report)
    for name, dimension in curves.files(report).items():
        figures[name] = partial(curves.curves_figure, report, dimension)
    for name, workload in memory_over_step.files(report).items():
        figures[name] = partial(memory_over_step.step_figure, report, workload)
    return figures


def memory_figure(report: Report) -> Figure:
    """Plot bars of the peak in each phase, by strategy, a panel per workload; the highest bar is labelled."""
    from matplotlib.patches import Patch

    groups = by_workload(rows(report))
    figure, found = panels(len(groups), width=6.4, height=1.5 + 0.5 * max(map(len, groups.values())))
    head(figure, report, "peak memory by phase", _precisions(groups))
    for axes, (workload, group) in zip(found, groups.items(), strict=True):
        _memory_panel(axes, workload, group)
    handles, labels = found[0].get_legend_handles_labels()
    handles.append(Patch(facecolor="none", edgecolor="black", linewidth=1.3))
    labels.append("the phase that sets the peak")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    lay_out(figure)
    for axes in found:
        make_room(axes)
    return figure


def tradeoff_figure(report: Report) -> Figure:
    """Plot a point per strategy with its 95 % interval, or its band, `off` at the origin, a panel per workload."""
    groups = _panels(rows(report))
    figure, found = panels(len(groups), width=6.0, height=4.6)
    head(figure, report, "memory saved versus time overhead", _precisions(groups))
    styles: dict[str, int] = {}
    for group in groups.values():
        for row in group:
            styles.setdefault(row.strategy, len(styles))
    for axes, (workload, group) in zip(found, groups.items(), strict=True):
        _tradeoff_panel(axes, workload, group, styles)
    lay_out(figure)
    figure.set_layout_engine("none")
    for axes, group in zip(found, groups.values(), strict=True):
        _label_points(axes, [row for row in group if _has_tradeoff(row)], styles)
    return figure


def _panels(table: Sequence[Row]) -> dict[Workload, tuple[Row, ...]]:
    """Return the workloads in which a strategy can be compared with off."""
    return {
        workload: group
        for workload, group in by_workload(table).items()
        if any(_has_tradeoff(row) and row.strategy != OFF for row in group)
    }


def _has_tradeoff(row: Row) -> bool:
    return row.memory_saved_frac is not None and row.time_overhead_frac is not None


def _precisions(groups: dict[Workload, tuple[Row, ...]]) -> str:
    return ", ".join(dict.fromkeys(workload.precision for workload in groups))


def _panel_title(axes: Axes, workload: Workload) -> None:
    attention = f" · {workload.attn_implementation}" if workload.attn_implementation else ""
    text = f"batch {workload.batch_size} × {workload.seq_len} tokens · {workload.optim}{attention}"
    axes.set_title(text, fontsize=10, loc="left")


def _memory_panel(axes: Axes, workload: Workload, group: Sequence[Row]) -> None:
    highest = max((row.peak_allocated_bytes or 0 for row in group), default=0)
    unit, name = (GIB, "GiB") if highest >= GIB else (MIB, "MiB")
    thickness = 0.26
    for slot, phase in enumerate(PHASES):
        sizes = [(_of_phase(row, phase) or 0) / unit for row in group]
        positions = [number + (slot - 1) * thickness for number in range(len(group))]
        axes.barh(
            positions,
            sizes,
            thickness,
            color=_PHASE_COLOURS[phase],
            hatch=_PHASE_HATCHES[phase],
            edgecolor="white",
            linewidth=0,
            label=f"{phase} pass" if phase != "optimizer" else "optimizer step",
        )
        for row, size, position in zip(group, sizes, positions, strict=True):
            if row.peak_phase == phase:
                axes.barh(position, size, thickness, facecolor="none", edgecolor="black", linewidth=1.3, zorder=3)
                flaw = f" ({_absence(row)})" if row.status != "ok" or hides_saving(row) else ""
                text, weight = f" {format_bytes(row.peak_allocated_bytes)}{flaw}", "normal" if flaw else "bold"
                axes.annotate(text, (size, position), va="center", fontsize=8.5, fontweight=weight)
    for number, row in enumerate(group):
        if row.peak_allocated_bytes is None:
            axes.annotate(f" {_absence(row)}", (0, number), va="center", fontsize=9, style="italic", color=GREY)
    axes.set_yticks(range(len(group)), [shortened(row.strategy, LONGEST_LABEL) for row in group], fontsize=9)
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.set_xlim(0, 1.05 * highest / unit if highest else 1)
    axes.set_xlabel(f"peak allocated memory, {name}", fontsize=9)
    if not highest:
        axes.set_xticks([])
    _panel_title(axes, workload)
    quiet(axes, "x")


def _of_phase(row: Row, phase: Phase) -> int | None:
    return {
        "forward": row.peak_forward_bytes,
        "backward": row.peak_backward_bytes,
        "optimizer": row.peak_optimizer_bytes,
    }[phase]


def _tradeoff_panel(axes: Axes, workload: Workload, group: Sequence[Row], styles: dict[str, int]) -> None:
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    for row in group:
        paid, saved = row.time_overhead_frac, row.memory_saved_frac
        if paid is None or saved is None:
            continue
        style = styles[row.strategy]
        low, high = row.time_overhead_low_frac, row.time_overhead_high_frac
        axes.errorbar(
            [100 * paid],
            [100 * saved],
            xerr=None if low is None or high is None else [[100 * (paid - low)], [100 * (high - paid)]],
            fmt=marker(style),
            color=colour(style),
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.1,
            capsize=3,
        )
    _limits(axes, group)
    _mark_cut_intervals(axes, group, styles)
    axes.set_ylabel("peak memory saved, %", fontsize=9)
    missing = [f"{shortened(row.strategy, LONGEST_LABEL)} ({_absence(row)})" for row in group if not _has_tradeoff(row)]
    note = textwrap.fill(f"not shown: {', '.join(missing)}", 80) if missing else ""
    bars = any(row.strategy != OFF and row.time_overhead_low_frac is not None for row in group)
    predicted = any(row.source == "predicted" for row in group)
    basis = (
        "predicted; bars: band" if predicted else "bars: 95 % interval" if bars else "too few rounds for an interval"
    )
    time = f"time overhead per step, % ({basis})"
    axes.set_xlabel("\n".join(filter(None, (time, note))), fontsize=9)
    _panel_title(axes, workload)
    quiet(axes, "both")


def _mark_cut_intervals(axes: Axes, group: Sequence[Row], styles: dict[str, int]) -> None:
    """Draw an arrow at the edge where an interval extends beyond it."""
    left, right = axes.get_xlim()
    for row in group:
        low, high, saved = row.time_overhead_low_frac, row.time_overhead_high_frac, row.memory_saved_frac
        if low is None or high is None or saved is None:
            continue
        for beyond, edge, arrow in ((100 * low < left, left, "<"), (100 * high > right, right, ">")):
            if beyond:
                style = styles[row.strategy]
                axes.plot([edge], [100 * saved], arrow, color=colour(style), markersize=7, clip_on=False)


def _limits(axes: Axes, group: Sequence[Row]) -> None:
    """Set axis limits that fit the labels and whole intervals, unless that would merge the centres."""
    shown = [row for row in group if _has_tradeoff(row)]
    centres = [100 * (row.time_overhead_frac or 0) for row in shown] + [0.0]
    reach = max(_REACH * (max(centres) - min(centres)), _LEAST_REACH)
    lows = [100 * row.time_overhead_low_frac for row in shown if row.time_overhead_low_frac is not None]
    highs = [100 * row.time_overhead_high_frac for row in shown if row.time_overhead_high_frac is not None]
    left = max(min([*lows, *centres]), min(centres) - reach)
    right = min(max([*highs, *centres]), max(centres) + reach)
    saved = [100 * (row.memory_saved_frac or 0) for row in shown] + [0.0]
    margin = max(0.15 * (max(saved) - min(saved)), 2.0)
    axes.set_xlim(left - 0.12 * (right - left) - 0.5, right + 0.25 * (right - left) + 0.5)
    axes.set_ylim(min(saved) - margin, max(saved) + margin)


def _label_points(axes: Axes, group: Sequence[Row], styles: dict[str, int]) -> None:
    """Label every point, beside it where there is room and otherwise at the end of a leader line."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg's, set in _figure
    frame = _box(axes.get_window_extent(renderer)).grown(-3)
    points, symbols = [], []
    for row in group:
        x, y = axes.transData.transform((100 * (row.time_overhead_frac or 0), 100 * (row.memory_saved_frac or 0)))
        points.append((float(x), float(y)))
        symbols.append(Box(x, y, x, y).grown(9))
        low, high = row.time_overhead_low_frac, row.time_overhead_high_frac
        if low is not None and high is not None:
            start, end = (float(axes.transData.transform((100 * edge, 0))[0]) for edge in (low, high))
            symbols.append(Box(max(start - 14, frame.left), y - 3, min(end + 14, frame.right), y + 3))
    placed: list[Label] = []
    for number, (row, point) in enumerate(zip(group, points, strict=True)):
        text = axes.annotate(
            shortened(row.strategy, LONGEST_LABEL),
            point,
            xycoords="figure pixels",
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=9,
            annotation_clip=False,
        )
        text.set_gid(LABEL)
        choose_font(text)
        size = _box(text.get_window_extent(renderer))
        label = place(size, number, points, frame, symbols, placed)
        placed.append(label)
        text.set_position((label.room.left + MARGIN - size.left, label.room.bottom + MARGIN - size.bottom))
        if label.leader:
            (x, y), (near_x, near_y) = label.leader[0], label.leader[-1]
            ends, style = ([x, near_x], [y, near_y]), styles[row.strategy]
            line = Line2D(*ends, transform=IdentityTransform(), color=colour(style), linewidth=0.8)
            axes.add_artist(line)


def _box(extent: Bbox) -> Box:
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _absence(row: Row) -> str:
    """Return why a cell is not in the picture."""
    if row.status != "ok":
        return how_it_ended(row)
    if failed_proof(row):
        return "failed the proof"
    return NOT_REPEATABLE if hides_saving(row) else f"not {row.source}"
