"""Checks combinations in a child process: trains small real steps and compares them with those of `off`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch._inductor import config as inductor_config

from gcbench import strategies
from gcbench.check.cases import (
    FAILED,
    FROZEN_BASE,
    IDENTICAL,
    LORA,
    NOT_REPEATABLE,
    RUNS,
    UNSUPPORTED,
    WITHIN_NOISE,
    WRONG,
    CheckResult,
    CheckSetting,
    Combination,
)
from gcbench.check.evidence import NUM_STEPS, Evidence, Gradients, Reference, noted_warnings
from gcbench.check.models import ModelMaker
from gcbench.check.task import CheckTask, ReferenceRun
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.errors import GcbenchError, MissingLibrary, UnavailableError, UsageError, first_sentence
from gcbench.core.records import ModelFacts, Phase
from gcbench.core.units import counted
from gcbench.devices import backends
from gcbench.diagnoses.failures import NEEDS_TRITON, lacks_triton, with_doubt
from gcbench.diagnoses.known_causes import Observation, diagnose
from gcbench.emulate.environment import card_behind
from gcbench.job.preflight import beyond_positions
from gcbench.models import build as models
from gcbench.models.scaledown import scaled_down
from gcbench.processes.messages import Answer, Refusal
from gcbench.report.rows import NOT_ITSELF, NOTHING_SHOWN, SEEDED, is_repeatable, tolerance
from gcbench.strategies._for_model import not_for, plan_of, unsupported
from gcbench.training.seeding import state_outside_torch
from gcbench.training.step import TrainingStep, random_batch

_LAYERS, _SEQ_LEN = 4, 32
_MAX_SKIPPED_STEPS = 24
"""An fp16 scaler starts at 2**16 and halves at each overflow."""
_FINEST = "fp32"
"""The precision with the least roundoff."""

Send = Callable[[ReferenceRun], None]


def check(task: CheckTask, send: Callable[[CheckResult | ReferenceRun], None]) -> Answer:
    """Test every combination of the task; sends each result, and each reference run, as an event."""
    try:
        checker = _Checker(task)
    except GcbenchError as err:
        return Answer(refusal=Refusal(error=type(err).__name__, message=str(err)))
    for number, combination in task.combinations:
        send(replace(checker.check(combination, send), number=number))
    return Answer(facts=checker.facts, notices=tuple(checker.models.notices))


class _Checker:
    """Tests the combinations of one model, and shares references between them."""

    def __init__(self, task: CheckTask) -> None:
        self.task = task
        self.name = backends.choose(task.device)
        self.is_emulated = card_behind(self.name) is not None
        self.source = task.source
        self.seq_len = self._seq_len()
        if not task.full_size:
            torch.set_num_threads(1)  # a small step is no faster with more, and slow where threads wait for each other
            config = scaled_down(task.source.config, layers=_LAYERS, seq_len=self.seq_len)
            self.source = replace(task.source, config=config)
        self.config = models.build_config(self.source, layers=task.layers, overrides=task.overrides)
        try:
            self.facts: ModelFacts = models.facts(self.source, self.config, None, changed=bool(task.overrides))
        except UnavailableError as err:
            if task.full_size or isinstance(err, MissingLibrary):
                raise
            raise UnavailableError(f"scaled down, {err}, or add --full-size to check the model at full size") from None
        self.models = ModelMaker(source=self.source, config=self.config, device=self.name, seed=task.seed)
        self._references: dict[CheckSetting, Reference | Exception] = {}
        self._results: dict[Combination, CheckResult] = {}

    def _seq_len(self) -> int:
        """The sequence length in tokens; raises UsageError for one beyond the model's positions."""
        task = self.task
        config = models.build_config(task.source, layers=task.layers, overrides=task.overrides)
        limit = models.max_seq_len(config)
        if task.seq_len is None:
            return min(_SEQ_LEN, limit or _SEQ_LEN, *models.possible_limits(config))
        if limit is not None and task.seq_len > limit:
            raise UsageError(beyond_positions(task.source.name, task.seq_len, limit))
        return task.seq_len

    def check(self, combination: Combination, send: Send) -> CheckResult:
        """Test one combination, or return its earlier result; an exception in a step becomes a result."""
        if combination not in self._results:
            self._results[combination] = self._checked(combination, send)
        return self._results[combination]

    def _checked(self, combination: Combination, send: Send) -> CheckResult:
        if self.facts.checkpointing_refusal is not None:
            return CheckResult(number=0, verdict=UNSUPPORTED, message=self.facts.checkpointing_refusal)
        reference = self._reference(combination.setting, send)
        if isinstance(reference, Exception):
            return self._without_reference(combination, reference)
        try:
            plan = self._plan(combination.strategy, reference)
        except ValueError as err:
            smaller = "" if self.task.full_size else " (scaled down; add --full-size to check all of its layers)"
            return CheckResult(number=0, verdict=UNSUPPORTED, message=f"{err}{smaller}")
        why = not_for(plan, self.facts) or unsupported(plan, self.name.partition(":")[0])
        if why is not None:
            return CheckResult(number=0, verdict=UNSUPPORTED, message=why)
        seen = Evidence()
        try:
            self._steps(reference.model, plan, combination.setting, seen)
            result = self._compared(combination, plan, seen, reference)
            if result.verdict == WRONG:
                result = self._confirmed(combination, plan, seen, reference, send)
        except Exception as err:  # anything that a model, torch or a compiler may raise
            return self._failed(combination, seen, err)
        if combination.setting.precision != _FINEST and result.verdict in (WITHIN_NOISE, NOT_REPEATABLE):
            return self._with_less_roundoff(result, combination, plan, seen, reference, send)
        return result

    def _confirmed(
        self, combination: Combination, plan: strategies.Plan, seen: Evidence, reference: Reference, send: Send
    ) -> CheckResult:
        """Run again before a verdict of WRONG: code that rarely draws random numbers may repeat itself once, or not."""
        while reference.extra_runs:
            reference.extra_runs -= 1
            again = Evidence()
            self._steps(reference.model, None, combination.setting, again)
            send(ReferenceRun(steps_s=again.steps_s))
            reference.compare(again)
        again = Evidence()
        self._steps(reference.model, plan, combination.setting, again)
        seen.steps_s += again.steps_s
        own = Reference(model=reference.model, seen=seen)
        own.compare(again)
        result = self._compared(combination, plan, seen, reference)
        if result.verdict == WRONG and not own.repeats(combination.setting.precision, self.name):
            return _not_repeatable(result, f"{combination.strategy} {NOT_ITSELF}; {own.how_it_differs()}")
        return result

    def _with_less_roundoff(
        self,
        result: CheckResult,
        combination: Combination,
        plan: strategies.Plan,
        seen: Evidence,
        reference: Reference,
        send: Send,
    ) -> CheckResult:
        """Test a difference that may be roundoff in fp32, which has less: what is wrong there is wrong here."""
        fine = self.check(replace(combination, setting=replace(combination.setting, precision=_FINEST)), send)
        if fine.verdict in (WRONG, NOT_REPEATABLE) and fine.verdict != result.verdict:
            return replace(
                result,
                verdict=fine.verdict,
                message=f"the same in fp32, which has less roundoff: {fine.message}",
                cause=fine.cause,
                remedy=fine.remedy,
                link=fine.link,
            )
        if fine.is_shown and result.verdict == NOT_REPEATABLE:
            compared = self._compared(combination, plan, seen, reference, is_roundoff=True)
            return compared if compared.is_shown else result
        return result

    def _plan(self, spec: str, reference: Reference) -> strategies.Plan:
        order = tuple(reference.seen.ran.order)
        natural = order == tuple(range(self.facts.num_layers))
        facts = replace(self.facts, layers_in_order=None if natural else order)
        return plan_of(strategies.parse(spec), facts)

    def _reference(self, setting: CheckSetting, send: Send) -> Reference | Exception:
        if setting not in self._references:
            try:
                model = self.models.build(setting)
                first, second = Evidence(), Evidence()
                self._steps(model, None, setting, first)
                self._steps(model, None, setting, second)
                send(ReferenceRun(steps_s=first.steps_s + second.steps_s))
                reference = Reference(model=model, seen=first)
                reference.compare(second)
                self._references[setting] = reference
            except Exception as err:
                self._references[setting] = err
        return self._references[setting]

    def _steps(
        self, pristine: torch.nn.Module, plan: strategies.Plan | None, setting: CheckSetting, seen: Evidence
    ) -> None:
        """Train a copy of the model for two steps, and note the evidence in `seen`."""
        model = self.models.fresh(pristine, setting)
        task = self.task
        try:
            # Compiled layers draw dropout masks as others do, or nothing could be compared.
            with (
                inductor_config.patch(fallback_random=True),
                noted_warnings(seen.warnings),
                checkpointing.layers_run(model) as seen.ran,
            ):
                counter = checkpointing.apply(model, plan) if plan is not None else checkpointing.RecomputeCounter()
                batch = random_batch(model, batch_size=task.batch_size, seq_len=self.seq_len, seed=task.seed)
                step = TrainingStep(
                    model, batch=batch, precision=setting.precision, optim=setting.optim, seed=task.seed
                )

                looking_s = 0.0
                at_start: object = None

                def on_phase(phase: Phase) -> None:
                    nonlocal looking_s, at_start
                    if phase == "forward":
                        at_start = state_outside_torch()
                    elif phase == "backward":
                        seen.draws_outside_torch |= state_outside_torch() != at_start
                    else:
                        start = time.perf_counter()
                        if step.num_steps == 0:
                            seen.recomputed = None if counter.is_blind else len(counter.layers)
                            seen.backward = frozenset(seen.ran.backward)
                        gradients = Gradients.without_values(model) if self.is_emulated else Gradients.of(model)
                        if gradients.is_finite:  # an fp16 scaler skips steps until its scale fits
                            seen.gradients.append(gradients)
                        looking_s += time.perf_counter() - start

                begin = time.perf_counter()
                while len(seen.gradients) < NUM_STEPS:
                    counter.reset()
                    step(on_phase)
                    seen.steps_s = time.perf_counter() - begin - looking_s
                    if step.num_steps - len(seen.gradients) > _MAX_SKIPPED_STEPS:
                        raise FloatingPointError("the gradients of every step contained infinities or NaNs")
        finally:
            checkpointing.clear(model)
            if plan is not None and plan.compiled:
                torch._dynamo.reset()

    def _without_reference(self, combination: Combination, err: Exception) -> CheckResult:
        text = first_sentence(err)
        advice = "; try a shorter --seq-len" if isinstance(err, IndexError) else ""
        if isinstance(err, NotImplementedError):
            return CheckResult(
                number=0, verdict=UNSUPPORTED, message=f"{combination.setting.label} cannot be tested: {text}"
            )
        label = combination.setting.label
        return CheckResult(
            number=0,
            verdict=UNSUPPORTED,
            message=f"{label} does not run without checkpointing either ({type(err).__name__}: {text}){advice}",
            remedy=None if isinstance(err, GcbenchError) or advice else self._next_step(combination.setting),
        )

    def _next_step(self, setting: CheckSetting) -> str:
        """The remedy for a setting that fails without checkpointing."""
        size = "" if self.task.full_size else " Or add --full-size, as only the scaled-down model may fail."
        if setting == CheckSetting():
            return f"Train a step of the model without gcbench, and fix what fails there first.{size}"
        return f"Train with a setting other than {setting.label} on this device.{size}"

    def _failed(self, combination: Combination, seen: Evidence, err: Exception) -> CheckResult:
        if lacks_triton(err):
            return CheckResult(number=0, verdict=UNSUPPORTED, message=NEEDS_TRITON)
        known = diagnose(self._observation(combination, seen, error_type=type(err).__name__, error_text=str(err)))
        unsupported = isinstance(err, NotImplementedError)
        message = first_sentence(err) if unsupported else f"{type(err).__name__}: {first_sentence(err)}"
        if self.is_emulated and known is None and not unsupported:
            message = with_doubt(message, err)
        return CheckResult(
            number=0,
            verdict=UNSUPPORTED if unsupported else FAILED,
            message=message,
            cause=known.cause if known else None,
            remedy=known.remedy if known else None,
            link=known.link if known else None,
            steps_s=seen.steps_s,
        )

    def _compared(
        self,
        combination: Combination,
        plan: strategies.Plan,
        seen: Evidence,
        reference: Reference,
        *,
        is_roundoff: bool = False,
    ) -> CheckResult:
        """Compare two steps with those of `off`; `is_roundoff`: differences between runs of `off` are only roundoff."""
        expected = len(reference.seen.backward & {layer for group in plan.groups for layer in group})
        if plan.own:  # the model's own code decides which layers, but recomputing none is wrong
            expected = seen.recomputed or expected
        lost = tuple(name for name in seen.gradients[0].missing if name not in reference.seen.gradients[0].missing)
        (first, worst), (second, _) = (
            ours.difference(theirs) for ours, theirs in zip(seen.gradients, reference.seen.gradients, strict=True)
        )
        result = CheckResult(
            number=0,
            verdict=IDENTICAL if first == 0 == second else WITHIN_NOISE,
            grad_rel_diff=first if math.isfinite(first) else None,
            worst_param=worst,
            noise=max(reference.noise) if math.isfinite(max(reference.noise)) else None,
            layers_expected=expected,
            layers_recomputed=seen.recomputed,
            params_without_grad=lost,
            steps_s=seen.steps_s,
        )
        if self.is_emulated:
            result = replace(result, verdict=RUNS, grad_rel_diff=None, worst_param=None, noise=None)
        precision = combination.setting.precision
        if not is_roundoff and not reference.repeats(precision, self.name):
            return _not_repeatable(result, f"{NOTHING_SHOWN}; {reference.how_it_differs()}")
        reordered = plan.num_layers if plan.compiled or plan.any_policy("reentrant") else 0
        allowed, allowed_later = (
            tolerance(precision, reordered_layers=reordered, noise=noise) for noise in reference.noise
        )
        wrong = _mistake(lost, seen.recomputed, None if plan.compiled else expected, first, allowed)
        comparable_later = first == 0 and is_repeatable(reference.noise[1], precision, self.name)
        if wrong is None and comparable_later and not second <= allowed_later:
            wrong = f"the gradients of the first step are identical, and those of the second differ by {second:.2g}"
        if wrong is None:
            return result
        known = diagnose(
            self._observation(
                combination,
                seen,
                grad_rel_diff=result.grad_rel_diff,
                is_wrong=not first <= allowed,
                layers_expected=expected,
                layers_recomputed=seen.recomputed,
                num_layers=plan.num_layers,
                params_without_grad=lost,
            )
        )
        return replace(
            result,
            verdict=WRONG,
            message=wrong,
            cause=known.cause if known else None,
            remedy=known.remedy if known else None,
            link=known.link if known else None,
        )

    def _observation(self, combination: Combination, seen: Evidence, **more: object) -> Observation:
        values = self.config.get_text_config().to_dict()
        dropout = [v for name, v in values.items() if ("drop" in name) and isinstance(v, (int, float))]
        experts = [v for name, v in values.items() if "experts" in name and isinstance(v, int)]
        return Observation.of_strategy(
            combination.strategy,
            precision=combination.setting.precision,
            optim=combination.setting.optim,
            has_dropout=any(value > 0 for value in dropout),
            draws_outside_torch=seen.draws_outside_torch,
            is_moe=any(value > 1 for value in experts),
            frozen_base=combination.setting.tuned in (LORA, FROZEN_BASE),
            warnings=tuple(seen.warnings),
            **more,
        )


def _not_repeatable(result: CheckResult, message: str) -> CheckResult:
    return replace(
        result,
        verdict=NOT_REPEATABLE,
        message=message,
        remedy=f"{SEEDED[0].upper()}{SEEDED[1:]}.",
        cause=None,
        link=None,
    )


def _mistake(
    lost: tuple[str, ...], recomputed: int | None, expected: int | None, relative: float, allowed: float
) -> str | None:
    if lost:
        shown = ", ".join(lost[:2]) + (", …" if len(lost) > 2 else "")
        return f"{counted(len(lost), 'parameter')} got no gradient ({shown})"
    if not relative <= allowed:
        return f"the gradients differ from those of off by {relative:.2g}"
    if expected is not None and recomputed != expected:
        return f"recomputed {recomputed} of {counted(expected, 'layer')}"
    return None
