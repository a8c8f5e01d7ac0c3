"""Builds one row per cell of a report: memory, time, both relative to `off`, and the verdict of its proof."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from gcbench.core.prediction import ACCUMULATION, KEPT_OUTPUTS, Prediction
from gcbench.core.records import MemoryPeaks, Outcome, Report, RoundResult, Row, Workload
from gcbench.core.step_time import StepTime
from gcbench.core.units import counted
from gcbench.report import stats, time_columns, timing
from gcbench.report.time_columns import TimeColumns
from gcbench.strategies import OFF

IDENTICAL, WITHIN_NOISE, NO_REFERENCE, FAILED = "identical", "within noise", "no reference", "FAILED"
NOT_REPEATABLE = "not repeatable"
"""Gradients of `off` differ between runs by far more than roundoff, so comparing with them proves nothing."""
NOT_ITSELF = "does not repeat itself: nothing can be shown"
NOTHING_SHOWN = f"off {NOT_ITSELF}"
SEEDED = (
    "torch's, NumPy's and Python's global generators are seeded before each step: draw from those alone, and keep no "
    "state from one step to the next"
)
"""The remedy, for whoever writes the model."""
NOT_MEASURED_YET = "not measured: the run ended before this cell"
NOT_EMULATED_YET = "not emulated: the run ended before this cell"

_UNIT_ROUNDOFFS = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Half the gap between 1 and the next number (Higham, Accuracy and Stability of Numerical Algorithms, 2.1)."""
_TOLERATED_ROUNDOFFS, _TOLERATED_NOISE = 4, 2
_REORDERED = ("compile", "reentrant")
_ROUNDINGS_A_LAYER = 40
"""Consecutive roundings in a transformer layer: about twenty operators in each of forward and backward."""


def columns() -> tuple[str, ...]:
    """Return the column names of CSV, JSON and data frame, in order."""
    return tuple(f.name for f in fields(Row))


def rows(report: Report) -> tuple[Row, ...]:
    """Return one row per outcome, in their order, in bytes, seconds and fractions; unknown is None."""
    off = {outcome.cell.workload: _summary(outcome) for outcome in report.outcomes if outcome.cell.strategy == OFF}
    return tuple(_row(report, outcome, off.get(outcome.cell.workload)) for outcome in report.outcomes)


def by_workload(table: Iterable[Row]) -> dict[Workload, tuple[Row, ...]]:
    """Group rows by workload, in the order of their first appearance."""
    groups: dict[Workload, list[Row]] = {}
    for row in table:
        groups.setdefault(workload(row), []).append(row)
    return {key: tuple(group) for key, group in groups.items()}


def workload(row: Row) -> Workload:
    """Return the workload of a row."""
    return Workload(**{f.name: getattr(row, f.name) for f in fields(Workload)})


def failed_proof(row: Row) -> bool:
    """Return whether the cell did not do what its strategy says, so its saving must not be shown."""
    return row.proof is not None and row.proof.startswith(FAILED)


def hides_saving(row: Row) -> bool:
    """Return whether what the cell saves must not be shown: its proof failed, or `off` is not repeatable."""
    return _hides_saving(row.proof)


def unproven(table: Iterable[Row]) -> tuple[str, ...]:
    """Return a warning where `off` is not repeatable, so nothing about the gradients is proven."""
    if not any(row.proof == NOT_REPEATABLE for row in table):
        return ()
    return (f"{NOTHING_SHOWN[0].upper()}{NOTHING_SHOWN[1:]} about the gradients; memory and times are measured.",)


def _hides_saving(proof: str | None) -> bool:
    return proof is not None and proof.startswith((FAILED, NOT_REPEATABLE))


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """The rounds of a cell in one record; counts are the worst over the rounds, None without rounds.

    Attributes:
        memory: of the first round that has it, or as predicted.
        layers_recomputed, most_layers_recomputed: fewest and most over the rounds.
        noise: largest relative difference from the reference of the rounds after the first and of repeats; for `off`,
            the difference between runs.
        is_reordered: its kernels round, or its gradients are summed, in another order than those of `off`.
    """

    rounds: tuple[RoundResult, ...]
    memory: MemoryPeaks | None
    layers_run: int | None
    layers_planned: int | None
    layers_recomputed: int | None
    most_layers_recomputed: int | None
    params_without_grad: int | None
    grad_rel_diff: float | None
    noise: float | None
    alloc_retries: int
    is_reordered: bool
    predicted_time: StepTime | None = None


