"""What a prediction does not cover: what a reader might look for and not find. No torch."""

from __future__ import annotations

from gcbench.core.records import Report
from gcbench.report import sentences
from gcbench.report.predictions import by_workload
from gcbench.strategies import OFF


def not_covered(report: Report) -> tuple[str, ...]:
    """What a reader might look for and not find, a sentence each."""
    gaps = ["time: how long a step takes is not predicted"]
    for workload, cells in by_workload(report).items():
        place = sentences.title(workload, model=False, device=False)
        for cell in cells:
            if cell.prediction is None:
                ended = "its prediction is missing" if cell.row.status == "ok" else sentences.how_it_ended(cell.row)
                gaps.append(f"{cell.row.strategy} at {place}: {ended}")
        if OFF not in {cell.row.strategy for cell in cells}:
            gaps.append(f"savings at {place}: off is not among its strategies")
    said = [outcome.prediction for outcome in report.outcomes if outcome.prediction]
    if said and all(prediction.memory.process_bytes is None for prediction in said):
        gaps.append("the memory of the process: on a CPU, only what tensors hold is predicted")
    if any(prediction.terms for prediction in said):
        gaps.append(
            "the exact size of what the trace cannot see: it is what the sources named above say, and another driver "
            "or another version of a library may take more or less"
        )
        gaps.append(
            "cards other than an H100: with one, allocated peaks agreed within 0.02 % and reserved ones within 9 % in "
            "71 cells (make accuracy); on others nothing was compared yet"
        )
    gaps.append("what runs beside the training step: evaluation, saving, and other programs on the device")
    return tuple(gaps)
