"""What the parent asks of a child process, and what the child answers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcbench.changes import ChangedConfig
from gcbench.checks import Combination
from gcbench.decision import Decision
from gcbench.fingerprint import Fingerprint
from gcbench.prediction import Prediction
from gcbench.records import Cell, Failure, Json, Lora, Machine, ModelFacts, RoundResult
from gcbench.simulate.target import Target
from gcbench.sources import ModelSource
from gcbench.strategies import Plan

MAX_TIMED_STEPS = 20
"""Where their number is not given."""


@dataclass(frozen=True, kw_only=True)
class DescribeTask:
    """Say what `device` is and, when `source` is given, what the model is; measure nothing."""

    device: str
    source: ModelSource | None = None
    layers: int | None = None
    overrides: dict[str, Json] = field(default_factory=dict)
    attn_implementation: str | None = None
    lora: Lora | None = None
    operators: tuple[str, ...] = ()
    """Operators that strategies name, to be checked."""
    needs_order: bool = False
    """Whether a strategy counts layers in the order in which they run."""
    needs_changes: bool = False
    """Whether what `layers` and `overrides` come to in the config is to be told."""
    target: Target | None = None
    """What is predicted for; None where something runs here, and where only a look at the machine can tell."""


@dataclass(frozen=True, kw_only=True)
class MeasureTask:
    """Measure one round of one cell."""

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
class CheckTask:
    """Try combinations on small real steps.

    Attributes:
        source: the model; made smaller first unless `full_size`.
        combinations: (its place in the check, what to try).
        seq_len: None for 32, or fewer where the model has fewer positions.
    """

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


Task = DescribeTask | MeasureTask | PredictTask | PlanTask | CheckTask


@dataclass(frozen=True, kw_only=True)
class Event:
    """One training step done, for the progress display."""

    kind: str
    """`warm-up`, `memory` or `timed`."""
    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One cell answered."""

    number: int
    prediction: Prediction | None = None
    failure: Failure | None = None


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


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A user's mistake or a missing thing that only the child could find: an error to raise in the parent."""

    error: str
    """Name of the class in `errors`."""
    message: str

    @classmethod
    def of_broken_library(cls, why: object) -> Refusal:
        """When torch or transformers cannot be imported."""
        return cls(
            error="UnavailableError",
            message=f"a library is missing or broken ({why}); install gcbench again, torch and transformers with it",
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a child wrote before it ended; exactly one of the kinds of content."""

    machine: Machine | None = None
    facts: ModelFacts | None = None
    result: RoundResult | None = None
    fingerprint: Fingerprint | None = None
    failure: Failure | None = None
    refusal: Refusal | None = None
    changed: ChangedConfig | None = None
    """Beside `facts`."""
    notices: tuple[str, ...] = ()
    """What a check decided for the user, in sentences; beside the facts of its model."""
