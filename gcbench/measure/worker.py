"""Measures one cell in a child process: builds the model, applies the plan, runs the steps. Imports torch."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing.policy_contexts import RecomputeMismatch, SavedOutputMutated, SkippedButNeeded
from gcbench.checkpointing.random_draws import has_dropout
from gcbench.checkpointing.segments import LayersNotSequential
from gcbench.core import snapshot_files
from gcbench.core.errors import first_sentence
from gcbench.core.gradient_fingerprint import Fingerprint
from gcbench.core.records import Failure, MemoryPeaks, Phase, RoundResult, Turn
from gcbench.core.units import format_bytes
from gcbench.devices import backends
from gcbench.devices.backends import Device
from gcbench.devices.target import CPU
from gcbench.diagnoses.failures import NEEDS_TRITON, crash, lacks_triton, with_doubt
from gcbench.emulate.environment import card_behind
from gcbench.measure import take_fingerprint
from gcbench.measure.task import MAX_TIMED_STEPS, MeasureTask, Ready, TakeTurn, TurnTaken
from gcbench.models import build as models
from gcbench.processes.messages import Answer, Event, Line
from gcbench.training.seeding import state_outside_torch
from gcbench.training.step import TrainingStep, parameter_dtype, random_batch

_MAX_SKIPPED_STEPS = 24
"""An fp16 scaler starts at 2**16 and halves at each overflow, so its scale fits long before."""
_UNSUPPORTED = ("not implemented for", "not supported", "does not support", "unsupported", "Could not run")


class LimitExceeded(Exception):
    """The exact peak is above the memory of the emulated device."""


def measure(task: MeasureTask, send: Line) -> Answer:
    """Measure one cell; an exception becomes the answer's failure."""
    measurement: _Measurement | None = None
    device: Device | None = None
    try:
        device = backends.open_device(task.cell.workload.device)
        measurement = _Measurement(task, device, send)
        return measurement.run()
    except BaseException as err:
        if measurement is not None:
            with suppress(Exception):  # the failure matters more
                measurement.write_snapshot()
        where = measurement.where if measurement is not None else "while the model was being built"
        return Answer(failure=_failure(err, task=task, device=device, where=where))


