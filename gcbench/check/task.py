"""The task of a child process that checks combinations, and the events that it sends. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.check.cases import Combination
from gcbench.core.records import Json
from gcbench.models.sources import ModelSource


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """Test combinations on small real steps.

    Attributes:
        source: the model, which is scaled down first unless `full_size`.
        combinations: (index in the check, combination).
        seq_len: tokens per sequence; None for 32, or fewer where the model has fewer positions.
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
    """Event: a reference has been trained, for `steps_s` seconds of training steps."""

    steps_s: float
