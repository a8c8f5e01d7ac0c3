"""Predicts every stored grid of measured cells and says how far off the predictions are.

    python benchmarks/accuracy.py           every results/reference/truth-*.json; no device needed
    python benchmarks/accuracy.py cpu       only those whose name contains this

Writes results/reference/accuracy.json beside them, and keeps there what it has of the other grids. What a card
allocates depends on torch's version, so a card's grid is predicted with the versions it was measured with.

Bars, by error of the allocated peak: on a CPU at most 0.1 % in the worst cell and 0.01 % in the median, with the right
phase in every cell; on CUDA 1 % in the median and 3 % in the 95th percentile, and of the reserved peak 3 % in the
median. Exits with 1 when one is missed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

from truth import REFERENCE

from gcbench import __version__
from gcbench.core.files import write_text
from gcbench.core.json_codec import decode
from gcbench.core.records import Machine, MemoryPeaks
from gcbench.core.units import format_bytes
from gcbench.devices import target as targets
from gcbench.devices.target import TargetOptions
from gcbench.job import settings as config
from gcbench.models import sources
from gcbench.predict import session as forecast
from gcbench.processes.children import ForkedChildren

STORED = REFERENCE / "accuracy.json"
BARS = {
    "cpu": {"worst": 0.001, "median": 0.0001, "phases": 1.0},
    "cuda": {"median": 0.01, "95th percentile": 0.03, "reserved, median": 0.03},
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One cell, measured and predicted."""

    case: str
    strategy: str
    measured: MemoryPeaks
    predicted: MemoryPeaks | None
    why_not: str | None

    @property
    def error(self) -> float | None:
        """Of the allocated peak, relative to what was measured; negative where the prediction is too low."""
        if self.predicted is None:
            return None
        return self.predicted.allocated_bytes / self.measured.allocated_bytes - 1

    @property
    def reserved_error(self) -> float | None:
        if self.predicted is None or not self.measured.reserved_bytes or self.predicted.reserved_bytes is None:
            return None
        return self.predicted.reserved_bytes / self.measured.reserved_bytes - 1

    @property
    def same_phase(self) -> bool:
        return self.predicted is not None and self.predicted.peak_phase == self.measured.peak_phase


def compare(truth: dict[str, Any], children: list[ForkedChildren]) -> Iterator[Comparison]:
    """Every measured cell of a grid against its prediction for the machine it was measured on."""
    machine = decode(Machine, truth["machine"])
    for case in truth["cases"]:
        wanted = config.settings(case["settings"])
        source = sources.resolve(wanted.model, pretrained=False, trust_remote_code=False)
        target = targets.resolve_target(TargetOptions(), machine)
        report = forecast.forecast(
            wanted, TargetOptions(), target, source=source, children=children, command="make accuracy"
        )
        said = {outcome.cell.strategy: outcome for outcome in report.outcomes}
        for cell in case["cells"]:
            if cell["memory"] is None:
                continue
            outcome = said[cell["strategy"]]
            yield Comparison(
                case=case["name"],
                strategy=cell["strategy"],
                measured=decode(MemoryPeaks, cell["memory"]),
                predicted=outcome.prediction.memory if outcome.prediction else None,
                why_not=outcome.failure.message if outcome.failure else None,
            )


def summary(cells: Sequence[Comparison]) -> dict[str, float | int | None]:
    """What the errors come to; sizes of errors, except where said."""
    errors = sorted(abs(cell.error) for cell in cells if cell.error is not None)
    low = [-cell.error for cell in cells if cell.error is not None and cell.error < 0]
    reserved = [abs(cell.reserved_error) for cell in cells if cell.reserved_error is not None]
    return {
        "cells": len(cells),
        "without a prediction": sum(cell.predicted is None for cell in cells),
        "median": median(errors),
        "95th percentile": errors[max(0, -(-95 * len(errors) // 100) - 1)],
        "worst": errors[-1],
        "under-estimates": len(low),
        "worst under-estimate": max(low, default=0.0),
        "phases": sum(cell.same_phase for cell in cells) / len(cells),
        "reserved, median": median(reserved) if reserved else None,
    }


def missed(figures: dict[str, float | int | None], kind: str) -> list[str]:
    """The bars that these figures do not reach."""
    bad = []
    for name, bar in BARS[kind].items():
        figure = figures[name]
        if figure is not None and (figure < bar if name == "phases" else figure > bar):
            bad.append(f"{name}: {figure:.4%} against {bar:.2%}")
    if figures["without a prediction"]:
        bad.append(f"{figures['without a prediction']} cells without a prediction")
    return bad


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:+.4f} %"


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    files = sorted(path for path in REFERENCE.glob("truth-*.json") if wanted in path.name)
    if not files:
        sys.exit(f"there is no truth-*.json in {REFERENCE}; measure one with make truth")
    kept = json.loads(STORED.read_text(encoding="utf-8"))["truths"] if STORED.exists() else {}
    stored: dict[str, Any] = {"gcbench": __version__, "command": "make accuracy", "truths": kept}
    bad: list[str] = []
    with ExitStack() as stack:
        children = [stack.enter_context(ForkedChildren()) for _ in range(forecast.num_children())]
        for path in files:
            begin = time.perf_counter()
            truth = json.loads(path.read_text(encoding="utf-8"))
            machine = truth["machine"]
            print(f"{path.stem}: {machine['device_name']}, torch {machine['versions']['torch']}")
            cells = []
            for cell in compare(truth, children):
                cells.append(cell)
                phase = "" if cell.same_phase else f"  peak in {cell.measured.peak_phase}, predicted elsewhere"
                reserved = "" if cell.reserved_error is None else f"  reserved {_percent(cell.reserved_error)}"
                size = format_bytes(cell.measured.allocated_bytes)
                told = _percent(cell.error) if cell.predicted else cell.why_not
                print(f"  {cell.case:42} {cell.strategy:10} {size:>10} {told:>12}{reserved}{phase}", flush=True)
            figures = summary(cells)
            for name, figure in figures.items():
                text = "–" if figure is None else f"{figure:.4%}" if isinstance(figure, float) else str(figure)
                print(f"  {name:24} {text}")
            kind = machine["device"].partition(":")[0]
            told_bad = missed(figures, kind)
            bad += [f"{path.stem}: {line}" for line in told_bad]
            stored["truths"][path.stem] = {
                "machine": machine,
                "predicted with": {name: version(name) for name in ("torch", "transformers")},
                "figures": figures,
                "bars": BARS[kind],
                "errors": [
                    {"case": c.case, "strategy": c.strategy, "error": c.error, "reserved_error": c.reserved_error}
                    for c in cells
                ],
            }
            print(f"  {time.perf_counter() - begin:.0f} s")
    write_text(STORED, json.dumps(stored, indent=1) + "\n")
    if bad:
        sys.exit("bars missed:\n" + "\n".join(bad))


if __name__ == "__main__":
    main()