class _Measurement:
    """The steps of one process, in order."""

    def __init__(self, task: MeasureTask, device: Device, send: Line) -> None:
        self.task = task
        self.device = device
        self.send = send
        self.where = "while the model was being built"
        self.fingerprint: Fingerprint | None = None
        self.layers_run = checkpointing.LayersRun()
        self.num_recomputed: int | None = None
        self.draws_outside_torch = False
        self.steps_s = 0.0
        self.is_emulated = card_behind(device.name) is not None
        self._is_recorded = False

    def run(self) -> Answer:
        task, workload = self.task, self.task.cell.workload
        self.device.keep_memory()
        self.device.limit_memory(task.memory_limit_bytes)
        self._record()
        config = models.build_config(task.source, layers=task.layers, overrides=task.overrides)
        self.model = models.build(
            task.source,
            config,
            device=workload.device,
            dtype=parameter_dtype(workload.precision),
            attn_implementation=task.attn_implementation,
            seed=task.seed,
            lora=task.lora,
        )
        self.counter = checkpointing.apply(self.model, task.plan)
        batch = random_batch(self.model, batch_size=workload.batch_size, seq_len=workload.seq_len, seed=task.seed)
        self.step = TrainingStep(
            self.model, batch=batch, precision=workload.precision, optim=workload.optim, seed=task.seed
        )
        memory = None
        if task.with_memory:
            memory = self._warm_up_and_probe()
        else:
            self._warm_up()
        if self.is_emulated:  # no step is timed, and the memory outside the allocator is an estimate: left unknown
            return Answer(result=self._result(memory))
        assert self.fingerprint is not None
        self.device.start_timing()  # without settling: the first step would include requests for device memory
        if task.turn is None:
            return self._take_turns(memory)
        turn = self._turn(task.turn)
        memory = None if memory is None else replace(memory, process_bytes=self.device.process_bytes())
        result = replace(self._result(memory), step_times_s=turn.step_times_s, turns=(turn,))
        return Answer(result=result, fingerprint=self.fingerprint)

    def _result(self, memory: MemoryPeaks | None) -> RoundResult:
        """What was measured so far, without the timed steps."""
        assert self.fingerprint is not None
        return RoundResult(
            round=self.task.round,
            memory=memory,
            step_times_s=(),
            layers_run=len(self.layers_run.forward),
            layers_planned=self._layers_planned(),
            layers_recomputed=self.num_recomputed,
            params_without_grad=len(self.fingerprint.missing),
            grad_checksum="" if self.is_emulated else self.fingerprint.checksum,
            grad_rel_diff=None,
            grad_worst_param=None,
            num_alloc_retries=self.device.num_alloc_retries(),
            num_steps=self.step.num_steps,
            steps_s=self.steps_s,
            wall_s=0.0,
            draws_outside_torch=self.draws_outside_torch,
            draws_other_dropout=self.task.plan.compiled and not self.is_emulated and has_dropout(self.model),
        )

    def _take_turns(self, memory: MemoryPeaks | None) -> Answer:
        """Wait for turns and take them, until the parent ends this process or says something else."""
        assert self.fingerprint is not None
        # On a card now or never: later, processes that started after this one are part of what can be read.
        memory = None if memory is None else replace(memory, process_bytes=self.device.process_bytes())
        word = self.send.pause(
            Ready(
                result=self._result(memory),
                fingerprint=self.fingerprint,
                held_bytes=self.device.held_bytes(),
                free_bytes=self.device.free_bytes(),
            )
        )
        while isinstance(word, TakeTurn):
            turn = self._turn(word.number)
            word = self.send.pause(
                TurnTaken(
                    turn=turn,
                    process_bytes=self.device.process_bytes() if self.device.name == CPU else None,
                    num_alloc_retries=self.device.num_alloc_retries(),
                    num_steps=self.step.num_steps,
                    steps_s=self.steps_s,
                )
            )
        return Answer(result=self._result(memory), fingerprint=self.fingerprint)

    def _layers_planned(self) -> int:
        """The number of layers that should be recomputed; a model's own checkpointing decides which, if any."""
        plan = self.task.plan
        if plan.own and self.num_recomputed:
            return self.num_recomputed
        return len(self.layers_run.backward & {layer for group in plan.groups for layer in group})

    def _warm_up(self) -> None:
        """Run steps until the optimizer has its state; fingerprint the gradients of the first finite one."""
        while self.step.num_steps < self.task.warmup or not self.step.has_optimizer_state:
            self._one("warm-up", self._fingerprint)
            if self.step.num_steps > self.task.warmup + _MAX_SKIPPED_STEPS:
                raise FloatingPointError("every step overflowed and was skipped by the gradient scaler")

    def _fingerprint(self, phase: Phase) -> None:
        self._note(phase)
        if self.step.num_steps == 0 and phase == "forward":
            self._state_at_start = state_outside_torch()
        if self.step.num_steps == 0 and phase == "backward":
            self.draws_outside_torch = state_outside_torch() != self._state_at_start
        if phase == "optimizer" and (self.fingerprint is None or not self.fingerprint.is_finite):
            take = take_fingerprint.names if self.is_emulated else take_fingerprint.take
            self.fingerprint = take(self.model, step=self.step.num_steps, seed=self.task.seed)

    def _warm_up_and_probe(self) -> MemoryPeaks:
        """Warm up, with the memory probe on from the last warm-up step, and read the peaks of the step after it."""
        while self.step.num_steps < self.task.warmup - 1:
            self._one("warm-up", self._fingerprint)
        with self.device.probe_memory() as probe:

            def on_phase(phase: Phase) -> None:
                self._note(phase)
                probe.on_phase(phase)

            self._warm_up()
            self.device.settle()
            self._record()
            self._one("memory", on_phase)
        self.write_snapshot()
        peaks = probe.peaks()
        limit = self.task.memory_limit_bytes
        if limit is not None and peaks.allocated_bytes > limit:
            self.where = f"in the {peaks.peak_phase} phase"
            raise LimitExceeded(
                f"the step needs {format_bytes(peaks.allocated_bytes)} and the limit is {format_bytes(limit)}"
            )
        return peaks

    def _record(self) -> None:
        """Record allocations for a snapshot, if there is to be one: from the model on, then anew in the memory step."""
        if self.task.snapshot is not None:
            self.device.record_memory()
            self._is_recorded = True

    def write_snapshot(self) -> None:
        """Write the snapshot of what is recorded, once; raises UsageError if the file cannot be written."""
        if self.task.snapshot is None or not self._is_recorded:
            return
        self._is_recorded = False
        try:
            self.device.write_memory_snapshot(Path(self.task.snapshot))
        except OSError as err:
            raise snapshot_files.unwritable(Path(self.task.snapshot), err) from None

    def _turn(self, number: int) -> Turn:
        """Run the timed steps of a turn."""
        times: list[float] = []
        self.device.begin_turn()
        while len(times) < self.task.steps or (sum(times) < self.task.least_timed_s and len(times) < MAX_TIMED_STEPS):
            times.append(self._one("timed", self._note))
        observed = self.device.end_turn()
        return Turn(number=number, step_times_s=tuple(times), **vars(observed))

    def _note(self, phase: Phase) -> None:
        self.where = f"in the {phase} phase"

    def _one(self, kind: str, on_phase: Callable[[Phase], None]) -> float:
        self.counter.reset()
        is_first = self.step.num_steps == 0
        seconds: float | None = None
        start = time.perf_counter()
        with checkpointing.layers_run(self.model) if is_first else nullcontext(self.layers_run) as self.layers_run:
            if self.is_emulated:
                self.step(on_phase)
            else:
                seconds = self.device.time(lambda: self.step(on_phase))
        if is_first and not self.counter.is_blind:  # other steps may drop other layers
            self.num_recomputed = len(self.counter.layers)
        self.steps_s += time.perf_counter() - start
        self.send(Event(kind=kind, step=self.step.num_steps, seconds=seconds))
        return seconds or 0.0


