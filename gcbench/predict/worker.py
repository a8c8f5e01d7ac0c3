"""Predicts cells in a child process: builds the model once and reports every cell as soon as it is predicted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from gcbench.calibration.figures import figures_of_target
from gcbench.calibration.op_times import Calibration
from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import own_checkpointing
from gcbench.core import snapshot_files
from gcbench.core.errors import GcbenchError, UsageError, first_sentence
from gcbench.core.files import write_bytes
from gcbench.core.prediction import Fallback, Lever, Prediction
from gcbench.core.records import Failure
from gcbench.core.step_time import StepTime
from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.models import build as models
from gcbench.models import flash_attention
from gcbench.predict.task import CellToPredict, Predicted, PredictTask
from gcbench.processes.messages import Answer, Refusal
from gcbench.report.predictions import NEGLIGIBLE_FRAC
from gcbench.simulate import memory_snapshot, timeline
from gcbench.simulate.additions import additions
from gcbench.simulate.allocator.caching_allocator import OutOfMemory
from gcbench.simulate.compose.whole_step import Assembly
from gcbench.simulate.device_model import DeviceModel, device_model_for
from gcbench.simulate.explain import curve, explain, fallback_bytes, without_logits
from gcbench.simulate.predictor import Predictor, Step
from gcbench.simulate.timeline import ModelBlocks, Peak, Timeline
from gcbench.simulate.trace.building import Building, BuildRecorder
from gcbench.strategies import Plan
from gcbench.training.step import parameter_dtype

CHUNKS = 8
"""Chunks of the logits in the lever of a chunked loss."""
_FUSED = "adamw_torch_fused"
_NOT_CALIBRATED = (
    "this machine's operators were not timed for this model; gcbench plan with the same settings times them and keeps "
    "the times"
)
_MOST_UNMEASURED_FRAC = 0.1
"""Share of a step's time that may be extrapolated from calls of other sizes."""
_NO_RATES = (
    "the rates of this card are not known; name a card with --device (gcbench devices lists them), or give its rates "
    "in a --device-file"
)
_NO_KERNEL = "the step was traced with PyTorch code in place of fused kernels ({packages}), whose times are not known"
_OFFLOADED = "copies to host memory and back are not modelled; gcbench run measures them"


def predict(task: PredictTask, tell: Callable[[Predicted], None]) -> Answer:
    """Predict every cell of the task and report each with `tell`."""
    try:
        session = Session(task)
    except GcbenchError as err:
        return Answer(refusal=Refusal(error=type(err).__name__, message=str(err)))
    for cell in task.cells:
        try:
            tell(Predicted(number=cell.number, prediction=session.predict(cell)))
        except UsageError as err:  # a snapshot that cannot be written
            return Answer(refusal=Refusal(error="UsageError", message=str(err)))
        except Exception as err:  # modelling code may raise anything
            tell(Predicted(number=cell.number, failure=failure(err, task.target)))
    return Answer()


