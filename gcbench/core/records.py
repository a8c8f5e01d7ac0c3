"""Records shared by all packages: a cell, its outcome, the report of a run, and the row that tables show."""

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

Source = Literal["measured", "emulated", "predicted"]
"""Where figures come from; `emulated`: real training steps on a card that is not there, which compute nothing."""
EMULATED = "emulated"
"""The name of the emulated card among a machine's settings."""

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """All settings that determine memory and time, except the strategy."""

    model: str
    device: str
    batch_size: int
    seq_len: int
    precision: str
    optim: str
    attn_implementation: str | None = None
    """The attention implementation in use; None for a model without attention."""
    lora_r: int | None = None
    """Rank of the LoRA adapters; None when the model's own parameters are trained."""
    model_changes: str | None = None
    """What `--layers` and `--set` changed, such as `num_hidden_layers=6`; None for the unchanged model."""


ALL_LINEAR = "all-linear"
"""Value of `target_modules` for every linear layer except the output layer."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA adapters, trained while the model's own parameters are frozen.

    Attributes:
        r: rank of the adapters.
        target_modules: names of the adapted modules, or `all-linear` alone; None for peft's default.
    """

    r: int
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One workload with one strategy, which is one row of a table."""

    workload: Workload
    strategy: str

    @property
    def key(self) -> str:
        """Identifier of the cell within a run and in file names."""
        w = self.workload
        return f"b{w.batch_size}-s{w.seq_len}-{re.sub('[^a-zA-Z0-9_.+#]', '-', self.strategy)}"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The state of the machine during a turn; None where the system does not report it.

    Attributes:
        steal_frac: share of the processors' time that the hypervisor gave to other virtual machines.
        others_frac: share of the processors' time that other processes used.
        throttled_frac: share of the time in which the control group's quota kept this process from running.
        frequency_mhz: mean frequency of the processors; of the card's multiprocessors on a GPU.
        temperature_c: of the card, in degrees Celsius.
        throttle_reasons: why the card lowers its clocks, in the driver's words.
        clock_step_s: seconds by which the system's clock was set meanwhile; negative where it was set back.
        suspended_s: seconds for which the machine was suspended.
    """

    steal_frac: float | None = None
    others_frac: float | None = None
    throttled_frac: float | None = None
    frequency_mhz: float | None = None
    temperature_c: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    clock_step_s: float | None = None
    suspended_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Consecutive timed steps of one cell, in a turn with the other cells of its workload.

    Attributes:
        number: of the turn, 0-based: cells with the same number took it one after the other.
        step_times_s: seconds of each step, in order.
        user_s, system_s: processor time of the process during these steps, in its own code and in the kernel; None on a
            GPU.
        page_faults: pages that the process got from the system during these steps; None where it is not reported.
        conditions: the state of the machine meanwhile.
    """

    number: int
    step_times_s: tuple[float, ...]
    user_s: float | None = None
    system_s: float | None = None
    page_faults: int | None = None
    conditions: Conditions = Conditions()


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """The measurements of one child process of a cell.

    Attributes:
        round: number of the process, 0-based.
        memory: memory peaks; None in processes that only measure time.
        step_times_s: seconds of each timed step, in order.
        turns: the same steps by turn; empty in reports from before cells took turns step by step.
        layers_run: number of layers that can be checkpointed and that the forward pass ran (a multimodal model has
            layers that training on text never calls).
        layers_planned: how many of them are in the plan's groups and get a gradient (below the lowest LoRA adapter
            none does).
        layers_recomputed: number of layers run a second time in the same step; None for compiled layers, whose runs
            cannot be counted.
        params_without_grad: number of trainable parameters whose gradient was None after the first backward pass.
        grad_checksum: exact checksum of all gradients of the first step; equal checksums mean bit-identical gradients.
            Empty on an emulated card, where gradients have no values.
        grad_rel_diff: L2 norm of the difference between these gradients and those of `off` in round 0, relative to the
            norm of the latter; 0.0 when the checksums are equal; None without a reference.
        grad_worst_param: the parameter that contributes most to that difference; None when there is none.
        num_alloc_retries: times the caching allocator had to flush its cache and retry; None on the CPU.
        num_steps: training steps run, including warm-up and memory steps.
        steps_s: seconds spent in these steps.
        wall_s: seconds from the start of the child process to its end.
        draws_other_dropout: whether layers are compiled and have dropout, which draws other masks than in `off`, so
            their gradients cannot be compared.
        draws_outside_torch: whether the forward pass of the first step draws from Python's or NumPy's generator.
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
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell has no complete measurement, and what to try next."""

    kind: FailureKind
    message: str
    detail: str = ""
    """The end of the child process's output, for a bug report."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a cell so far: its rounds, and the failure that stopped it, if any."""

    cell: Cell
    layers_checkpointed: int
    """Number of layers in the plan's groups, including those that the model turns out not to run."""
    rounds: tuple[RoundResult, ...] = ()
    failure: Failure | None = None
    repeat_rel_diffs: tuple[float, ...] = ()
    """For `off` only: `grad_rel_diff` of extra runs, made when a verdict depends on the noise of `off` and one round
    cannot show it."""
    prediction: Prediction | None = None
    """Replaces rounds in a report of predictions; comes with the failure `oom` when the cell does not fit."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about the model, read from the model built on the meta device.

    Attributes:
        num_params: number of distinct parameters, tied weights counted once, adapters included.
        num_layers: number of layers that can be checkpointed, in `modules()` order.
        max_seq_len: the model's maximum length in tokens; None without one.
        attn_implementation: the attention implementation that the model uses by default.
        checkpointing_refusal: why the model cannot checkpoint; None when it can.
        only_own: why no layers can be chosen, with a remedy, for a model that has only its own checkpointing.
        own_groups: the layers that its own checkpointing recomputes, grouped by joint recomputation; None when this was
            not or cannot be determined.
        num_trainable_params: number of parameters that are not frozen; None in reports from before LoRA was supported.
        layers_in_order: numbers of the layers that training runs, in execution order; None when these are all layers in
            `modules()` order, or when this was not determined.
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
    """The machine on which the figures were measured.

    Attributes:
        device: "cpu" or "cuda:N".
        device_name: product name of the processor or card.
        device_memory_bytes: memory of that device.
        versions: package or driver -> version.
        settings: other settings that affect figures: threads, allocator settings, TF32, environment variables.
    """

    device: str
    device_name: str
    device_memory_bytes: int | None
    platform: str
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def emulated(self) -> str | None:
        """The card that the device emulates; None for a device that computes."""
        return self.settings.get(EMULATED)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run: its cells, with everything needed to interpret and repeat them."""

    schema: int
    gcbench_version: str
    command: str
    created: str
    """ISO 8601, UTC."""
    settings: dict[str, Json]
    """The resolved settings, named like the TOML keys."""
    machine: Machine
    model: ModelFacts
    outcomes: tuple[Outcome, ...]
    notices: tuple[str, ...] = ()
    """Sentences on what the run decided for the user: defaults used, strategies left out."""
    source: Source = "measured"
    plan_files: dict[str, str] = field(default_factory=dict)
    """Strategy -> content of its plan file."""
    model_notices: tuple[str, ...] = ()
    """Sentences on how the model differs from its config, such as full weights instead of quantised ones."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell as a row of every table, CSV and JSON; the field order is the column order.

    Unknown values are None. New columns are added at the end.
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
    """Largest relative difference between the gradients of two `off` rounds; 0.0 when kernels are deterministic."""
    proof: str | None = None
    """`identical`, `within noise` or `no reference`; None where nothing was computed; or, with the saving withheld,
    `FAILED: why` or `not repeatable`,
    when two runs of `off` differ by more than roundoff explains."""
    lora_r: int | None = None
    """Rank of the LoRA adapters; None when all parameters are trained."""
    peak_op: str | None = None
    """The operator whose allocation reaches the peak. This column and those after it are for predictions only."""
    peak_layer: int | None = None
    attention_kernel: str | None = None
    """`flash`, `efficient`, `cudnn` or `math` on CUDA; several are joined by a plus sign."""
    device_memory_bytes: int | None = None
    spare_bytes: int | None = None
    """Headroom: device memory less the cell's; negative when the cell does not fit."""
    usable_bytes: int | None = None
    """The device's memory less the reserve."""
    fits: str | None = None
    """`yes`, `too close to tell`, `in the reserve` or `no`."""
    model_changes: str | None = None
    """What `--layers` and `--set` changed in the model's config."""
    accumulation_adds_bytes: int | None = None
    """Bytes that gradient accumulation adds to a predicted peak; None when below 0.5 % of it, or not predicted."""
    kept_outputs_add_bytes: int | None = None
    """The same for a training loop that retains the model's outputs in a variable."""
    model_notice: str | None = None
    """How the model differs from its config."""
    time_overhead_basis: str | None = None
    """What the overhead is a ratio of: `processor time` or `wall time`."""
    num_turns: int | None = None
    """Turns in which steps were timed."""
    num_turns_disturbed: int | None = None
    """How many of them were disturbed; `report.json` has the state of the machine beside each."""
    time_source: str | None = None
    """Where a predicted time comes from; the limits of its columns are a band then, not a 95 % interval."""