def _summary(outcome: Outcome) -> _Summary:
    rounds = tuple(sorted(outcome.rounds, key=lambda r: r.round))
    predicted = outcome.prediction.memory if outcome.prediction else None
    counts = [r.layers_recomputed for r in rounds if r.layers_recomputed is not None]
    diffs = [(r.round, r.grad_rel_diff) for r in rounds if r.grad_rel_diff is not None]
    return _Summary(
        rounds=rounds,
        memory=next((r.memory for r in rounds if r.memory is not None), predicted),
        layers_run=max((r.layers_run for r in rounds), default=None),
        layers_planned=max((r.layers_planned for r in rounds), default=None),
        layers_recomputed=min(counts, default=None),
        most_layers_recomputed=max(counts, default=None),
        params_without_grad=max((r.params_without_grad for r in rounds), default=None),
        grad_rel_diff=_largest(diff for _, diff in diffs),
        noise=_largest([*(diff for number, diff in diffs if number > 0), *outcome.repeat_rel_diffs]),
        is_reordered=any(part.partition(":")[0] in _REORDERED for part in outcome.cell.strategy.split("+")),
        alloc_retries=max((r.num_alloc_retries or 0 for r in rounds), default=0),
        predicted_time=outcome.prediction.time if outcome.prediction else None,
    )


def _largest(values: Iterable[float]) -> float | None:
    """Return the largest value, with NaN above all others; None without values."""
    return max(values, key=lambda value: (math.isnan(value), value), default=None)


def _row(report: Report, outcome: Outcome, off: _Summary | None) -> Row:
    """Return the row of an outcome; `off` summarizes the cell of `off` in the same workload."""
    mine, workload, is_off = _summary(outcome), outcome.cell.workload, outcome.cell.strategy == OFF
    planned = outcome.layers_checkpointed if mine.layers_planned is None else mine.layers_planned
    is_emulated = report.source == "emulated"
    off_proof = _proof(off, off, workload, 0, is_emulated=is_emulated) if off else None
    proof = off_proof if is_off else _proof(mine, off, workload, planned, is_emulated=is_emulated)
    # Only what is proven is compared with off. A prediction is that of the plan itself, so it needs no proof; on an
    # emulated card, where gradients have no values, the count of recomputed layers is all there is, and suffices.
    without = NO_REFERENCE if is_emulated else FAILED
    is_comparable = outcome.prediction is not None or not any(_hides_saving(v or without) for v in (proof, off_proof))
    reference = off if is_comparable else None
    return Row(
        **vars(workload),
        **vars(_memory_columns(mine.memory, reference)),
        **vars(_time_columns(mine, reference, tokens_per_step=workload.batch_size * workload.seq_len, is_off=is_off)),
        **vars(_prediction_columns(outcome.prediction)),
        strategy=outcome.cell.strategy,
        status=outcome.failure.kind if outcome.failure else "ok",
        source=report.source,
        num_params=report.model.num_params,
        num_layers=report.model.num_layers if mine.layers_run is None else mine.layers_run,
        layers_checkpointed=planned,
        layers_recomputed=mine.layers_recomputed,
        params_without_grad=mine.params_without_grad,
        grad_rel_diff=mine.grad_rel_diff,
        grad_noise_floor=off.noise if off else None,
        proof=proof,
        message=_message(outcome, mine, proof, is_emulated=is_emulated),
        num_turns_disturbed=timing.num_disturbed(outcome) if stats.turns(outcome.rounds) else None,
        model_notice=" ".join(report.model_notices) or None,
    )


@dataclass(frozen=True, kw_only=True)
class _MemoryColumns:
    """The columns of `Row` about memory, which are all unknown without a measured or predicted peak."""

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_process_bytes: int | None = None
    peak_phase: str | None = None
    peak_forward_bytes: int | None = None
    peak_backward_bytes: int | None = None
    peak_optimizer_bytes: int | None = None
    memory_saved_frac: float | None = None


def _memory_columns(memory: MemoryPeaks | None, reference: _Summary | None) -> _MemoryColumns:
    """Return the columns about memory; what is saved is relative to the peak of `reference`."""
    if memory is None:
        return _MemoryColumns()
    reference_bytes = reference.memory.allocated_bytes if reference and reference.memory else 0
    return _MemoryColumns(
        peak_allocated_bytes=memory.allocated_bytes,
        peak_reserved_bytes=memory.reserved_bytes,
        peak_process_bytes=memory.process_bytes,
        peak_phase=memory.peak_phase,
        peak_forward_bytes=memory.forward_bytes,
        peak_backward_bytes=memory.backward_bytes,
        peak_optimizer_bytes=memory.optimizer_bytes,
        memory_saved_frac=1 - memory.allocated_bytes / reference_bytes if reference_bytes else None,
    )


