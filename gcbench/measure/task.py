"""What a child is asked for one round of one cell. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.records import Cell, Json, Lora
from gcbench.models.sources import ModelSource
from gcbench.strategies import Plan

MAX_TIMED_STEPS = 20
"""Where their number is not given."""


@dataclass(frozen=True, kw_only=True)
class MeasureTask:
    """Measure one round of one cell."""

    handler: ClassVar[str] = "gcbench.measure.worker:measure"

    cell: Cell
    round: int
    source: ModelSource
    layers: int | None
    overrides: dict[str, Json]
    attn_implementation: str | None
    """As the user asked for it; None for the model's own choice."""
    plan: Plan
    seed: int
    warmup: int
    steps: int
    """Timed steps, at least."""
    least_timed_s: float
    """Timed steps go on until they have taken this long, or `MAX_TIMED_STEPS` were run."""
    with_memory: bool
    memory_limit_bytes: int | None
    lora: Lora | None = None

    @property
    def num_steps(self) -> int:
        """Training steps, at least."""
        return self.warmup + self.with_memory + self.steps
