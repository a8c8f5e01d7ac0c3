"""The task that a child process plans, and its messages. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.records import Json, Lora
from gcbench.devices.target import Target
from gcbench.models.sources import ModelSource
from gcbench.plan.decision import Decision
from gcbench.predict.task import PredictTask
from gcbench.strategies import Plan


@dataclass(frozen=True, kw_only=True)
class PlanTask:
    """Find the fastest setting that fits.

    Attributes:
        named: strategies to compare with searched plans, with their plans.
        batch_sizes: those to try; None to search all useful sizes.
        reserve_frac: fraction of the device's memory that is held back.
        layers_in_order: numbers of the layers that training runs; None for all, in the model's order.
        can_checkpoint: whether single layers can be checkpointed.
        own: the plan of the model's own checkpointing, where it supports no other.
        is_confirmed: whether the leading candidates are measured afterwards, so that the choice may change.
        device_here: the device of this machine to time operators on; None to use the rates of the target's card.
        calibration_s: seconds for timing operators on it, spent up to twice; call overheads take seven more, once.
    """

    handler: ClassVar[str] = "gcbench.plan.search.planner:plan"

    source: ModelSource
    layers: int | None
    overrides: dict[str, Json]
    attn_implementation: str | None
    lora: Lora | None
    precision: str
    optim: str
    target: Target
    seq_len: int
    named: tuple[tuple[str, Plan], ...]
    batch_sizes: tuple[int, ...] | None
    reserve_frac: float
    layers_in_order: tuple[int, ...] | None
    can_checkpoint: bool
    device_here: str | None
    own: Plan | None = None
    is_confirmed: bool = False
    calibration_s: float = 4.0

    def as_predictions(self) -> PredictTask:
        """The same model on the same target, with no cells yet."""
        return PredictTask(
            source=self.source,
            layers=self.layers,
            overrides=self.overrides,
            attn_implementation=self.attn_implementation,
            lora=self.lora,
            precision=self.precision,
            optim=self.optim,
            target=self.target,
            cells=(),
            explain=False,
            exact=False,
        )


@dataclass(frozen=True, kw_only=True)
class Decided:
    """The result of a `PlanTask`."""

    decision: Decision


@dataclass(frozen=True, kw_only=True)
class Planning:
    """The progress of a `PlanTask`: steps done, of how many, and what it does now."""

    done: int
    total: int
    doing: str
