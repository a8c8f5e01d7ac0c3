"""What a child process does to check combinations: small real steps, each against those of `off`. Imports torch."""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch._inductor import config as inductor_config
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from gcbench import checkpointing, devices, models, resolve, strategies
from gcbench.checks import (
    FAILED,
    FROZEN_BASE,
    IDENTICAL,
    LORA,
    OWN,
    UNSUPPORTED,
    WITHIN_NOISE,
    WRONG,
    Checked,
    Combination,
    Setting,
    Verdict,
)
from gcbench.diagnoses import Observation, diagnose
from gcbench.errors import GcbenchError, UnavailableError, first_sentence
from gcbench.records import Lora, ModelFacts, Phase
from gcbench.scaledown import scaled_down
from gcbench.tables import tolerance
from gcbench.tasks import Answer, CheckTask, ReferenceRun, Refusal
from gcbench.training import TrainingStep, input_embeddings, parameter_dtype, random_batch

NUM_STEPS = 2
"""The second shows what the first step's update made of it."""
_LAYERS, _LORA_R = 4, 4
_TOLERATED_NOISE = 2
_MAX_SKIPPED_STEPS = 24
"""An fp16 scaler starts at 2**16 and halves at each overflow."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step, on the CPU.

    Attributes:
        by_name: parameter -> its gradient.
        missing: trained parameters without one.
    """

    by_name: dict[str, torch.Tensor]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Gradients:
        """Copies of what the model's parameters hold."""
        trained = [(name, param.grad) for name, param in model.named_parameters() if param.requires_grad]
        return cls(
            {name: grad.to("cpu", copy=True) for name, grad in trained if grad is not None},
            tuple(name for name, grad in trained if grad is None),
        )

    @property
    def is_finite(self) -> bool:
        return all(bool(grad.isfinite().all()) for grad in self.by_name.values())

    def difference(self, reference: Gradients) -> tuple[float, str | None]:
        """The L2 norm of the difference over that of `reference`, and the parameter with the largest part in it.

        0 is for gradients that are equal bit by bit; infinite where other parameters have one.
        """
        if self.by_name.keys() != reference.by_name.keys():
            return math.inf, min(self.by_name.keys() ^ reference.by_name.keys())
        squared = {
            name: float((grad.double() - reference.by_name[name].double()).square().sum())
            for name, grad in self.by_name.items()
            if not torch.equal(grad, reference.by_name[name])
        }
        if not squared:
            return 0.0, None
        norm = sum(float(grad.double().square().sum()) for grad in reference.by_name.values())
        return math.sqrt(sum(squared.values()) / norm) if norm else math.inf, max(squared, key=squared.__getitem__)


@dataclass
class _Seen:
    """What two steps showed."""

    gradients: list[Gradients] = field(default_factory=list)
    recomputed: int | None = None
    ran: checkpointing.LayersRun = field(default_factory=checkpointing.LayersRun)
    warnings: list[str] = field(default_factory=list)
    steps_s: float = 0.0


@dataclass
class _Reference:
    """`off` in one setting, and how far two runs of it are apart."""

    model: torch.nn.Module
    seen: _Seen
    noise: float


def check(task: CheckTask, tell: Callable[[Checked | ReferenceRun], None]) -> Answer:
    """Try every combination of the task and tell each as it is done, and each reference."""
    try:
        checker = _Checker(task)
    except GcbenchError as err:
        return Answer(refusal=Refusal(error=type(err).__name__, message=str(err)))
    for number, combination in task.combinations:
        tell(replace(checker.check(combination, tell), number=number))
    return Answer(facts=checker.facts)