def _time_columns(mine: _Summary, reference: _Summary | None, *, tokens_per_step: int, is_off: bool) -> TimeColumns:
    """Return the columns about time; the overhead is relative to `reference`, and 0 for `off` itself."""
    if mine.predicted_time is not None:
        off = reference.predicted_time if reference else None
        return time_columns.predicted(mine.predicted_time, off, tokens_per_step=tokens_per_step)
    step = stats.step_time(mine.rounds)
    if step is None:
        return TimeColumns()
    overhead = stats.overhead(mine.rounds, reference.rounds) if reference else None
    if overhead and is_off:
        end = None if overhead.interval is None else 0.0
        overhead = stats.Estimate(centre=0.0, low=end, high=end, num_units=overhead.num_units)
    return TimeColumns(
        step_time_s=step.centre,
        step_time_low_s=step.low,
        step_time_high_s=step.high,
        tokens_per_s=tokens_per_step / step.centre,
        time_overhead_frac=overhead.centre if overhead else None,
        time_overhead_low_frac=overhead.low if overhead else None,
        time_overhead_high_frac=overhead.high if overhead else None,
        time_overhead_basis=stats.overhead_basis(mine.rounds, reference.rounds) if reference and not is_off else None,
        num_turns=len(stats.turns(mine.rounds)),
    )


@dataclass(frozen=True, kw_only=True)
class _PredictionColumns:
    """The columns of `Row` that only predictions have."""

    peak_op: str | None = None
    peak_layer: int | None = None
    attention_kernel: str | None = None
    device_memory_bytes: int | None = None
    spare_bytes: int | None = None
    usable_bytes: int | None = None
    fits: str | None = None
    accumulation_adds_bytes: int | None = None
    kept_outputs_add_bytes: int | None = None


def _prediction_columns(prediction: Prediction | None) -> _PredictionColumns:
    """Return the columns of a prediction; all unknown for a measurement."""
    if prediction is None:
        return _PredictionColumns()
    added_bytes = {addition.name: addition.nbytes for addition in prediction.additions}
    return _PredictionColumns(
        peak_op=prediction.explanation.op if prediction.explanation else None,
        peak_layer=prediction.explanation.layer if prediction.explanation else None,
        attention_kernel="+".join(prediction.attention) or None,
        device_memory_bytes=prediction.limit_bytes,
        spare_bytes=prediction.spare_bytes,
        usable_bytes=prediction.usable_bytes,
        fits=prediction.fit,
        accumulation_adds_bytes=added_bytes.get(ACCUMULATION),
        kept_outputs_add_bytes=added_bytes.get(KEPT_OUTPUTS),
    )


def _proof(
    mine: _Summary, off: _Summary | None, workload: Workload, layers_checkpointed: int, *, is_emulated: bool
) -> str | None:
    """Return whether the cell recomputed what its plan says and changed no gradient; None if nothing was measured.

    On an emulated card gradients have no values: what is left is whether it failed, and None if not.
    """
    if mine.params_without_grad is None:
        return None
    diff, precision, device = mine.grad_rel_diff, workload.precision, workload.device
    if off and not is_repeatable(off.noise, precision, device):
        return NOT_REPEATABLE  # first, since counts of layers may be random too, and gradients may agree by chance
    fewest, most = mine.layers_recomputed, mine.most_layers_recomputed
    if fewest is not None and not fewest == most == layers_checkpointed:
        other = "" if fewest == most else f" in one round and {most} in another"
        return f"{FAILED}: recomputed {fewest} of {counted(layers_checkpointed, 'layer')}{other}"
    if off and off.params_without_grad is not None and mine.params_without_grad > off.params_without_grad:
        extra = mine.params_without_grad - off.params_without_grad
        return f"{FAILED}: {extra} {'parameter' if extra == 1 else 'parameters'} got no gradient"
    if is_emulated:
        return None
    if diff is None:
        return NO_REFERENCE
    if math.isnan(diff):
        return f"{FAILED}: the gradients are not numbers"
    if diff == 0:
        return IDENTICAL
    reordered = (mine.layers_run or 0) if mine.is_reordered else 0
    tolerated = tolerance(precision, reordered_layers=reordered, noise=off.noise if off else None)
    return WITHIN_NOISE if diff <= tolerated else f"{FAILED}: the gradients differ from off by {diff:.2g}"


