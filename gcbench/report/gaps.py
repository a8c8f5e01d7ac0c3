"""Lists what a prediction does not cover. No torch."""

from __future__ import annotations

from gcbench.core.records import Report
from gcbench.report import sentences
from gcbench.report.predictions import by_workload
from gcbench.strategies import OFF


def not_covered(report: Report) -> tuple[str, ...]:
    """Return what a reader may miss in the report, a sentence each."""
    gaps = list(_times(report))
    for workload, cells in by_workload(report).items():
        place = sentences.title(workload, model=False, device=False)
        for cell in cells:
            if cell.prediction is None:
                ended = "its prediction is missing" if cell.row.status == "ok" else sentences.how_it_ended(cell.row)
                gaps.append(f"{cell.row.strategy} at {place}: {ended}")
        if OFF not in {cell.row.strategy for cell in cells}:
            gaps.append(f"savings at {place}: off is not among its strategies")
    predictions = [outcome.prediction for outcome in report.outcomes if outcome.prediction]
    if predictions and all(prediction.memory.process_bytes is None for prediction in predictions):
        gaps.append("the memory of the process: on a CPU, only allocated memory is predicted")
    if any(prediction.terms for prediction in predictions):
        gaps.append(
            "the exact size of memory outside the trace: it comes from the sources named above, and may differ with "
            "another driver or library version"
        )
        gaps.append(
            "real cards other than an H100: there, allocated peaks agree within 0.08 % and reserved ones within 9 % in "
            "135 cells (make accuracy), and a process held up to 2.0 GiB more than predicted; others were compared "
            "emulated alone, in what PyTorch's allocator counts"
        )
    gaps.append("everything outside the training step: evaluation, saving, and other programs on the device")
    return tuple(gaps)


def _times(report: Report) -> tuple[str, ...]:
    """Return what is not known of the times."""
    predictions = [outcome.prediction for outcome in report.outcomes if outcome.prediction]
    reasons = dict.fromkeys(prediction.why_no_time for prediction in predictions if prediction.time is None)
    if any(prediction.time for prediction in predictions):
        gaps = ["the exact time of a step: it is estimated from its operators, and a band says how far off it may be"]
    else:
        gaps = ["time: how long a step takes is not predicted"] if not any(reasons) else []
    return (*gaps, *(f"time: {reason}" for reason in reasons if reason))
