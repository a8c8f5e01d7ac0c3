"""The picture of `plan_frontier.py`: overhead against memory, a panel per workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gcbench.report.plots.figure import quiet, write

_STYLES = {
    "layer_counts": ("best layer count", "#0072B2", "-", 1.2),
    "sac_ilp": ("torch's sac_ilp", "#009E73", "-", 1.2),
    "activation_memory_budget": ("activation_memory_budget (eager prices)", "#CC79A7", "-", 1.2),
    "bound": ("lower bound (LP)", "#999999", ":", 1.2),
    "found": ("found plan", "#000000", "-", 2.0),
}
_COLUMNS = 4


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture; raises OSError."""
    from matplotlib.figure import Figure

    ways, workloads = document["ways"], document.get("workloads", [])
    rows = -(-(len(workloads) + 1) // _COLUMNS)
    figure = Figure(figsize=(4.0 * _COLUMNS, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes in grid[len(workloads) :]:
        axes.set_axis_off()
    for axes, done in zip(grid, workloads, strict=False):
        low, high = (done[name]["peak_bytes"] / 2**30 for name in ("per_layer", "off"))
        for name, (label, colour, dashes, width) in _STYLES.items():
            if name not in done["curves"]:
                continue
            known = [
                (low + way * (high - low), y)
                for way, y in zip(ways, done["curves"][name], strict=True)
                if y is not None
            ]
            axes.plot(*zip(*known, strict=True), color=colour, linestyle=dashes, linewidth=width, label=label)
        for point, marker in zip(done["named"], "^v", strict=True):
            place = low + point["way"] * (high - low)
            axes.plot([place], [point["overhead"]], color="#D55E00", marker=marker, linewidth=0, label=point["name"])
        axes.set_title(f"{done['workload']}\nbatch {done['batch_size']} x {done['seq_len']}", fontsize=9, loc="left")
        axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("peak memory (GiB)", fontsize=8)
        axes.tick_params(labelsize=8)
        quiet(axes, "both")
    for axes in grid[: len(workloads) : _COLUMNS]:
        axes.set_ylabel("overhead (1 = per-layer)", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    grid[len(workloads)].legend(handles, labels, frameon=False, fontsize=9, loc="center left")
    write(figure, path)