def is_repeatable(noise: float | None, precision: str, device: str) -> bool:
    """Return whether roundoff can explain `noise`, the relative difference of the gradients of two runs of `off`.

    On a GPU, whose kernels sum in any order, it can explain up to the square root of the unit roundoff: where a
    rounding decides something, such as the expert of a token, it does so for a share of tokens proportional to the
    roundoff, and the norm of the change grows with the root of that share. Random numbers drawn anew change a share
    that does not depend on the roundoff. Kernels on a CPU sum in a fixed order, so a few units of roundoff are the
    limit there, or in fp32 the root, which is as small. NaN counts as repeatable.
    """
    most = math.sqrt(_unit_roundoff(precision))
    if device.partition(":")[0] == "cpu":
        most = min(most, max(_TOLERATED_ROUNDOFFS * _unit_roundoff(precision), math.sqrt(_UNIT_ROUNDOFFS["fp32"])))
    return noise is None or not noise > most


def needs_repeat(outcome: Outcome, off: Outcome) -> bool:
    """Return whether the verdict on an outcome depends on the noise of `off`, which is not known yet."""
    mine, reference = _summary(outcome), _summary(off)
    if reference.noise is not None or not mine.grad_rel_diff:
        return False
    return not mine.grad_rel_diff <= tolerance(outcome.cell.workload.precision)


def _unit_roundoff(precision: str) -> float:
    return _UNIT_ROUNDOFFS.get(precision.removesuffix("-mixed"), 2.0**-24)


def tolerance(precision: str, *, reordered_layers: int = 0, noise: float | None = None) -> float:
    """Return the relative difference of gradients that a different choice of kernels explains.

    Twice the `noise` of two runs of `off` is tolerated too; check with `is_repeatable` that it can be roundoff.

    Compiled layers round in other places, and reentrant ones sum gradients in another order. Independent roundings
    grow with the square root of their number (Higham and Mary, A new approach to probabilistic rounding error
    analysis, 2019); twice that is tolerated.
    """
    rounding = max(_TOLERATED_ROUNDOFFS, 2 * math.sqrt(_ROUNDINGS_A_LAYER * reordered_layers))
    floor = _TOLERATED_NOISE * noise if noise is not None and math.isfinite(noise) else 0.0
    return max(rounding * _unit_roundoff(precision), floor)


def _cause(outcome: Outcome, mine: _Summary) -> str:
    """Return the known cause of a proof that failed in this way, with its remedy; empty when none is known."""
    from gcbench.diagnoses.known_causes import Observation, diagnose  # lazily: most runs need no diagnosis

    known = diagnose(
        Observation.of_strategy(
            outcome.cell.strategy,
            precision=outcome.cell.workload.precision,
            optim=outcome.cell.workload.optim,
            grad_rel_diff=mine.grad_rel_diff,
            is_wrong=mine.grad_rel_diff not in (None, 0.0),
            layers_expected=mine.layers_planned,
            draws_outside_torch=any(result.draws_outside_torch for result in outcome.rounds),
            layers_recomputed=mine.layers_recomputed,
            num_layers=mine.layers_run,
            params_without_grad=("?",) * (mine.params_without_grad or 0),
            frozen_base=outcome.cell.workload.lora_r is not None,
        )
    )
    return f". {known.cause} {known.remedy} See {known.link}" if known else ""


def _message(outcome: Outcome, mine: _Summary, proof: str | None, *, is_emulated: bool) -> str | None:
    parts = [outcome.failure.message] if outcome.failure else []
    if proof and proof.startswith(FAILED):
        parts.append(f"no saving is shown because the proof failed: {proof.partition(': ')[2]}{_cause(outcome, mine)}")
    if proof == NOT_REPEATABLE and outcome.cell.strategy == OFF:
        parts.append(f"{NOT_ITSELF}; {SEEDED}")
    prediction = outcome.prediction
    if prediction and prediction.num_alloc_retries and not outcome.failure:
        parts.append("it fits only by flushing the allocator's cache, so it is near out of memory")
    if any(result.draws_other_dropout for result in outcome.rounds):
        parts.append(
            "compiled layers draw other dropout than off, so their gradients cannot be compared; see gcbench check"
        )
    if mine.alloc_retries:
        times = "once" if mine.alloc_retries == 1 else f"{mine.alloc_retries} times"
        parts.append(
            f"the allocator had to flush and retry {times}: {'' if is_emulated else 'timings are pessimistic and '}"
            "the setting is near out of memory"
        )
    if not outcome.rounds and not outcome.failure and not prediction:
        parts.append(NOT_EMULATED_YET if is_emulated else NOT_MEASURED_YET)
    return "; ".join(parts) or None
