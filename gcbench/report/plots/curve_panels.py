"""Draws the panels of curves over batch size or length: memory, step time, tokens/s, and bars at the largest size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gcbench.core.records import Row
from gcbench.core.units import GIB, MIB
from gcbench.report import sentences
from gcbench.report.plots.figure import GREY, LONGEST_LABEL, colour, marker, quiet, shortened
from gcbench.report.rows import hides_saving
from gcbench.report.sweep import (
    CLOSE,
    FITS,
    TOO_LARGE,
    CountedMemory,
    Dimension,
    Series,
    largest,
    tokens_per_s_interval,
    verdict,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator
    from matplotlib.transforms import Transform

LIMIT_COLOUR = "#7A0019"
_UNITS: dict[Dimension, str] = {"batch_size": "batch size, sequences per step", "seq_len": "sequence length, tokens"}
_LARGEST: dict[Dimension, str] = {"batch_size": "largest batch", "seq_len": "longest sequence"}
_SHIFT_POINTS, _MOST_SHIFT_POINTS = 4.0, 16.0
"""How far intervals of two strategies at the same size are apart, and those of the first and the last."""
_REACH = 3
"""Intervals that extend beyond so many times the highest point are cut, as they would flatten the curves."""
_NUMBER = "{x:,.10g}"
_LOG_FROM = 8
"""Sizes or times that span more than this factor have a logarithmic axis."""
_FAR = 1.6
"""A limit so many times above the highest peak would flatten the curves; a note states it instead."""
_ROW_FRAC, _MOST_ROWS_FRAC = 0.05, 0.35
"""Height of a strategy's row of cells that do not fit, and of all rows together, as fractions of the panel."""


def memory_panel(axes: Axes, each: Series, memory: CountedMemory, styles: dict[str, int], label: str) -> bool:
    """Plot memory by size, with crosses above for cells that do not fit; return whether the limit is drawn."""
    fits = [row for cells in each.cells.values() for row in cells.values() if verdict(row) in (FITS, CLOSE)]
    highest = max((memory.of(row) or 0 for row in fits), default=0)
    failing = [name for name in each.cells if any(verdict(row) == TOO_LARGE for _, row in each.of(name))]
    is_drawn = memory.limit_bytes is not None and (bool(failing) or memory.limit_bytes <= _FAR * highest)
    top = max(highest, memory.limit_bytes or 0) if is_drawn else highest
    unit, name = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    for strategy in each.cells:
        points = [
            _Point(size=size, height=(memory.of(row) or 0) / unit, is_sure=verdict(row) == FITS)
            for size, row in each.of(strategy)
            if verdict(row) in (FITS, CLOSE)
        ]
        _line(axes, points, styles[strategy], len(styles))
    if is_drawn and memory.limit_bytes is not None:
        axes.axhline(memory.limit_bytes / unit, color=LIMIT_COLOUR, linewidth=1.2)
        if memory.usable_bytes is not None:
            axes.axhline(memory.usable_bytes / unit, color=LIMIT_COLOUR, linewidth=1.0, linestyle=":")
    bottom = top / unit * 1.04 or 1
    axes.set_ylim(0, _crosses(axes, each, failing, bottom, styles) if failing else bottom)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= bottom])
    _size_axis(axes, each)
    axes.set_ylabel(f"peak {_MEMORY_NAMES[memory.name]}, {name}", fontsize=9)
    axes.set_title(f"peak memory{label}", fontsize=10, loc="left")
    quiet(axes, "both")
    return is_drawn


_MEMORY_NAMES = {"process": "memory of the process", "reserved": "reserved memory", "allocated": "allocated memory"}


