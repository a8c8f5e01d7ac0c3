"""Predicts every stored grid of measured cells and says how far off the predictions are.

    python benchmarks/accuracy.py           every results/reference/truth-*.json; no device needed
    python benchmarks/accuracy.py cpu       only those whose name contains this

Writes results/reference/accuracy.json beside them, and keeps there what it has of the other grids. What a card
allocates depends on torch's version, so a card's grid is predicted with the versions it was measured with; an emulated
grid of other versions is left out.

Bars, by error of the allocated peak: on a CPU at most 0.1 % in the worst cell and 0.01 % in the median, with the right
phase in every cell; on CUDA 1 % in the median and 3 % in the 95th percentile, and of the reserved peak 3 % in the
median. Against an emulated card, where PyTorch's own allocator counts: allocated equal to the byte in 97 % of the cells
and at most 0.02 % off in the worst, reserved in 90 % and 0.5 %, with the right phase and the right answer to whether it
fits in every cell; before torch 2.13, 0.1 % and 2 % in the worst. Exits with 1 when one is missed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from gcbench.simulate.cuda.workspaces import persistent_terms

STORED = REFERENCE / "accuracy.json"
BARS = {
    "cpu": {"worst": 0.001, "median": 0.0001, "phases": 1.0},
    "cuda": {"median": 0.01, "95th percentile": 0.03, "reserved, median": 0.03},
    "emulated": {
        "allocated equal": 0.97,
        "worst": 0.0002,
        "phases": 1.0,
        "reserved equal": 0.9,
        "reserved, worst": 0.005,
        "fits": 1.0,
    },
    "emulated, before torch 2.13": {"worst": 0.001, "phases": 1.0, "reserved, worst": 0.02},
}
AT_LEAST = ("phases", "allocated equal", "reserved equal", "fits")
"""Figures of which more is better."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One cell, measured and predicted.

    Attributes:
        measured: its peaks; None where memory ran out.
        predicts_fit: whether it is predicted to run within the card's memory; None where that is not asked.
    """

    case: str
    strategy: str
    measured: MemoryPeaks | None
    predicted: MemoryPeaks | None
    why_not: str | None
    predicts_fit: bool | None = None

    @property
    def error(self) -> float | None:
        """Of the allocated peak, relative to what was measured; negative where the prediction is too low."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted.allocated_bytes / self.measured.allocated_bytes - 1

    @property
    def reserved_error(self) -> float | None:
        if self.predicted is None or self.measured is None or self.predicted.reserved_bytes is None:
            return None
        return (
            self.predicted.reserved_bytes / self.measured.reserved_bytes - 1 if self.measured.reserved_bytes else None
        )

    @property
    def same_phase(self) -> bool | None:
        if self.measured is None:
            return None
        return self.predicted is not None and self.predicted.peak_phase == self.measured.peak_phase

    @property
    def fits_as_predicted(self) -> bool | None:
        return None if self.predicts_fit is None else self.predicts_fit == (self.measured is not None)

    def __str__(self) -> str:
        size = format_bytes(self.measured.allocated_bytes) if self.measured else "ran out"
        error = _percent(self.error) if self.predicted else self.why_not
        reserved = "" if self.reserved_error is None else f"  reserved {_percent(self.reserved_error)}"
        phase = f"  peak in {self.measured.peak_phase}, predicted elsewhere" if self.same_phase is False else ""
        phase = phase if self.measured else ""
        fits = f"  predicted to {'fit' if self.predicts_fit else 'run out'}" if self.fits_as_predicted is False else ""
        return f"{self.case:42} {self.strategy:10} {size:>10} {error:>12}{reserved}{phase}{fits}"


def target_options(truth: dict[str, Any], machine: Machine) -> TargetOptions:
    """The target of a truth; an emulated card's allocator has the memory that its own truth found free.

    What a context takes is an estimate on both sides, and not what an emulated card can judge.
    """
    if truth.get("source") != "emulated":
        return TargetOptions()
    target = targets.resolve_target(TargetOptions(), machine)
    assert target is not None
    outside = sum(term.nbytes for term in persistent_terms(target) if not term.in_allocator)
    return TargetOptions(device=machine.device, device_memory=truth["free_bytes"] + outside)