def _failure(err: BaseException, *, task: MeasureTask, device: Device | None, where: str) -> Failure:
    """Classify an exception of a measurement as out of memory, unsupported or crash, with a remedy."""
    text = str(err).strip() or type(err).__name__
    first_line = text.splitlines()[0][:300].rstrip(".")
    if isinstance(err, LimitExceeded) or (device is not None and device.is_out_of_memory(err)):
        why = f" ({text})" if isinstance(err, LimitExceeded) else ""
        remedies = "a smaller --batch or --seq-len" + ("" if task.plan.groups else ", a checkpointing strategy")
        return Failure(
            kind="oom", message=f"memory ran out {where}{why}; try {remedies} or a smaller precision", detail=text
        )
    if isinstance(err, LayersNotSequential):
        return Failure(kind="unsupported", message=f"{first_sentence(err)}; take per-layer, every:K or first:N")
    if isinstance(err, (RecomputeMismatch, SkippedButNeeded)):
        return Failure(kind="unsupported", message=first_sentence(err))
    if isinstance(err, SavedOutputMutated):
        return Failure(kind="unsupported", message=f"{first_sentence(err)}; name the other operators after selective:")
    if isinstance(err, NotImplementedError) or (
        isinstance(err, (RuntimeError, ValueError, ImportError)) and any(mark in text for mark in _UNSUPPORTED)
    ):
        return Failure(
            kind="unsupported",
            message=f"not supported here: {first_line}; try another --precision, --attn-implementation or --device",
            detail=traceback.format_exc(),
        )
    if lacks_triton(err):
        return Failure(kind="unsupported", message=NEEDS_TRITON, detail=text)
    failure = crash(err, task.cell.strategy, lora=task.lora is not None)
    if device is None or card_behind(device.name) is None:
        return failure
    return replace(failure, message=with_doubt(failure.message, err))
