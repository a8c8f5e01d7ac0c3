"""What all plots share: a figure with a panel for each of several things, its heading, and how it is written."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from gcbench.core.records import Report
from gcbench.report import predictions as predicted
from gcbench.report import sentences
from gcbench.report.plots.lettering import choose_fonts, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
LONGEST_LABEL = 28
GREY = "#555555"


def panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `width` × `height` inches, in up to three columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = {1: 1, 2: 2, 4: 2}.get(count, 3)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(width * across, 7.5), height * down + 0.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    found = list(grid.flat)
    for spare in found[count:]:
        spare.remove()
    return figure, found[:count]


def head(figure: Figure, report: Report, subject: str, facts: str) -> None:
    """The model and what is shown of it, and below it the device and other facts."""
    device = f"{report.machine.device_name} ({report.machine.device})"
    where = f"predicted for {predicted.target(report)}" if report.source == "predicted" else device
    title = f"{shortened(sentences.model_of(report), 60)}: {subject}\n{shortened(f'{where} · {facts}', 80)}"
    figure.suptitle(title, fontsize=12)


def quiet(axes: Axes, grid: str) -> None:
    """No frame, and grid lines that stay behind what is shown; `grid` is `x`, `y` or `both`."""
    axes.tick_params(labelsize=8.5)
    axes.grid(axis=grid, color="#e5e5e5", linewidth=0.6, zorder=0)  # type: ignore[arg-type]  # one of its names
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shortened(text: str, length: int) -> str:
    """The text for a plot, with its middle left out when it is longer than `length`."""
    letters = drawable(text)
    if sum(map(len, letters)) <= length:
        return "".join(letters)
    half = (length - 1) // 2
    return f"{''.join(_first(letters, half))}…{''.join(reversed(_first(letters[::-1], half)))}"


def _first(letters: Sequence[str], length: int) -> list[str]:
    """As many of them as have room in `length`."""
    ends = accumulate(map(len, letters))
    return [letter for letter, end in zip(letters, ends, strict=True) if end <= length]


def lay_out(figure: Figure) -> None:
    """Give every text its font and its place, so that its extent can be asked for."""
    choose_fonts(figure)
    figure.draw_without_rendering()


def write(figure: Figure, path: Path) -> Path:
    """Write a figure in one step; raises OSError and leaves the old picture on failure."""
    picture = io.BytesIO()
    choose_fonts(figure)
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    return _replace(path, picture.getvalue())


def _replace(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
