"""Draws the trade-off curve of a decision: peak memory against tokens per second of every candidate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gcbench.core.units import GIB, MIB, format_bytes
from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import Candidate
from gcbench.report.plots.figure import GREY, panels, quiet, shortened, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gcbench.plan.planned import PlanResult

FRONTIER = "frontier.png"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8F8A00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BEYOND = 1.25
"""Candidates up to this many times the device's memory are shown."""


def draw(planned: PlanResult, folder: Path) -> Path:
    """Write the plot into `folder` and return its path; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    return write(figure(planned), folder / FRONTIER)


def figure(planned: PlanResult) -> Figure:
    """One line per strategy over its batch sizes, the usable memory, and a ring around the choice."""
    decision = planned.decision
    limit = decision.limit_bytes
    shown = [
        each
        for each in decision.candidates
        if limit is None or each.peak_bytes <= _BEYOND * limit or not decision.choice
    ]
    unit, name = (GIB, "GiB") if max((each.peak_bytes for each in shown), default=0) >= GIB else (MIB, "MiB")
    picture, (axes,) = panels(1, width=7.5, height=4.8)
    title = f"{shortened(planned.name, 60)}: memory against speed"
    facts = f"{planned.where} · {planned.seq_len} tokens · {planned.settings.precision} · {planned.settings.optim}"
    picture.suptitle(f"{title}\n{shortened(facts, 90)}", fontsize=12)
    groups: dict[str, list[Candidate]] = {}
    for each in sorted(shown, key=lambda each: each.batch_size):
        groups.setdefault(each.strategy, []).append(each)
    order = sorted(groups, key=lambda strategy: strategy == SEARCHED)
    for number, strategy in enumerate(order):
        group = groups[strategy]
        colour = "#000000" if strategy == SEARCHED else _COLOURS[number % len(_COLOURS)]
        axes.plot(
            [each.peak_bytes / unit for each in group],
            [each.tokens_per_s for each in group],
            color=colour,
            marker="*" if strategy == SEARCHED else _MARKERS[number % len(_MARKERS)],
            markersize=9 if strategy == SEARCHED else 5,
            linewidth=0 if strategy == SEARCHED else 1.0,
            label="searched plans" if strategy == SEARCHED else shortened(strategy, 28),
            zorder=3,
        )
        for each in group:
            axes.annotate(
                str(each.batch_size),
                (each.peak_bytes / unit, each.tokens_per_s),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=colour,
            )
    if decision.usable_bytes is not None and limit is not None:
        axes.axvline(decision.usable_bytes / unit, color=GREY, linewidth=1.0, linestyle="--", zorder=1)
        axes.axvspan(decision.usable_bytes / unit, max(axes.get_xlim()[1], limit / unit), color="#f0f0f0", zorder=0)
        axes.set_xlim(right=max(axes.get_xlim()[1], limit / unit))
        axes.annotate(
            f"{format_bytes(decision.usable_bytes)} usable",
            (decision.usable_bytes / unit, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=8,
            color=GREY,
        )
    if decision.choice is not None:
        axes.plot(
            [decision.choice.peak_bytes / unit],
            [decision.choice.tokens_per_s],
            marker="o",
            markersize=16,
            markerfacecolor="none",
            markeredgecolor="#000000",
            linewidth=0,
            label="the choice",
            zorder=4,
        )
    axes.set_xlabel(f"peak memory ({name})")
    axes.set_ylabel(f"tokens per second{_estimated(planned)}")
    quiet(axes, "both")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="batch at each point")
    return picture


def _estimated(planned: PlanResult) -> str:
    """` (estimated)` where the rates were not measured."""
    was_run = {each.source == "measured" for each in planned.decision.candidates}
    if was_run == {True}:
        return ""
    return " (estimated unless measured)" if True in was_run else " (estimated)"
