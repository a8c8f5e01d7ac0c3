"""The task of a child process that measures one round of one cell. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.gradient_fingerprint import Fingerprint
from gcbench.core.records import Cell, Json, Lora, RoundResult, Turn
from gcbench.models.sources import ModelSource
from gcbench.strategies import Plan

MAX_TIMED_STEPS = 20
"""The most timed steps of a turn where `--steps` is not passed."""


@dataclass(frozen=True, kw_only=True)
class MeasureTask:
    """Measure one cell in a process of its own.

    Attributes:
        round: number of the process, 0-based.
        attn_implementation: the user's choice; None for the model's own.
        steps: timed steps of a turn, at least; an emulated card runs none.
        least_timed_s: a turn goes on until its steps have taken this long, or `MAX_TIMED_STEPS` were run.
        turn: number of the one turn that the process takes; None where it pauses, with `Ready`, and takes each turn
            that it is told to.
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
    turn: int | None
    memory_limit_bytes: int | None
    lora: Lora | None = None
    snapshot: str | None = None

    @property
    def num_steps(self) -> int:
        """Training steps, at least."""
        return self.warmup + self.with_memory + self.steps


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A process has warmed up and waits for its turns.

    Attributes:
        result: what was measured so far, without timed steps.
        fingerprint: of the gradients of the first step.
        held_bytes: memory that the process holds while it waits; None when it is not known.
        free_bytes: memory that other processes can still use; None when it is not known.
    """

    result: RoundResult
    fingerprint: Fingerprint
    held_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class TakeTurn:
    """The parent's word to a waiting process: run timed steps."""

    number: int


@dataclass(frozen=True, kw_only=True)
class TurnTaken:
    """A process has taken its turn and waits again.

    Attributes:
        process_bytes: peak memory of the process in all its turns so far; None when it cannot be told from that of
            others.
        num_alloc_retries: as in `RoundResult`.
        num_steps, steps_s: training steps of the process so far, and seconds spent in them.
    """

    turn: Turn
    process_bytes: int | None
    num_alloc_retries: int | None
    num_steps: int
    steps_s: float