def _crosses(axes: Axes, each: Series, failing: Sequence[str], bottom: float, styles: dict[str, int]) -> float:
    """Draw a row per strategy above `bottom` with a cross at each size that does not fit; return its upper edge."""
    share = min(_ROW_FRAC * (len(failing) + 0.5), _MOST_ROWS_FRAC)
    top = bottom / (1 - share)
    row_height = (top - bottom) / (len(failing) + 0.5)
    axes.axhspan(bottom, top, color="#f2f2f2", zorder=0)
    size = max(4.0, min(7.0, 7.0 * share / (_ROW_FRAC * (len(failing) + 0.5))))
    for number, strategy in enumerate(failing):
        sizes = [at for at, row in each.of(strategy) if verdict(row) == TOO_LARGE]
        heights = [top - (number + 0.75) * row_height] * len(sizes)
        style = styles[strategy]
        axes.plot(sizes, heights, marker(style), color=colour(style), markersize=size, markerfacecolor="white")
        axes.plot(sizes, heights, "x", color=colour(style), markersize=size + 1, markeredgewidth=1.4)
    return top


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A point of a curve, with its interval; `is_sure` is False where a fit is too close to tell."""

    size: int
    height: float
    interval: tuple[float, float] | None = None
    is_sure: bool = True


def _line(axes: Axes, points: Sequence[_Point], style: int, count: int) -> None:
    """Plot a strategy's curve, thinner the later it is drawn, so that equal curves show, and intervals side by side."""
    wide = 1 - style / max(count, 2)
    sizes = [point.size for point in points]
    heights = [point.height for point in points]
    beside = _beside(axes, style, count) if any(point.interval for point in points) else axes.transData
    axes.plot(
        sizes, heights, "-", color=colour(style), transform=beside, linewidth=1.2 + 1.8 * wide, zorder=2 + 0.01 * style
    )
    for point in points:
        low, high = point.interval or (point.height, point.height)
        axes.errorbar(
            [point.size],
            [point.height],
            yerr=None if point.interval is None else [[max(point.height - low, 0)], [max(high - point.height, 0)]],
            fmt=marker(style),
            color=colour(style),
            markersize=5.5 + 3 * wide,
            markeredgecolor="white" if point.is_sure else colour(style),
            markerfacecolor=colour(style) if point.is_sure else "white",
            markeredgewidth=0.6 if point.is_sure else 1.3,
            elinewidth=1.1,
            capsize=3,
            zorder=3 + 0.01 * style,
            transform=beside,
        )


def _beside(axes: Axes, style: int, count: int) -> Transform:
    """Return the transform of the panel, shifted by a few points for each strategy."""
    from matplotlib.transforms import ScaledTranslation

    step = min(_SHIFT_POINTS, _MOST_SHIFT_POINTS / count)
    shift = (style - (count - 1) / 2) * step / 72
    return axes.transData + ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)


def time_panel(axes: Axes, each: Series, styles: dict[str, int], label: str) -> None:
    """Plot the step time by size."""
    times = [row.step_time_s or 0 for name in each.cells for _, row in each.timed(name)]
    unit, name = (1.0, "s") if max(times, default=1) >= 1 else (1e-3, "ms")

    def point(size: int, row: Row) -> _Point:
        low, high = row.step_time_low_s, row.step_time_high_s
        interval = None if low is None or high is None else (low / unit, high / unit)
        height = (row.step_time_s or 0) / unit
        return _Point(size=size, height=height, interval=interval, is_sure=verdict(row) == FITS)

    low, high = _timed_lines(axes, each, styles, point)
    is_log = bool(times) and max(times) > _LOG_FROM * min(times)
    if is_log:
        _log_times(axes)
    axes.set_ylim(low / 1.15 if is_log else 0, 1.15 * high if is_log else 1.05 * high)
    axes.set_ylabel(f"step time, {name}{' (log scale)' if is_log else ''}", fontsize=9)
    axes.set_title(f"step time{label}", fontsize=10, loc="left")


def speed_panel(axes: Axes, each: Series, styles: dict[str, int], label: str) -> None:
    """Plot tokens/s by size."""

    def point(size: int, row: Row) -> _Point:
        interval = tokens_per_s_interval(row)
        return _Point(size=size, height=row.tokens_per_s or 0, interval=interval, is_sure=verdict(row) == FITS)

    _, high = _timed_lines(axes, each, styles, point)
    axes.set_ylim(0, 1.05 * high)
    axes.yaxis.set_major_formatter(_NUMBER)
    axes.set_ylabel("tokens/s", fontsize=9)
    axes.set_title(f"tokens per second{label}", fontsize=10, loc="left")


