"""Plots memory over one predicted training step, by kind: a panel per strategy and a picture per workload."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from gcbench.core import headroom
from gcbench.core.prediction import Curve
from gcbench.core.records import Phase, Report, Workload
from gcbench.core.units import GIB, MIB, format_bytes
from gcbench.report import predictions as predicted
from gcbench.report import sentences
from gcbench.report.explanation import kind_name
from gcbench.report.plots.figure import LONGEST_LABEL, head, lay_out, panels, quiet, shortened
from gcbench.report.predictions import PredictedCell

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "parameters": "#4D4D4D",
    "inputs, buffers, workspaces": "#BDBDBD",
    "optimizer state": "#009E73",
    "gradients": "#0072B2",
    "layer inputs": "#56B4E9",
    "saved activations": "#E69F00",
    "logits and loss": "#D55E00",
    "recomputed activations": "#CC79A7",
    "temporaries": "#8F8A00",
}
"""Kinds from bottom to top; colours of M. Okabe and K. Ito, Color Universal Design, 2008, with a darker yellow and two
greys."""
ORDER_NOT_TIME = "x axis: order of allocations and frees, not time"
DEVICE, PROCESS = "device memory", "process memory"
PEAK = "peak-label"
"""The gid of the texts at the peaks."""

_HATCHES = {"recomputed activations": "////", "temporaries": "...."}
_OTHER = "#F0E442"
_FAR = 1.6
"""A memory limit so many times above the highest peak would flatten the curves; a note states it instead."""
_HEADROOM = 1.14
_LEGEND_WIDTH, _LETTERS_PER_INCH = 2.2, 10
"""Width of the legend, and how many letters of the notes below the panels fit in an inch."""
_PHASES: dict[Phase, str] = {"forward": "forward", "backward": "backward", "optimizer": "optimizer"}


def files(report: Report) -> dict[str, Workload]:
    """Return file name -> workload, for workloads with a curve."""
    groups = predicted.by_workload(report) if report.source == "predicted" else {}
    drawn = [workload for workload, cells in groups.items() if _curves(cells)]
    return {
        "step.png" if len(groups) == 1 else f"step-b{workload.batch_size}-s{workload.seq_len}.png": workload
        for workload in drawn
    }


def caption(workload: Workload) -> str:
    """Return the caption and alternative text of the picture."""
    return f"Memory over one training step, by kind: batch {workload.batch_size} × {workload.seq_len} tokens"


def step_figure(report: Report, workload: Workload) -> Figure:
    """Plot allocated memory over the step, a panel per strategy on one scale, with the peaks labelled."""
    cells = predicted.by_workload(report)[workload]
    shown = _curves(cells)
    highest = max(max(cell.row.peak_process_bytes or 0, *_totals(curve)) for cell, curve in shown)
    limit = predicted.limit_bytes(report)
    is_near = limit is not None and limit <= _FAR * highest
    top = _HEADROOM * max(highest, limit if limit is not None and is_near else 0)
    figure, found = panels(len(shown), width=4.3, height=3.0)
    figure.set_figwidth(figure.get_figwidth() + _LEGEND_WIDTH)
    facts = f"batch {workload.batch_size} × {workload.seq_len} tokens · {workload.precision}"
    head(figure, report, "memory over one training step", facts)
    for axes, (cell, curve) in zip(found, shown, strict=True):
        _panel(axes, cell, curve, top, limit if is_near else None)
    _legend(figure, found)
    missing = [f"{shortened(cell.row.strategy, LONGEST_LABEL)} ({_absence(cell)})" for cell in cells if _hides(cell)]
    notes = [ORDER_NOT_TIME]
    notes += [f"device memory, {format_bytes(limit)}, is above the scale"] if limit is not None and not is_near else []
    notes += [f"not shown: {', '.join(missing)}"] if missing else []
    figure.supxlabel(textwrap.fill(" · ".join(notes), round(_LETTERS_PER_INCH * figure.get_figwidth())), fontsize=9)
    lay_out(figure)
    for axes in found:
        _keep_inside(axes)
    return figure


def _curves(cells: Sequence[PredictedCell]) -> list[tuple[PredictedCell, Curve]]:
    return [
        (cell, cell.prediction.curve)
        for cell in cells
        if cell.prediction and cell.prediction.curve and cell.prediction.curve.nbytes
    ]


def _hides(cell: PredictedCell) -> bool:
    return not _curves([cell])


def _absence(cell: PredictedCell) -> str:
    return sentences.how_it_ended(cell.row) if cell.row.status != "ok" else "not predicted"


def _totals(curve: Curve) -> list[int]:
    return [sum(sizes) for sizes in zip(*curve.nbytes, strict=True)]


def _panel(axes: Axes, cell: PredictedCell, curve: Curve, top: float, limit: int | None) -> None:
    unit, name = (GIB, "GiB") if top >= _HEADROOM * GIB else (MIB, "MiB")
    points = range(len(curve.nbytes[0]))
    below = [0.0] * len(points)
    kinds = [kind_name(kind) for kind in curve.kinds]
    order = [*COLOURS, *(kind for kind in kinds if kind not in COLOURS)]
    for kind, sizes in sorted(zip(kinds, curve.nbytes, strict=True), key=lambda pair: order.index(pair[0])):
        above = [floor + size / unit for floor, size in zip(below, sizes, strict=True)]
        axes.fill_between(
            points,
            below,
            above,
            step="mid",
            facecolor=COLOURS.get(kind, _OTHER),
            edgecolor="white",
            linewidth=0,
            hatch=_HATCHES.get(kind, ""),
            label=kind,
        )
        below = above
    axes.set_xlim(0, len(points) - 1)
    axes.set_ylim(0, top / unit)
    axes.set_ylabel(name, fontsize=9)
    axes.set_title(_title(cell), fontsize=9.5, loc="left")
    quiet(axes, "y")
    _mark_phases(axes, curve)
    _mark_peak(axes, cell, below)
    for nbytes, label, dashes in (
        (cell.row.peak_process_bytes, PROCESS, (0, (1, 1.5))),
        (limit, f"{DEVICE}, {format_bytes(limit)}", (0, (6, 2))),
    ):
        if nbytes is not None:
            axes.axhline(nbytes / unit, color="black", linewidth=1.1, linestyle=dashes, label=label, zorder=4)


def _title(cell: PredictedCell) -> str:
    """Return `every:2 (6/12 layers)`, and on its own line `headroom 3.20 GiB`."""
    row = cell.row
    name = f"{shortened(row.strategy, LONGEST_LABEL)} ({row.layers_checkpointed}/{row.num_layers} layers)"
    if row.spare_bytes is None:
        return name
    size = format_bytes(abs(row.spare_bytes))
    remark = f", {row.fits}" if row.fits in (headroom.CLOSE, headroom.RESERVED) else ""
    return f"{name}\nheadroom {size}{remark}" if row.spare_bytes >= 0 else f"{name}\ndoes not fit, by {size}"


def _mark_phases(axes: Axes, curve: Curve) -> None:
    """Draw a line where a phase begins, and its name below its middle."""
    starts = [point for _, point in curve.phases]
    ends = [*starts[1:], len(curve.nbytes[0]) - 1]
    for start in starts[1:]:
        axes.axvline(start, color="black", linewidth=0.7, linestyle=(0, (2, 2)))
    middles = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(middles, [_PHASES[phase] for phase, _ in curve.phases])
    axes.tick_params(axis="x", length=0)


def _mark_peak(axes: Axes, cell: PredictedCell, totals: Sequence[float]) -> None:
    at = max(range(len(totals)), key=totals.__getitem__)
    axes.plot([at], [totals[at]], "v", color="black", markersize=5, clip_on=False, zorder=5)
    side = "left" if at < len(totals) / 3 else "right" if at > 2 * len(totals) / 3 else "center"
    text = axes.annotate(
        format_bytes(cell.row.peak_allocated_bytes),
        (at, totals[at]),
        xytext=(0, 5),
        textcoords="offset points",
        ha=side,
        fontsize=8.5,
        fontweight="bold",
        zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
    )
    text.set_gid(PEAK)


def _legend(figure: Figure, found: Sequence[Axes]) -> None:
    """Draw a legend with the lines first, then each kind once, in stacking order from the top."""
    handles: dict[str, Artist] = {}
    for axes in found:
        artists, texts = axes.get_legend_handles_labels()
        handles |= dict(zip(texts, artists, strict=True))
    lines = [name for name in handles if name.startswith((PROCESS, DEVICE))]
    kinds = [name for name in (*COLOURS, *handles) if name in handles and name not in lines]
    names = [*lines, *reversed(dict.fromkeys(kinds))]
    figure.legend([handles[name] for name in names], names, loc="outside right center", frameon=False, fontsize=9)


def _keep_inside(axes: Axes) -> None:
    """Move the name of a phase that is too short for it: the last to the panel's edge, any other one line down."""
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg's, set in panels
    labels, places = axes.get_xticklabels(), list(axes.get_xticks())
    edge = axes.get_window_extent(renderer).x1
    if labels[-1].get_window_extent(renderer).x1 > edge:
        places[-1] = axes.get_xlim()[1]
    texts = [label.get_text() for label in labels]
    axes.set_xticks(places, texts)
    labels = axes.get_xticklabels()
    if places[-1] == axes.get_xlim()[1]:
        labels[-1].set_horizontalalignment("right")
    for number, (left, right) in enumerate(pairwise(labels), start=1):
        if left.get_window_extent(renderer).x1 + 4 > right.get_window_extent(renderer).x0:
            right.set_text(f"\n{texts[number]}")
    axes.set_xticks(places, [label.get_text() for label in labels])
