"""Shared by all plots: figures with panels, their headings, and writing them to a file."""

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
OKABE_ITO = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8F8A00")
"""M. Okabe and K. Ito, Color Universal Design, 2008; their yellow darkened to be seen on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*")


def colour(style: int) -> str:
    """Return the colour of the strategy with this number."""
    return OKABE_ITO[style % len(OKABE_ITO)]


def marker(style: int) -> str:
    """Return the marker of the strategy with this number."""
    return MARKERS[style % len(MARKERS)]


def panels(count: int, *, width: float, height: float, across: int | None = None) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` panels of `width` × `height` inches, in up to three columns or in `across`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = across or {1: 1, 2: 2, 4: 2}.get(count, 3)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(width * across, 7.5), height * down + 0.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def head(figure: Figure, report: Report, subject: str, facts: str) -> None:
    """Title the figure with the model and the subject, and below them the device and other facts."""
    device = f"{report.machine.device_name} ({report.machine.device})"
    where = {
        "measured": device,
        "emulated": f"emulated on {sentences.emulated_card(report)}",
        "predicted": f"predicted for {predicted.target(report)}",
    }[report.source]
    title = f"{shortened(sentences.model_of(report), 60)}: {subject}\n{shortened(f'{where} · {facts}', 80)}"
    figure.suptitle(title, fontsize=12)


def quiet(axes: Axes, grid: str) -> None:
    """Remove the frame and draw grid lines behind the data; `grid` is `x`, `y` or `both`."""
    axes.tick_params(labelsize=8.5)
    axes.grid(axis=grid, color="#e5e5e5", linewidth=0.6, zorder=0)  # type: ignore[arg-type]  # one of its names
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shortened(text: str, length: int) -> str:
    """Return the text for a plot, with its middle cut out when it is longer than `length`."""
    letters = drawable(text)
    if sum(map(len, letters)) <= length:
        return "".join(letters)
    half = (length - 1) // 2
    return f"{''.join(_first(letters, half))}…{''.join(reversed(_first(letters[::-1], half)))}"


def _first(letters: Sequence[str], length: int) -> list[str]:
    """Return the first letters that fit in `length`."""
    ends = accumulate(map(len, letters))
    return [letter for letter, end in zip(letters, ends, strict=True) if end <= length]


def make_room(axes: Axes) -> None:
    """Extend the panel to the right until the texts after the bars fit."""
    width = axes.get_window_extent().width
    for text in axes.texts:
        end, needed = text.get_position()[0], min(text.get_window_extent().width + 6, 0.8 * width)
        axes.set_xlim(0, max(axes.get_xlim()[1], end / (1 - needed / width)))


def lay_out(figure: Figure) -> None:
    """Lay out every text, so that its extent is known."""
    choose_fonts(figure)
    figure.draw_without_rendering()


def write(figure: Figure, path: Path) -> Path:
    """Write a figure atomically; raises OSError and leaves the old picture on failure."""
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