def _timed_lines(
    axes: Axes, each: Series, styles: dict[str, int], point: Callable[[int, Row], _Point]
) -> tuple[float, float]:
    """Plot a curve per strategy of its timed cells; return the lowest and highest end that the panel should show."""
    shown: list[_Point] = []
    for strategy in each.cells:
        points = [point(size, row) for size, row in each.timed(strategy)]
        _line(axes, points, styles[strategy], len(styles))
        shown += points
    _size_axis(axes, each)
    quiet(axes, "both")
    if not shown:
        axes.set_yticks([])
        text = axes.text(0.5, 0.5, "no times", fontsize=9, style="italic", color=GREY, ha="center")
        text.set_transform(axes.transAxes)
        return 0.5, 1.0
    ends = [end for each in shown for end in (each.height, *(each.interval or ()))]
    heights = [each.height for each in shown]
    return max(min(ends), min(heights) / _REACH), min(max(ends), _REACH * max(heights))


def bars_panel(axes: Axes, each: Series, styles: dict[str, int], label: str) -> None:
    """Plot bars of tokens/s at each strategy's largest size, labelled with that size."""
    ends = largest(each)
    widest = _REACH * max((end.row.tokens_per_s or 0 for end in ends if end.row), default=0)
    for number, end in enumerate(ends):
        row = end.row
        if row is None or end.size is None or row.tokens_per_s is None:
            why = end.beyond if row is None else "no time"
            axes.annotate(f" {why}", (0, number), va="center", fontsize=8.5, style="italic", color=GREY)
            continue
        low, high = tokens_per_s_interval(row) or (row.tokens_per_s, row.tokens_per_s)
        axes.barh(number, row.tokens_per_s, 0.62, color=colour(styles[end.strategy]), zorder=2)
        if high > low:
            sides = [[row.tokens_per_s - low], [min(high, widest) - row.tokens_per_s]]
            axes.errorbar([row.tokens_per_s], [number], xerr=sides, fmt="none", color=GREY, capsize=3, zorder=3)
        if high > widest:
            axes.plot([widest], [number], ">", color=GREY, markersize=6, zorder=4)
        at_least = "" if end.is_bound else "≥ "
        flaw = ", unproven" if hides_saving(row) else ""
        text = f" {sentences.tokens(row.tokens_per_s)} · {at_least}{words(each.dimension, end.size)}{flaw}"
        weight, end_of_bar = "normal" if flaw else "bold", min(high, widest)
        axes.annotate(text, (end_of_bar, number), va="center", fontsize=8.5, fontweight=weight)
    axes.set_yticks(range(len(ends)), [shortened(end.strategy, LONGEST_LABEL) for end in ends], fontsize=8.5)
    axes.set_ylim(len(ends) - 0.4, -0.6)
    reach = max((text.get_position()[0] for text in axes.texts), default=0)
    axes.set_xlim(0, 1.05 * reach or 1)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(_NUMBER)
    axes.set_xlabel("tokens/s", fontsize=9)
    # Names leave the panel little width: a long title goes above them.
    side: Literal["left", "right"] = "right" if label else "left"
    axes.set_title(f"tokens/s at the {_LARGEST[each.dimension]} that fits{label}", fontsize=10, loc=side)
    quiet(axes, "x")


def _few_ticks() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _size_axis(axes: Axes, each: Series) -> None:
    """Tick every size, on a logarithmic axis where the sizes span a large factor."""
    from matplotlib.ticker import NullLocator

    low, high = each.sizes[0], each.sizes[-1]
    is_log = high > _LOG_FROM * low
    if is_log:
        axes.set_xscale("log", base=2)
        margin = (high / low) ** 0.06
        axes.set_xlim(low / margin, high * margin)
    else:
        margin = 0.06 * (high - low)
        axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(each.sizes, [str(size) for size in each.sizes])
    axes.set_xlabel(f"{_UNITS[each.dimension]}{' (log scale)' if is_log else ''}", fontsize=9)


def _log_times(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def thin_ticks(axes: Axes) -> None:
    """Blank the sizes on the x axis that would touch their right neighbour."""
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg's, set in panels
    left = float("inf")
    labels = axes.get_xticklabels()
    texts = [label.get_text() for label in labels]
    for number in range(len(labels) - 1, -1, -1):
        extent = labels[number].get_window_extent(renderer)
        if extent.x1 + 4 > left:
            texts[number] = ""
        else:
            left = extent.x0
    axes.set_xticks(axes.get_xticks(), texts)
