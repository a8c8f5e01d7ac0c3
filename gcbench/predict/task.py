"""What a child is asked for predictions, and how it answers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.prediction import Prediction
from gcbench.core.records import Failure, Json, Lora
from gcbench.devices.target import Target
from gcbench.models.sources import ModelSource
from gcbench.strategies import Plan


@dataclass(frozen=True, kw_only=True)
class CellToPredict:
    """One cell of a `PredictTask`; `number` is its place in the report."""

    number: int
    batch_size: int
    seq_len: int
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class PredictTask:
    """Predict the memory of cells that share all but batch size, length and plan."""

    handler: ClassVar[str] = "gcbench.predict.worker:predict"

    source: ModelSource
    layers: int | None
    overrides: dict[str, Json]
    attn_implementation: str | None
    """As the user asked for it; None for the model's own choice."""
    lora: Lora | None
    precision: str
    optim: str
    target: Target
    cells: tuple[CellToPredict, ...]
    explain: bool
    """Also try what would move the peak."""
    exact: bool
    """Trace every layer."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One cell answered."""

    number: int
    prediction: Prediction | None = None
    failure: Failure | None = None
