"""What a child is asked for a decision, and how it answers. No torch."""

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
        named: strategies to weigh against what is found, with their plans.
        batch_sizes: those to try; None for all that may pay.
        reserve_frac: the part of the device's memory that is held back.
        layers_in_order: numbers of the layers that training runs; None for all, as they lie in the model.
        can_checkpoint: whether its layers can be chosen.
        own: what its own way to checkpoint does, where that is the only one.
        is_confirmed: whether the best are run before the answer, so that one of them may take the choice's place.
        device_here: the device of this machine whose figures are to be taken; None for those of the target's card.
        calibration_s: seconds that timing operators on it may take, twice; what callers add takes seven more, once.
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
    """A `PlanTask` answered."""

    decision: Decision


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Where a `PlanTask` is: so many of its steps are done, and `doing` is what it does now."""

    done: int
    total: int
    doing: str