class _Checker:
    """The combinations of one model; what several of them need is made once."""

    def __init__(self, task: CheckTask) -> None:
        self.task = task
        self.name = devices.choose(task.device)
        self.source = task.source
        if not task.full_size:
            torch.set_num_threads(1)  # a small step gains nothing from more, and threads that wait for each other crawl
            self.source = replace(task.source, config=scaled_down(task.source.config, layers=_LAYERS))
        self.config = models.build_config(self.source, layers=task.layers, overrides=task.overrides)
        try:
            self.facts: ModelFacts = models.facts(self.source, self.config, None, changed=bool(task.overrides))
        except UnavailableError as err:
            if task.full_size:
                raise
            raise UnavailableError(f"scaled down, {err}, or add --full-size to check the model as it is") from None
        self._references: dict[Setting, _Reference | Exception] = {}

    def check(self, asked: Combination, tell: Callable[[ReferenceRun], None]) -> Checked:
        """One combination; what it raises is its result."""
        if self.facts.checkpointing_refusal is not None:
            return Checked(number=0, verdict=UNSUPPORTED, message=self.facts.checkpointing_refusal)
        reference = self._reference(asked.setting, tell)
        if isinstance(reference, Exception):
            return self._without_reference(asked, reference)
        try:
            plan = self._plan(asked.strategy, reference)
        except ValueError as err:
            return Checked(number=0, verdict=UNSUPPORTED, message=str(err))
        why = resolve.not_for(plan, self.facts) or resolve.unsupported(plan, self.name.partition(":")[0])
        if why is not None:
            return Checked(number=0, verdict=UNSUPPORTED, message=why)
        seen = _Seen()
        try:
            self._steps(reference.model, plan, asked.setting, seen)
        except Exception as err:  # anything that a model, torch or a compiler may raise
            return self._failed(asked, seen, err)
        return self._judged(asked, plan, seen, reference)

    def _plan(self, spec: str, reference: _Reference) -> strategies.Plan:
        order = tuple(reference.seen.ran.order)
        natural = order == tuple(range(self.facts.num_layers))
        facts = replace(self.facts, layers_in_order=None if natural else order)
        return resolve.plan_of(strategies.parse(spec), facts)

    def _reference(self, setting: Setting, tell: Callable[[ReferenceRun], None]) -> _Reference | Exception:
        if setting not in self._references:
            try:
                model = self._model(setting)
                first, second = _Seen(), _Seen()
                self._steps(model, None, setting, first)
                self._steps(model, None, setting, second)
                tell(ReferenceRun(steps_s=first.steps_s + second.steps_s))
                noise = max(a.difference(b)[0] for a, b in zip(first.gradients, second.gradients, strict=True))
                self._references[setting] = _Reference(model=model, seen=first, noise=noise)
            except Exception as err:
                self._references[setting] = err
        return self._references[setting]

    def _model(self, setting: Setting) -> torch.nn.Module:
        own = setting.attn_implementation == OWN
        model = models.build(
            self.source,
            self.config,
            device=self.name,
            dtype=parameter_dtype(setting.precision),
            attn_implementation=None if own else setting.attn_implementation,
            seed=self.task.seed,
            lora=Lora(r=_LORA_R) if setting.tuned == LORA else None,
        )
        if setting.tuned == FROZEN_BASE:
            _freeze_base(model)
        return model

    def _steps(self, pristine: torch.nn.Module, plan: strategies.Plan | None, setting: Setting, seen: _Seen) -> None:
        """Train a copy of the model for two steps, and note what there is to see."""
        model = _copied(pristine)
        task = self.task
        try:
            # Compiled layers draw dropout as others do, or nothing could be compared.
            with (
                inductor_config.patch(fallback_random=True),
                _noted_warnings(seen.warnings),
                checkpointing.layers_run(model) as seen.ran,
            ):
                counter = checkpointing.apply(model, plan) if plan is not None else checkpointing.RecomputeCounter()
                batch = random_batch(model, batch_size=task.batch_size, seq_len=task.seq_len, seed=task.seed)
                step = TrainingStep(
                    model, batch=batch, precision=setting.precision, optim=setting.optim, seed=task.seed
                )

                looking_s = 0.0

                def on_phase(phase: Phase) -> None:
                    nonlocal looking_s
                    if phase == "optimizer":
                        start = time.perf_counter()
                        if not counter.is_blind:
                            seen.recomputed = len(counter.layers)
                        gradients = Gradients.of(model)
                        if gradients.is_finite:  # an fp16 scaler skips steps until it has settled
                            seen.gradients.append(gradients)
                        looking_s += time.perf_counter() - start

                begin = time.perf_counter()
                while len(seen.gradients) < NUM_STEPS:
                    counter.reset()
                    step(on_phase)
                    seen.steps_s = time.perf_counter() - begin - looking_s
                    if step.num_steps - len(seen.gradients) > _MAX_SKIPPED_STEPS:
                        raise FloatingPointError("the gradients of every step held infinities or no numbers at all")
        finally:
            checkpointing.clear(model)
            if plan is not None and plan.compiled:
                torch._dynamo.reset()

    def _without_reference(self, asked: Combination, err: Exception) -> Checked:
        text = first_sentence(err)
        return Checked(
            number=0,
            verdict=UNSUPPORTED,
            message=f"{asked.setting.label} does not run without checkpointing either ({type(err).__name__}: {text})",
        )

    def _failed(self, asked: Combination, seen: _Seen, err: Exception) -> Checked:
        known = diagnose(self._observation(asked, seen, error_type=type(err).__name__, error_text=str(err)))
        unsupported = isinstance(err, NotImplementedError)
        return Checked(
            number=0,
            verdict=UNSUPPORTED if unsupported else FAILED,
            message=first_sentence(err) if unsupported else f"{type(err).__name__}: {first_sentence(err)}",
            cause=known.cause if known else None,
            remedy=known.remedy if known else None,
            link=known.link if known else None,
            steps_s=seen.steps_s,
        )

    def _judged(self, asked: Combination, plan: strategies.Plan, seen: _Seen, reference: _Reference) -> Checked:
        expected = len(reference.seen.ran.backward & {layer for group in plan.groups for layer in group})
        if plan.own:  # its own code decides which; that none is would be wrong
            expected = seen.recomputed or expected
        lost = tuple(name for name in seen.gradients[0].missing if name not in reference.seen.gradients[0].missing)
        (first, worst), (second, _) = (
            ours.difference(theirs) for ours, theirs in zip(seen.gradients, reference.seen.gradients, strict=True)
        )
        reordered = plan.compiled or plan.any_policy("reentrant")
        allowed = max(
            tolerance(asked.setting.precision, reordered_layers=plan.num_layers if reordered else 0),
            _TOLERATED_NOISE * reference.noise if math.isfinite(reference.noise) else 0.0,
        )
        wrong = _what_is_wrong(lost, seen.recomputed, None if plan.compiled else expected, first, allowed)
        if wrong is None and first == 0 and not second <= allowed:
            wrong = f"the gradients of the first step are the same, and those of the second differ by {second:.2g}"
        verdict: Verdict = WRONG if wrong else IDENTICAL if first == 0 == second else WITHIN_NOISE
        known = None
        if wrong:
            known = diagnose(
                self._observation(
                    asked,
                    seen,
                    grad_rel_diff=first if math.isfinite(first) else None,
                    is_wrong=not first <= allowed,
                    layers_expected=expected,
                    layers_recomputed=seen.recomputed,
                    num_layers=plan.num_layers,
                    params_without_grad=lost,
                )
            )
        return Checked(
            number=0,
            verdict=verdict,
            grad_rel_diff=first if math.isfinite(first) else None,
            worst_param=worst,
            noise=reference.noise,
            layers_expected=expected,
            layers_recomputed=seen.recomputed,
            params_without_grad=lost,
            message=wrong,
            cause=known.cause if known else None,
            remedy=known.remedy if known else None,
            link=known.link if known else None,
            steps_s=seen.steps_s,
        )

    def _observation(self, asked: Combination, seen: _Seen, **more: object) -> Observation:
        values = self.config.get_text_config().to_dict()
        dropout = [v for name, v in values.items() if ("drop" in name) and isinstance(v, (int, float))]
        experts = [v for name, v in values.items() if "experts" in name and isinstance(v, int)]
        return Observation.of_strategy(
            asked.strategy,
            precision=asked.setting.precision,
            optim=asked.setting.optim,
            has_dropout=any(value > 0 for value in dropout),
            is_moe=any(value > 1 for value in experts),
            frozen_base=asked.setting.tuned in (LORA, FROZEN_BASE),
            warnings=tuple(seen.warnings),
            **more,
        )


