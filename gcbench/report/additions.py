"""Says what a real run may add to a predicted step, with its bytes and what no longer fits then. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gcbench.core.prediction import ACCUMULATION, KEPT_OUTPUTS, Addition, Fallback
from gcbench.core.units import format_bytes
from gcbench.report import predictions as predicted
from gcbench.report.predictions import PredictedCell
from gcbench.report.sentences import listed

_WORTH_NAMING = 0.005
"""Of the peak."""
_WHAT = {
    ACCUMULATION: "gradient accumulation (all gradients are held from the second micro-batch on)",
    KEPT_OUTPUTS: "a loop that keeps `outputs` in a variable (and so the logits)",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting with what may be added to it.

    Attributes:
        fits: whether it fits without.
    """

    name: str
    fits: bool
    additions: tuple[Addition, ...]


def sentence(chosen: Setting, others: Sequence[Setting], *, usable_bytes: int | None) -> str | None:
    """`Not in these figures: gradient accumulation, … adds 14.96 GiB to off, …`; None where nothing of weight is added.

    `usable_bytes` is what of the device's memory may be used; None without a bound.
    """
    parts = []
    for addition in chosen.additions:
        text = f"{_WHAT[addition.name]} adds {format_bytes(addition.nbytes)} to {chosen.name}"
        if chosen.fits and _is_lost(chosen, addition.name, usable_bytes):
            text += f", which then needs {format_bytes(addition.peak_bytes)} and does not fit"
        lost = [other.name for other in others if other.fits and _is_lost(other, addition.name, usable_bytes)]
        if lost:
            text += f" ({listed(lost)} would not fit)"
        parts.append(text)
    return f"Not in these figures: {'; '.join(parts)}." if parts else None


def kernels_sentence(fallback: Fallback | None, name: str, peak_bytes: int) -> str | None:
    """What the peak of a setting would lose with the packages that bring fused kernels; None where that is little."""
    if fallback is None or fallback.nbytes < _WORTH_NAMING * peak_bytes:
        return None
    packages = listed(list(fallback.packages))
    return (
        "Its recurrent layers were traced with transformers' PyTorch code, which makes "
        f"{format_bytes(fallback.nbytes)} of the {format_bytes(peak_bytes)} of {name}; with {packages} installed, "
        "a card runs fused kernels that need little of it."
    )


def _is_lost(setting: Setting, name: str, usable_bytes: int | None) -> bool:
    return usable_bytes is not None and any(
        addition.name == name and addition.peak_bytes > usable_bytes for addition in setting.additions
    )


def paragraphs(cells: Sequence[PredictedCell]) -> tuple[str, ...]:
    """What is said beneath the table of one workload's predictions."""
    return tuple(text for text in (predicted.summary(cells), *of_cells(cells)) if text)


def of_cells(cells: Sequence[PredictedCell]) -> tuple[str, ...]:
    """What a real run may have that the predictions of one workload have not, and the other way round."""
    best = predicted.choice(cells)
    if best is None or best.prediction is None:
        return ()

    def setting(cell: PredictedCell) -> Setting:
        found = cell.prediction.additions if cell.prediction else ()
        return Setting(name=cell.row.strategy, fits=predicted.may_run(cell), additions=found)

    fallback = best.prediction.fallback
    peak = best.prediction.memory.allocated_bytes
    others = [setting(cell) for cell in cells if cell is not best]
    told = (
        kernels_sentence(fallback, best.row.strategy, peak),
        sentence(setting(best), others, usable_bytes=best.row.usable_bytes),
    )
    return tuple(text for text in told if text)