class Session:
    """Predicts the cells of one task: one model on one target."""

    def __init__(self, task: PredictTask) -> None:
        self.task = task
        self.target: Target = task.target
        self.device_model: DeviceModel = device_model_for(task.target)
        self.building: Building
        self.predictor = self._predictor(task.optim)
        self._fused: Predictor | None = None
        self.figures = figures_of_target(task.target, task.here)

    @classmethod
    def on(cls, other: Session, target: Target) -> Session:
        """Return a session with the same steps, replayed on a target that differs in its allocator alone."""
        session = copy(other)
        session.target = target
        return session

    def _predictor(self, optim: str) -> Predictor:
        task = self.task
        config = models.build_config(task.source, layers=task.layers, overrides=task.overrides)
        attention = flash_attention.traced_as(task.attn_implementation, task.target)
        if attention == flash_attention.STAND_IN:
            from gcbench.simulate.cuda import flash_stand_in

            flash_stand_in.register()
        recorder = BuildRecorder()
        with ExitStack() as stack:
            if self.target.kind != "cpu":  # whose allocator does not care where blocks lie
                stack.enter_context(recorder)
                stack.enter_context(models.initialising_on_meta())
            model = models.build_meta(
                config,
                lora=task.lora,
                without_adapters=recorder.move if task.pretrained else None,
                dtype=parameter_dtype(task.precision),
                trust_remote_code=task.source.trust_remote_code,
                **({} if attention is None else {"attn_implementation": attention}),
            )
        self.building = recorder.building_of(model)
        return Predictor(
            model,
            precision=task.precision,
            optim=optim,
            trace_mode=self.device_model.trace_mode,
            resident=self.device_model.resident,
            steps_on_device=self.target.kind == "cpu" or optim == _FUSED,
            exact=task.exact,
        )

    def predict(self, cell: CellToPredict) -> Prediction:
        """Predict one cell; raises what the model's code raises on fake tensors."""
        attention = self.device_model.attention
        if attention is not None:
            attention.chosen.clear()
        step = self._step(self.predictor, cell.plan, cell)
        kernels = {} if attention is None else dict(attention.chosen)
        peak = self.peak(step.timeline)
        needed = self.counts(peak)
        limit = self.target.memory_bytes
        if cell.snapshot is not None:
            self._write_snapshot(Path(cell.snapshot), step)
        levers = self._levers(step, peak, cell) if self.task.explain else []
        time, why_no_time = self.time(step, cell.plan)
        return Prediction(
            memory=peak.memory,
            limit_bytes=limit,
            spare_bytes=None if limit is None else limit - needed,
            num_alloc_retries=None if self.target.kind == "cpu" else peak.num_alloc_retries,
            terms=self.device_model.terms,
            attention=kernels,
            layers_traced=step.layers_traced,
            why_in_full=step.why_in_full,
            explanation=explain(step.assembly, peak, levers),
            curve=curve(step.assembly),
            additions=additions(step, self.weighed, peak),
            fallback=self.fallback(step, peak),
            time=time,
            why_no_time=why_no_time,
        )

    def time(self, step: Step, plan: Plan) -> tuple[StepTime | None, str | None]:
        """Return the time of a step; or None, and why."""
        if self.figures is None:
            return None, _NOT_CALIBRATED if self.target.kind == "cpu" else _NO_RATES
        if self.fallback_packages:
            return None, _NO_KERNEL.format(packages=", ".join(self.fallback_packages))
        if plan.any_policy("offload"):
            return None, _OFFLOADED
        here = self.figures if isinstance(self.figures, Calibration) else None
        if here is not None and here.unmeasured_frac(step.calls) > _MOST_UNMEASURED_FRAC:
            return None, _NOT_CALIBRATED
        found = step.time(self.figures)
        return StepTime(
            seconds=found.seconds,
            basis="card" if here is None or here.is_of_gpu else "this machine",
            source=self.figures.source,
            waiting_frac=found.waiting_frac,
        ), None

    @staticmethod
    def _step(predictor: Predictor, plan: Plan, cell: CellToPredict) -> Step:
        return predictor.step(plan, batch_size=cell.batch_size, seq_len=cell.seq_len)

    def fallback(self, step: Step, peak: Peak) -> Fallback | None:
        """Return what PyTorch code allocated at the peak where the target, with packages, would run fused kernels."""
        packages = self.fallback_packages
        return Fallback(packages=packages, nbytes=fallback_bytes(step.assembly, peak)) if packages else None

    @property
    def fallback_packages(self) -> tuple[str, ...]:
        """The packages with fused kernels for the target in place of which PyTorch code was traced."""
        return () if self.target.kind == "cpu" else tuple(sorted(self.predictor.fake_model.fallbacks))

    def counts(self, peak: Peak) -> int:
        """Return the bytes that count against the device's memory: of the process on CUDA, of tensors on a CPU."""
        return (peak.memory.process_bytes or 0) if self.target.kind == "cuda" else peak.memory.allocated_bytes

    def weighed(self, line: Timeline) -> tuple[int, Peak]:
        """Return (bytes that count against the device's memory, peak) of a step."""
        peak = self.peak(line)
        return self.counts(peak), peak

    def peak(self, line: Timeline) -> Peak:
        """Replay a step through the target's allocator, within its memory if it fits."""
        if self.target.kind == "cpu":
            return timeline.exact(line)
        expandable = self.target.expandable_segments
        outside, limit = self.device_model.outside_bytes, self.target.memory_bytes
        model_blocks = self._model_blocks(line)
        peak = timeline.cached(line, expandable_segments=expandable, model_blocks=model_blocks)
        short = limit is not None and (peak.memory.reserved_bytes or 0) + outside > limit
        if limit is not None and short and peak.memory.allocated_bytes + outside <= limit:
            with suppress(OutOfMemory):
                # Short of memory, the allocator frees its cache and tries again.
                peak = timeline.cached(
                    line,
                    limit_bytes=limit - outside,
                    device_bytes=limit,
                    expandable_segments=expandable,
                    model_blocks=model_blocks,
                )
        process = (peak.memory.reserved_bytes or 0) + outside
        return replace(peak, memory=replace(peak.memory, process_bytes=process))

    def _model_blocks(self, line: Timeline) -> ModelBlocks:
        """How the model's tensors are allocated: as while it is built."""
        first = line.events[: len(self.building.model)]
        if self.building.begins(line.nbytes[first].tolist()):
            return self.building.replay_and_settle if self.target.settled_when_built else self.building.replay
        return lambda allocator: ()

    def _write_snapshot(self, file: Path, step: Step) -> None:
        """Write the step as a memory snapshot; raises UsageError if the file cannot be written."""
        memory = self.target.memory_bytes
        content = memory_snapshot.snapshot(
            step.assembly,
            limit_bytes=None if memory is None else memory - self.device_model.outside_bytes,
            device_bytes=memory,
            expandable_segments=self.target.expandable_segments,
            model_blocks=self._model_blocks(step.timeline),
        )
        try:
            write_bytes(file, content)
        except OSError as err:
            raise snapshot_files.unwritable(file, err) from None

    def _levers(self, step: Step, peak: Peak, cell: CellToPredict) -> list[Lever]:
        """Replay the step with each change that may reduce the peak; negligible gains are left out."""
        tried = [
            (f"a loss computed in {CHUNKS} chunks", self._with_chunked_loss(step.assembly)),
            ("checkpointing every layer", self._with_every_layer(cell)),
        ]
        if self.task.optim == "adamw_torch":
            tried.append(("the fused optimizer", self._with_fused_optimizer(cell)))
        now = peak.memory.allocated_bytes
        return [
            Lever(name=name, peak_bytes=peak_bytes)
            for name, peak_bytes in tried
            if peak_bytes is not None and (now - peak_bytes > NEGLIGIBLE_FRAC * now or name.startswith("checkpointing"))
        ]

    def _with_chunked_loss(self, assembly: Assembly) -> int | None:
        sizes = without_logits(assembly, CHUNKS)
        if (sizes == assembly.timeline.nbytes).all():
            return None
        return self.peak(replace(assembly.timeline, nbytes=sizes)).memory.allocated_bytes

    def _with_every_layer(self, cell: CellToPredict) -> int | None:
        layers = cell.plan.num_layers
        model = self.predictor.fake_model.model
        if checkpointing.refusal(model) is not None:
            return None
        groups = tuple((layer,) for layer in range(layers))
        every = Plan(num_layers=layers, groups=groups, own=own_checkpointing.is_all(model))
        if not layers or cell.plan == every or (every.own and cell.plan.own):
            return None
        return self.peak(self._step(self.predictor, every, cell).timeline).memory.allocated_bytes

    def _with_fused_optimizer(self, cell: CellToPredict) -> int:
        if self._fused is None:
            self._fused = self._predictor(_FUSED)
        return self.peak(self._step(self._fused, cell.plan, cell).timeline).memory.allocated_bytes


def failure(err: BaseException, target: Target) -> Failure:
    """Return the reason why a cell has no prediction, and what settles it."""
    remedy = "measure it with gcbench run"
    card = None if target.card is None else cards.known(target.card.name)
    if card is not None and target.capability is not None:
        remedy += f", or without the card: gcbench run --emulate {card.name} …"
    reason = first_sentence(err)
    if isinstance(err, (DataDependentOutputException, DynamicOutputShapeException)):
        return Failure(
            kind="unsupported",
            message=f"its code reads values of tensors, and fake tensors have none; {remedy}",
            detail=reason,
        )
    return Failure(
        kind="unsupported",
        message=f"its training step cannot be traced on fake tensors ({type(err).__name__}: {reason}); {remedy}",
        detail=str(err),
    )