def compare(truth: dict[str, Any], children: list[ForkedChildren]) -> Iterator[Comparison]:
    """Every measured cell of a grid against its prediction for the machine it was measured on."""
    machine = decode(Machine, truth["machine"])
    options = target_options(truth, machine)
    is_emulated = truth.get("source") == "emulated"
    for case in truth["cases"]:
        wanted = config.settings(case["settings"])
        source = sources.resolve(wanted.model, pretrained=False, trust_remote_code=False)
        target = targets.resolve_target(options, machine)
        if target is not None:
            target = replace(target, settled_when_built=truth.get("settled_when_built", False))
        report = forecast.forecast(wanted, options, target, source=source, children=children, command="make accuracy")
        said = {outcome.cell.strategy: outcome for outcome in report.outcomes}
        for cell in case["cells"]:
            ran_out = is_emulated and cell["kind"] == "oom"
            if cell["memory"] is None and not ran_out:
                continue
            outcome = said[cell["strategy"]]
            prediction = outcome.prediction
            yield Comparison(
                case=case["name"],
                strategy=cell["strategy"],
                measured=decode(MemoryPeaks, cell["memory"]) if cell["memory"] else None,
                predicted=prediction.memory if prediction else None,
                why_not=outcome.failure.message if outcome.failure else None,
                predicts_fit=(prediction.spare_bytes or 0) >= 0 if prediction and is_emulated else None,
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
        "allocated equal": errors.count(0.0) / len(errors),
        "under-estimates": len(low),
        "worst under-estimate": max(low, default=0.0),
        "phases": _share([cell.same_phase for cell in cells]),
        "reserved, median": median(reserved) if reserved else None,
        "reserved, worst": max(reserved, default=None),
        "reserved equal": reserved.count(0.0) / len(reserved) if reserved else None,
        "ran out": sum(cell.measured is None for cell in cells),
        "fits": _share([cell.fits_as_predicted for cell in cells]),
    }


def _share(answers: Sequence[bool | None]) -> float | None:
    known = [answer for answer in answers if answer is not None]
    return sum(known) / len(known) if known else None


def missed(figures: dict[str, float | int | None], kind: str) -> list[str]:
    """The bars that these figures do not reach."""
    bad = []
    for name, bar in BARS[kind].items():
        figure = figures[name]
        if figure is not None and (figure < bar if name in AT_LEAST else figure > bar):
            bad.append(f"{name}: {figure:.4%} against {bar:.2%}")
    if figures["without a prediction"]:
        bad.append(f"{figures['without a prediction']} cells without a prediction")
    return bad


def kind_of(truth: dict[str, Any]) -> str:
    """Which bars a truth is held to."""
    if truth.get("source") != "emulated":
        return str(truth["machine"]["device"].partition(":")[0])
    release = tuple(map(int, truth["machine"]["versions"]["torch"].split(".")[:2]))
    return "emulated" if release >= (2, 13) else "emulated, before torch 2.13"


def other_versions(truth: dict[str, Any]) -> list[str]:
    """The libraries that an emulated truth was made with in other versions than those here, as `torch 2.11.0`."""
    if truth.get("source") != "emulated":
        return []
    there = truth["machine"]["versions"]
    names = ("torch", "transformers")
    return [f"{name} {there[name]}" for name in names if there[name].split("+")[0] != version(name).split("+")[0]]


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:+.4f} %"


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    os.chdir(REFERENCE.parents[1])  # where a model is a folder of this repository, its path begins there
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
            if others := other_versions(truth):
                print(f"  left out: predict it with {' and '.join(others)}")
                continue
            cells = []
            for cell in compare(truth, children):
                cells.append(cell)
                print(f"  {cell}", flush=True)
            figures = summary(cells)
            for name, figure in figures.items():
                text = "–" if figure is None else f"{figure:.4%}" if isinstance(figure, float) else str(figure)
                print(f"  {name:24} {text}")
            kind = kind_of(truth)
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
