"""What a child is asked for a check, and how it answers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.check.cases import Combination
from gcbench.core.records import Json
from gcbench.models.sources import ModelSource


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """Try combinations on small real steps.

    Attributes:
        source: the model; made smaller first unless `full_size`.
        combinations: (its place in the check, what to try).
        seq_len: None for 32, or fewer where the model has fewer positions.
    """

    handler: ClassVar[str] = "gcbench.check.worker:check"

    source: ModelSource
    layers: int | None
    overrides: dict[str, Json]
    device: str
    full_size: bool
    combinations: tuple[tuple[int, Combination], ...]
    batch_size: int
    seq_len: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """A reference has been trained for combinations to come."""

    steps_s: float
