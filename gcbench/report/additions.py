"""Reports what a real run may add to a predicted step: bytes, and which strategies no longer fit. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gcbench.core.prediction import ACCUMULATION, KEPT_OUTPUTS, Addition, Fallback
from gcbench.core.units import format_bytes
from gcbench.report import predictions as predicted
from gcbench.report.predictions import PredictedCell
from gcbench.report.sentences import listed

_WHAT = {
    ACCUMULATION: "gradient accumulation (all gradients stay allocated from the second micro-batch on)",
    KEPT_OUTPUTS: "a loop that keeps `outputs`, and so the logits, in a variable",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting and what a real run may add to it.

    Attributes:
        fits: whether it fits without the additions.
    """

    name: str
    fits: bool
    additions: tuple[Addition, ...]


def sentence(chosen: Setting, others: Sequence[Setting], *, usable_bytes: int | None) -> str | None:
    """Return `Not in these figures: gradient accumulation … adds 14.96 GiB to off, …`; None without additions.

    `usable_bytes` is the device's memory less the reserve; None without a limit.
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
    """Return how much of a setting's peak is due to missing packages with fused kernels; None if negligible."""
    if fallback is None or fallback.nbytes < predicted.NEGLIGIBLE_FRAC * peak_bytes:
        return None
    packages = listed(list(fallback.packages))
    return (
        "Its recurrent layers were traced with transformers' PyTorch code, which accounts for "
        f"{format_bytes(fallback.nbytes)} of the {format_bytes(peak_bytes)} of {name}; with {packages} installed, "
        "a card runs fused kernels, which need little of it."
    )


def _is_lost(setting: Setting, name: str, usable_bytes: int | None) -> bool:
    return usable_bytes is not None and any(
        addition.name == name and addition.peak_bytes > usable_bytes for addition in setting.additions
    )


def paragraphs(cells: Sequence[PredictedCell]) -> tuple[str, ...]:
    """Return the paragraphs below the table of one workload's predictions."""
    return tuple(text for text in (predicted.summary(cells), *of_cells(cells)) if text)


def of_cells(cells: Sequence[PredictedCell]) -> tuple[str, ...]:
    """Return how memory in a real run may differ from the predictions of one workload."""
    best = predicted.choice(cells)
    if best is None or best.prediction is None:
        return ()

    def setting(cell: PredictedCell) -> Setting:
        additions = cell.prediction.additions if cell.prediction else ()
        return Setting(name=cell.row.strategy, fits=predicted.may_run(cell), additions=additions)

    fallback = best.prediction.fallback
    peak = best.prediction.memory.allocated_bytes
    others = [setting(cell) for cell in cells if cell is not best]
    sentences = (
        kernels_sentence(fallback, best.row.strategy, peak),
        sentence(setting(best), others, usable_bytes=best.row.usable_bytes),
    )
    return tuple(text for text in sentences if text)
