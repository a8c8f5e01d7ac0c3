"""The request for predictions that a child process receives, and its answers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.prediction import Prediction
from gcbench.core.records import Failure, Json, Lora, Machine
from gcbench.devices.target import Target
from gcbench.models.sources import ModelSource
from gcbench.strategies import Plan


@dataclass(frozen=True, kw_only=True)
class CellToPredict:
    """One cell of a `PredictTask`; `number` is its index in the report."""

    number: int
    batch_size: int
    seq_len: int
    plan: Plan
    snapshot: str | None = None
    """The file to write a memory snapshot to."""


@dataclass(frozen=True, kw_only=True)
class PredictTask:
    """Predict the memory and time of cells that differ only in batch size, sequence length and plan."""

    handler: ClassVar[str] = "gcbench.predict.worker:predict"

    source: ModelSource
    layers: int | None
    overrides: dict[str, Json]
    attn_implementation: str | None
    """As requested; None for the model's own choice."""
    lora: Lora | None
    precision: str
    optim: str
    target: Target
    cells: tuple[CellToPredict, ...]
    explain: bool
    """Whether to search for levers that reduce the peak."""
    exact: bool
    """Whether to trace every layer."""
    pretrained: bool = False
    """Whether the weights lie in memory as those of a checkpoint that was loaded and moved to the device."""
    here: Machine | None = None
    """This machine, if the target is its device: its stored calibration counts."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The prediction of one cell, or its failure."""

    number: int
    prediction: Prediction | None = None
    failure: Failure | None = None