def _what_is_wrong(
    lost: tuple[str, ...], recomputed: int | None, expected: int | None, relative: float, allowed: float
) -> str | None:
    if lost:
        shown = ", ".join(lost[:2]) + (", …" if len(lost) > 2 else "")
        return f"{len(lost)} {'parameter' if len(lost) == 1 else 'parameters'} got no gradient ({shown})"
    if not relative <= allowed:
        return f"the gradients differ from those of off by {relative:.2g}"
    if expected is not None and recomputed != expected:
        return f"recomputed {recomputed} of {expected} layers"
    return None


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with parameters of its own; configs, which nothing changes, are shared."""
    configs = (value for module in model.modules() for value in vars(module).values())
    return copy.deepcopy(model, {id(value): value for value in configs if isinstance(value, PreTrainedConfig)})


def _freeze_base(model: torch.nn.Module) -> None:
    """Freeze the embeddings and the first half of the layers."""
    layers = checkpointing.layers_of(model)
    for module in layers[: len(layers) // 2]:
        module.requires_grad_(False)
    embeddings = input_embeddings(model)
    tables = (
        [embeddings] if embeddings is not None else [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    )
    for module in tables:
        module.requires_grad_(False)


@contextmanager
def _noted_warnings(into: list[str]) -> Iterator[None]:
    """Warnings, Python's and those that libraries log, go into a list and nowhere else."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    handler = Handler(level=logging.WARNING)
    transformers_logging.warning_once.cache_clear()
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        into.extend(str(warning.message) for warning in caught)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
