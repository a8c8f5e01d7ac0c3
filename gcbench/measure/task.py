"""The task of a child process that measures one round of one cell. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.records import Cell, Json, Lora
from gcbench.models.sources import ModelSource
from gcbench.strategies import Plan

MAX_TIMED_STEPS = 20
"""The most timed steps of a round where `--steps` is not passed."""


@dataclass(frozen=True, kw_only=True)
class MeasureTask:
    """Measure one round of one cell.

    Attributes:
        attn_implementation: the user's choice; None for the model's own.
        steps: timed steps, at least; an emulated card runs none.
        least_timed_s: timed steps go on until they have taken this long, or `MAX_TIMED_STEPS` were run.
        with_memory: whether to run a step with the memory probe.
        snapshot: the file for a memory snapshot of that step, or of the step that runs out of memory.
    """

    handler: ClassVar[str] = "gcbench.measure.worker:measure"

    cell: Cell
    round: int
    source: ModelSource
    layers: int | None
    overrides: dict[str, Json]
    attn_implementation: str | None
    plan: Plan
    seed: int
    warmup: int
    steps: int
    least_timed_s: float
    with_memory: bool
    memory_limit_bytes: int | None
    lora: Lora | None = None
    snapshot: str | None = None

    @property
    def num_steps(self) -> int:
        """Training steps, at least."""
        return self.warmup + self.with_memory + self.steps
