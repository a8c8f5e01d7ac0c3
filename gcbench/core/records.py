"""The vocabulary: what a cell is, what it ended in, and the row that is made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from gcbench.core.memory_peaks import PHASES as PHASES
from gcbench.core.memory_peaks import MemoryPeaks as MemoryPeaks
from gcbench.core.memory_peaks import Phase as Phase
from gcbench.core.prediction import Prediction

SCHEMA = 1

FailureKind = Literal["oom", "unsupported", "timeout", "killed", "crash"]
ERROR_KINDS: tuple[FailureKind, ...] = ("timeout", "killed", "crash")
"""Failures that make a command exit with 1; out of memory and unsupported are results."""

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything but the strategy that decides memory and time."""

    model: str
    device: str
    batch_size: int
    seq_len: int
    precision: str
    optim: str
    attn_implementation: str | None = None
    """The attention kernel in use; None for a model without attention."""
    lora_r: int | None = None
    """Rank of the adapters that are trained in place of the model's parameters; None when those are trained."""
    model_changes: str | None = None
    """What `--layers` and `--set` changed about the model, such as `num_hidden_layers=6`; None for the model itself."""


ALL_LINEAR = "all-linear"
"""In place of target modules: every linear layer but the output layer."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters that are trained while the model's own parameters are frozen.

    Attributes:
        r: their rank.
        target_modules: names of the modules that get one, or `all-linear` alone; None for peft's choice.
    """

    r: int
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One workload and one strategy: what gets one row."""

    workload: Workload
    strategy: str

    @property
    def key(self) -> str:
        """Names the cell within a run, and in file names."""
        w = self.workload
        return f"b{w.batch_size}-s{w.seq_len}-{re.sub('[^a-zA-Z0-9_.+#]', '-', self.strategy)}"


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What one child process measured: one round of one cell.

    Attributes:
        round: 0-based.
        memory: None in rounds that only time.
        step_times_s: raw samples of the timed steps, in order.
        layers_run: layers that can be checkpointed and that the forward pass ran (a multimodal model owns layers
            that training on text never calls).
        layers_planned: those of them in the plan's groups that a gradient passes back through (below the lowest LoRA
            adapter none does).
        layers_recomputed: layers run a second time in the same step; None where they are compiled and nobody sees.
        params_without_grad: trainable parameters whose gradient was None after the first backward.
        grad_checksum: exact checksum of all gradients of the first step; equal means bit-identical.
        grad_rel_diff: L2 norm of the difference of these gradients from `off` in round 0, relative to its norm;
            0.0 when the checksums agree; None without a reference.
        grad_worst_param: the parameter with the largest part in that difference; None when there is none.
        num_alloc_retries: times the caching allocator had to flush and retry; None on the CPU.
        num_steps: training steps run, warm-up and memory step included.
        steps_s: seconds spent in them.
        wall_s: seconds from the parent's start of the child to its end.
        draws_other_dropout: layers are compiled and drop activations, by other random numbers than those of `off`, so
            that their gradients cannot be compared.
        draws_outside_torch: the forward pass of the first step draws from Python's or NumPy's generator.
    """

    round: int
    memory: MemoryPeaks | None
    step_times_s: tuple[float, ...]
    layers_run: int
    layers_planned: int
    layers_recomputed: int | None
    params_without_grad: int
    grad_checksum: str
    grad_rel_diff: float | None
    grad_worst_param: str | None
    num_alloc_retries: int | None
    num_steps: int
    steps_s: float
    wall_s: float
    draws_other_dropout: bool = False
    draws_outside_torch: bool = False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell has no full measurement, and the next thing to try."""

    kind: FailureKind
    message: str
    detail: str = ""
    """The end of what the child printed, for a bug report."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell ended in, or has come to so far: its rounds, and a failure if one stopped it."""

    cell: Cell
    layers_checkpointed: int
    """Layers in the plan's groups, before it is known which of them the model runs."""
    rounds: tuple[RoundResult, ...] = ()
    failure: Failure | None = None
    repeat_rel_diffs: tuple[float, ...] = ()
    """Of `off` alone: `grad_rel_diff` of runs that were neither timed nor probed; made where a verdict depends on the
    noise of `off`, and one round does not tell it."""
    prediction: Prediction | None = None
    """In place of rounds, in a report of predictions; with the failure `oom` where the cell does not fit."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the model is, read off the built model (on the meta device).

    Attributes:
        num_params: distinct parameters, tied weights once, adapters included.
        num_layers: layers that can be checkpointed, in `modules()` order.
        max_seq_len: the model's own maximum length; None where it has none.
        attn_implementation: the kernel the model uses unless told otherwise.
        checkpointing_refusal: why the model cannot checkpoint; None when it can.
        only_own: why no layers can be chosen, and what can be done, for a model that checkpoints in its own way alone.
        own_groups: the layers that its own way recomputes, those that are recomputed together in one group; None where
            nobody looked, or no look was possible.
        num_trainable_params: those that are not frozen; None in a report from before there was LoRA.
        layers_in_order: numbers of the layers that training runs, in the order in which it does; None where that is all
            of them in `modules()` order, or where nobody asked.
    """

    model: str
    model_type: str
    num_params: int
    num_layers: int
    max_seq_len: int | None
    attn_implementation: str | None
    checkpointing_refusal: str | None
    num_trainable_params: int | None = None
    layers_in_order: tuple[int, ...] | None = None
    only_own: str | None = None
    own_groups: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the figures were made on.

    Attributes:
        device: "cpu" or "cuda:N".
        device_name: the processor's or the card's own name.
        device_memory_bytes: memory of that device.
        versions: package or driver -> version.
        settings: what else moves figures: threads, allocator settings, TF32, environment variables.
    """

    device: str
    device_name: str
    device_memory_bytes: int | None
    platform: str
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run: a set of cells with everything needed to read and repeat them."""

    schema: int
    gcbench_version: str
    command: str
    created: str
    """ISO 8601, UTC."""
    settings: dict[str, Json]
    """The resolved settings, under the names of the TOML keys."""
    machine: Machine
    model: ModelFacts
    outcomes: tuple[Outcome, ...]
    notices: tuple[str, ...] = ()
    """What the run decided for the user, in sentences: defaults taken, strategies left out."""
    source: Literal["measured", "predicted"] = "measured"
    plan_files: dict[str, str] = field(default_factory=dict)
    """Strategy -> the content of the file that it was read from."""
    model_notices: tuple[str, ...] = ()
    """In what the model differs from what its config says, in sentences: full weights in place of quantised ones."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell as it appears in every table, CSV and JSON; the field order is the column order.

    Unknown is None. New columns go at the end.
    """

    model: str
    strategy: str
    status: str
    device: str
    batch_size: int
    seq_len: int
    precision: str
    optim: str
    attn_implementation: str | None
    num_params: int
    num_layers: int
    layers_checkpointed: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_process_bytes: int | None
    peak_phase: str | None
    step_time_s: float | None
    step_time_low_s: float | None
    step_time_high_s: float | None
    tokens_per_s: float | None
    memory_saved_frac: float | None
    time_overhead_frac: float | None
    grad_rel_diff: float | None
    source: str
    message: str | None
    layers_recomputed: int | None = None
    params_without_grad: int | None = None
    peak_forward_bytes: int | None = None
    peak_backward_bytes: int | None = None
    peak_optimizer_bytes: int | None = None
    time_overhead_low_frac: float | None = None
    time_overhead_high_frac: float | None = None
    grad_noise_floor: float | None = None
    """Largest difference between the gradients of two `off` rounds; 0.0 where kernels are deterministic."""
    proof: str | None = None
    """`identical`, `within noise`, `no reference` or, where a saving must not be shown, `FAILED: why` or
    `not repeatable`, where `off` differs from itself by more than roundoff explains."""
    lora_r: int | None = None
    """Rank of the LoRA adapters; None where all parameters are trained."""
    peak_op: str | None = None
    """The operator whose memory made the peak; of predictions alone, as are the columns after it."""
    peak_layer: int | None = None
    attention_kernel: str | None = None
    """`flash`, `efficient`, `cudnn` or `math` on CUDA; several joined by a plus sign."""
    device_memory_bytes: int | None = None
    spare_bytes: int | None = None
    """What the cell leaves of the device's memory; negative where it does not fit."""
    usable_bytes: int | None = None
    """The device's memory less the reserve."""
    fits: str | None = None
    """`yes`, `too close to tell`, `in the reserve` or `no`."""
    model_changes: str | None = None
    """What `--layers` and `--set` changed about the model."""
    accumulation_adds_bytes: int | None = None
    """What gradient accumulation adds to a predicted peak; None where it is below 0.5 % of it, or not predicted."""
    kept_outputs_add_bytes: int | None = None
    """The same of a loop that keeps the model's outputs in a variable."""
    model_notice: str | None = None
    """In what the model differs from what its config says."""
