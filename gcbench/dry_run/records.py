"""The records of a dry run: what the observer saw in the script's process, and how it is judged. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gcbench.devices.cards import Card

Ending = Literal["fits", "does not fit", "script failed", "not emulated", "unobserved", "interrupted"]
"""How a dry run ended; `not emulated` names something that the emulated card cannot serve."""
PHASES = ("start", "forward", "backward", "optimizer", "evaluation", "save")
OF_A_STEP = ("forward", "backward", "optimizer")
SCHEMA = 1
"""Version of the observer's files, and of the document of `--json`."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of code, with its text; `function` is qualified (`LlamaMLP.forward`)."""

    file: str
    line: int
    function: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """A group of what was allocated when memory ran out.

    Attributes:
        kind: parameters, gradients, optimizer states, buffers; `by line` for what a line of code allocated; `optimizer`
            for temporary tensors of its step; `backward` for what the backward pass did; `rest` for further lines.
        count: number of blocks.
    """

    kind: str
    bytes: int
    count: int
    file: str | None = None
    line: int | None = None
    function: str | None = None


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """A failed allocation.

    Attributes:
        number: counted from 1.
        limit: bytes that the process may use on the card; `free` of them were not reserved.
        done_steps: finished steps before it.
        place: the script's own line; `library_place` that of the library that it had called.
        alive: empty where it was not looked at.
    """

    number: int
    device: int
    requested: int
    limit: int
    free: int
    allocated: int
    reserved: int
    phase: str
    done_steps: int
    place: Place | None
    library_place: Place | None
    alive: tuple[Allocated, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step.

    Attributes:
        peaks: phase -> peak allocated and reserved bytes.
        backwards: backward passes, one per micro-batch.
        checkpointed, recomputed: checkpointed calls, and those of them that really ran again.
        layers_checkpointed, layers_recomputed: the same for modules, each counted once.
    """

    number: int
    peaks: dict[str, Any]
    backwards: int
    checkpointed: int
    recomputed: int
    layers_checkpointed: int
    layers_recomputed: int

    @property
    def peak_allocated_bytes(self) -> int:
        """The highest of all phases."""
        return max((peak[0] for peak in self.peaks.values()), default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """The highest of all phases."""
        return max((peak[1] for peak in self.peaks.values()), default=0)

    @property
    def peak_phase(self) -> str | None:
        """The phase that allocates the most."""
        return max(self.peaks, key=lambda phase: self.peaks[phase][0], default=None)


@dataclass(frozen=True, kw_only=True)
class Read:
    """A place that read values of the card.

    Attributes:
        kind: `item`, `bool`, … for a value, `nonzero`, `unique`, `mask`, … for a size that depends on values.
        answer: what was read, as text; nothing was computed.
        library: the installed package that the line is in; None for the user's own code.
        condition: `while`, `if` or `assert` where it decides one.
    """

    file: str
    line: int
    kind: str
    answer: str
    count: int
    library: str | None
    condition: str | None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the script trains; None where it was not seen.

    Attributes:
        config: file with the model's config, for `gcbench plan`.
        batch_size, seq_len: the largest of the training forward passes.
        num_layers: layers that transformers can checkpoint.
        on_card: whether parameters of the model are on the card.
    """

    batch_size: int | None = None
    seq_len: int | None = None
    model_class: str | None = None
    num_params: int | None = None
    num_trainable: int | None = None
    dtype: str | None = None
    autocast: str | None = None
    on_card: bool | None = None
    num_layers: int | None = None
    model_type: str | None = None
    attn_implementation: str | None = None
    quantized: bool | None = None
    causal_lm: bool | None = None
    config: str | None = None
    optimizer: str | None = None
    optimizer_module: str | None = None
    fused: bool | None = None
    peft_type: str | None = None
    lora_r: int | None = None
    lora_target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One error of a chain."""

    type: str
    message: str


@dataclass(frozen=True, kw_only=True)
class ScriptError:
    """The exception that ended the script.

    Attributes:
        chain: the error, its cause, and so on.
        libraries: installed packages that its traceback went through, the innermost first.
        files: files of its traceback, the innermost first.
    """

    type: str
    message: str
    chain: tuple[Cause, ...]
    is_out_of_memory: bool
    is_interrupt: bool
    place: Place | None
    libraries: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """Why the observer ended the script: after `steps`, or in an `endless` loop at a line."""

    why: Literal["steps", "endless"]
    file: str | None
    line: int | None


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the observer saw of one process.

    Attributes:
        first: the first step; `later` the one of the others with the highest peak.
        later_peaks: the peaks of all steps but the first.
        unfinished: the step that was running at the end.
        listed: peak allocated and reserved bytes of each step, as far as they are listed.
        outside: phase outside steps -> peak allocated and reserved bytes.
        by_card: number of the card -> peak allocated and reserved bytes.
        refused: functions of NVIDIA's libraries that were called and that the emulated card refuses.
        context_bytes: what the process takes on the card outside PyTorch's allocator: the emulated card's estimate.
    """

    schema: int
    pid: int
    argv: tuple[str, ...]
    torch: str | None
    devices: tuple[str, ...]
    context_bytes: int | None
    num_steps: int
    first: Step | None
    later: Step | None
    later_peaks: dict[str, Any]
    unfinished: Step | None
    listed: tuple[tuple[int, int], ...]
    outside: dict[str, Any]
    by_card: dict[str, Any]
    evaluations: int
    out_of_memory: tuple[OutOfMemory, ...]
    num_out_of_memory: int
    saved_files: tuple[str, ...]
    reads: tuple[Read, ...]
    workload: Workload
    stopped: Stopped | None
    failure: ScriptError | None
    snapshot: str | None
    snapshot_failed: str | None
    checkpoint_reentrant: bool | None
    refused: tuple[str, ...] = ()

    @property
    def peak_allocated_bytes(self) -> int:
        """The highest of the whole script, on one card."""
        return max((peak[0] for peak in self.by_card.values()), default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """The highest of the whole script, on one card."""
        return max((peak[1] for peak in self.by_card.values()), default=0)

    @property
    def process_bytes(self) -> int | None:
        """An estimate of what nvidia-smi would show at most; None where the card's context is unknown."""
        return None if self.context_bytes is None else self.peak_reserved_bytes + self.context_bytes

    @property
    def busiest(self) -> Step | None:
        """The step with the highest peak, for what checkpointing did in it."""
        steps = [step for step in (self.first, self.later, self.unfinished) if step is not None]
        return max(steps, key=lambda step: step.peak_allocated_bytes, default=None)


@dataclass(frozen=True, kw_only=True)
class WouldFit:
    """What `gcbench plan` says about the same training.

    Attributes:
        sentence: why there is no plan, or that nothing fits; None where there is one.
        command: the command that plans it again.
        strategy: what it chose, in words.
        source: how its memory is known: `predicted` or `estimated`.
        same_batch_strategy: the fastest that fits with the script's own batch, where the choice has a smaller one; None
            where nothing does.
    """

    sentence: str | None = None
    command: str | None = None
    strategy: str | None = None
    batch_size: int | None = None
    peak_bytes: int | None = None
    allocated_bytes: int | None = None
    source: str | None = None
    same_batch_strategy: str | None = None
    same_batch_peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PredictedTime:
    """What `gcbench predict` says about the time of a step of one micro-batch.

    Attributes:
        why_not: why it says nothing; None where it does.
        strategy: the checkpointing that was seen.
        low_s, high_s: the band around `seconds`.
        source: where the times of operators come from, in words.
    """

    why_not: str | None = None
    strategy: str | None = None
    seconds: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    tokens_per_s: float | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the dry run ended, in a sentence, with the exit code of `gcbench dry-run`."""

    ending: Ending
    sentence: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """One dry run.

    Attributes:
        command: the user's command; `invocation` the whole line.
        card: the emulated card, with `memory_bytes` as limited.
        observed: None where the observer never reported.
        script_exit_code: negative for a signal.
        time: None where the script does not fit, or trained nothing.
    """

    invocation: str
    command: tuple[str, ...]
    created: str
    card: Card
    num_cards: int
    observed: Observed | None
    script_exit_code: int
    verdict: Verdict
    would_fit: WouldFit | None = None
    time: PredictedTime | None = None
