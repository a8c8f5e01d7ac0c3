"""From a report to one row per cell: what it took, what it saves against `off`, and whether it is proven."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from gcbench.core.prediction import ACCUMULATION, KEPT_OUTPUTS, Prediction
from gcbench.core.records import MemoryPeaks, Outcome, Report, RoundResult, Row, Workload
from gcbench.core.units import counted
from gcbench.report import stats

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]  # its stubs are a package of their own

OFF = "off"
IDENTICAL, WITHIN_NOISE, NO_REFERENCE, FAILED = "identical", "within noise", "no reference", "FAILED"
NOT_REPEATABLE = "not repeatable"
"""`off` differs from itself by far more than roundoff, so that no difference from it shows anything."""
NOT_ITSELF = "does not repeat itself: nothing can be shown"
NOTHING_SHOWN = f"off {NOT_ITSELF}"
SEEDED = (
    "torch's, NumPy's and Python's global generators are seeded before each step: draw from those alone, and keep no "
    "state from one step to the next"
)
"""What a model can do about it."""
NOT_MEASURED_YET = "not measured: the run ended before this cell"

_UNIT_ROUNDOFFS = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Half the gap between 1 and the next number (Higham, Accuracy and Stability of Numerical Algorithms, 2.1)."""
_TOLERATED_ROUNDOFFS, _TOLERATED_NOISE = 4, 2
_REORDERED = ("compile", "reentrant")
_ROUNDINGS_A_LAYER = 40
"""One after the other in a transformer layer, forward and backward: about twenty operators each way."""


def columns() -> tuple[str, ...]:
    """The column names of every table, in order."""
    return tuple(f.name for f in fields(Row))


def rows(report: Report) -> tuple[Row, ...]:
    """One row per outcome, in their order. Bytes, seconds and fractions; unknown is None."""
    off = {outcome.cell.workload: _summary(outcome) for outcome in report.outcomes if outcome.cell.strategy == OFF}
    return tuple(_row(report, outcome, off.get(outcome.cell.workload)) for outcome in report.outcomes)


def by_workload(table: Iterable[Row]) -> dict[Workload, tuple[Row, ...]]:
    """The rows of each workload, in the order of their first appearance."""
    groups: dict[Workload, list[Row]] = {}
    for row in table:
        groups.setdefault(workload(row), []).append(row)
    return {key: tuple(group) for key, group in groups.items()}


def workload(row: Row) -> Workload:
    """The workload of a row."""
    return Workload(**{f.name: getattr(row, f.name) for f in fields(Workload)})


def failed_proof(row: Row) -> bool:
    """Whether the cell did not do what its strategy says, so that its saving must not be shown."""
    return row.proof is not None and row.proof.startswith(FAILED)


def hides_saving(row: Row) -> bool:
    """Whether the proof forbids to show what the cell saves: it failed, or nothing could be shown."""
    return _hides_saving(row.proof)


def unproven(table: Iterable[Row]) -> tuple[str, ...]:
    """A sentence for whoever chooses among rows of which nothing could be shown."""
    if not any(row.proof == NOT_REPEATABLE for row in table):
        return ()
    return (f"{NOTHING_SHOWN[0].upper()}{NOTHING_SHOWN[1:]} about the gradients; memory and times are measured.",)


def _hides_saving(proof: str | None) -> bool:
    return proof is not None and proof.startswith((FAILED, NOT_REPEATABLE))


def frame(report: Report) -> pandas.DataFrame:
    """The rows as a pandas data frame with nullable column types, for notebooks."""
    import pandas

    table, kinds = rows(report), typing.get_type_hints(Row)
    return pandas.DataFrame(
        {name: pandas.array([getattr(row, name) for row in table], dtype=_nullable(kinds[name])) for name in columns()}
    )


def _nullable(kind: object) -> str:
    members = typing.get_args(kind) or (kind,)
    return "Int64" if int in members else "Float64" if float in members else "string"


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """What the rounds of a cell say together; counts are the worst over the rounds, None without rounds.

    `layers_recomputed` is the fewest, so it differs from the most when rounds disagree. `noise` is the largest
    difference of the rounds after the first, and of repeats, from the reference: for `off`, what changes from run to
    run.
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
    is_reordered: bool = False
    """Its kernels round, or its gradients add up, in another order than those of `off`."""
    proof: str | None = None


def _summary(outcome: Outcome) -> _Summary:
    rounds, said = tuple(sorted(outcome.rounds, key=lambda r: r.round)), outcome.prediction
    counts = [r.layers_recomputed for r in rounds if r.layers_recomputed is not None]
    diffs = [(r.round, r.grad_rel_diff) for r in rounds if r.grad_rel_diff is not None]
    return _Summary(
        rounds=rounds,
        memory=next((r.memory for r in rounds if r.memory is not None), said.memory if said else None),
        layers_run=max((r.layers_run for r in rounds), default=None),
        layers_planned=max((r.layers_planned for r in rounds), default=None),
        layers_recomputed=min(counts, default=None),
        most_layers_recomputed=max(counts, default=None),
        params_without_grad=max((r.params_without_grad for r in rounds), default=None),
        grad_rel_diff=_largest(diff for _, diff in diffs),
        noise=_largest([*(diff for number, diff in diffs if number > 0), *outcome.repeat_rel_diffs]),
        is_reordered=any(part.partition(":")[0] in _REORDERED for part in outcome.cell.strategy.split("+")),
        alloc_retries=max((r.num_alloc_retries or 0 for r in rounds), default=0),
    )


def _largest(values: Iterable[float]) -> float | None:
    """The largest, where not-a-number counts as larger than everything; None without values."""
    return max(values, key=lambda value: (math.isnan(value), value), default=None)


def _row(report: Report, outcome: Outcome, off: _Summary | None) -> Row:
    w, mine, is_off = outcome.cell.workload, _summary(outcome), outcome.cell.strategy == OFF
    planned = outcome.layers_checkpointed if mine.layers_planned is None else mine.layers_planned
    off_proof = _proof(off, off, w, 0) if off else None
    proof = off_proof if is_off else _proof(mine, off, w, planned)
    said = outcome.prediction
    # A prediction has nothing to prove: it is that of the plan.
    comparable = said is not None or not any(_hides_saving(v or FAILED) for v in (proof, off_proof))
    step = stats.step_time(mine.rounds)
    paid = stats.overhead(mine.rounds, off.rounds) if off and comparable else None
    if paid and is_off:
        known = None if paid.interval is None else 0.0
        paid = stats.Estimate(centre=0.0, low=known, high=known, num_units=paid.num_units)
    peak = mine.memory.allocated_bytes if mine.memory else None
    off_peak = off.memory.allocated_bytes if off and off.memory and comparable else None
    return Row(
        model=w.model,
        strategy=outcome.cell.strategy,
        status=outcome.failure.kind if outcome.failure else "ok",
        device=w.device,
        batch_size=w.batch_size,
        seq_len=w.seq_len,
        precision=w.precision,
        optim=w.optim,
        attn_implementation=w.attn_implementation,
        num_params=report.model.num_params,
        num_layers=mine.layers_run if mine.layers_run is not None else report.model.num_layers,
        layers_checkpointed=planned,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=mine.memory.reserved_bytes if mine.memory else None,
        peak_process_bytes=mine.memory.process_bytes if mine.memory else None,
        peak_phase=mine.memory.peak_phase if mine.memory else None,
        step_time_s=step.centre if step else None,
        step_time_low_s=step.low if step else None,
        step_time_high_s=step.high if step else None,
        tokens_per_s=w.batch_size * w.seq_len / step.centre if step else None,
        memory_saved_frac=1 - peak / off_peak if peak is not None and off_peak else None,
        time_overhead_frac=paid.centre if paid else None,
        grad_rel_diff=mine.grad_rel_diff,
        source=report.source,
        message=_message(outcome, mine, proof),
        layers_recomputed=mine.layers_recomputed,
        params_without_grad=mine.params_without_grad,
        peak_forward_bytes=mine.memory.forward_bytes if mine.memory else None,
        peak_backward_bytes=mine.memory.backward_bytes if mine.memory else None,
        peak_optimizer_bytes=mine.memory.optimizer_bytes if mine.memory else None,
        time_overhead_low_frac=paid.low if paid else None,
        time_overhead_high_frac=paid.high if paid else None,
        grad_noise_floor=off.noise if off else None,
        proof=proof,
        lora_r=w.lora_r,
        peak_op=said.explanation.op if said and said.explanation else None,
        peak_layer=said.explanation.layer if said and said.explanation else None,
        attention_kernel="+".join(said.attention) or None if said else None,
        device_memory_bytes=said.limit_bytes if said else None,
        spare_bytes=said.spare_bytes if said else None,
        usable_bytes=said.usable_bytes if said else None,
        fits=said.fit if said else None,
        model_changes=w.model_changes,
        accumulation_adds_bytes=_adds(said, ACCUMULATION),
        kept_outputs_add_bytes=_adds(said, KEPT_OUTPUTS),
        model_notice=" ".join(report.model_notices) or None,
    )


def _adds(said: Prediction | None, name: str) -> int | None:
    return next((addition.nbytes for addition in said.additions if addition.name == name), None) if said else None


def _proof(mine: _Summary, off: _Summary | None, workload: Workload, layers_checkpointed: int) -> str | None:
    """Whether the cell recomputed what its plan says and changed nothing else; None when nothing was measured."""
    if mine.params_without_grad is None:
        return None
    diff, precision, device = mine.grad_rel_diff, workload.precision, workload.device
    if off and not is_repeatable(off.noise, precision, device):
        return NOT_REPEATABLE  # before all else: layers may come and go by chance, too, and gradients agree by it
    fewest, most = mine.layers_recomputed, mine.most_layers_recomputed
    if fewest is not None and not fewest == most == layers_checkpointed:
        other = "" if fewest == most else f" in one round and {most} in another"
        return f"{FAILED}: recomputed {fewest} of {counted(layers_checkpointed, 'layer')}{other}"
    if off and off.params_without_grad is not None and mine.params_without_grad > off.params_without_grad:
        extra = mine.params_without_grad - off.params_without_grad
        return f"{FAILED}: {extra} {'parameter' if extra == 1 else 'parameters'} got no gradient"
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
    """Whether `noise`, the relative difference of the gradients of two runs of `off`, can be that of roundoff.

    On a card, where kernels add in any order, it can up to the root of the unit roundoff. Where a rounding decides
    something, as the expert that a token goes to, it does so for a share of them in proportion to the roundoff, and
    the norm of what changes goes with the root of that share. Random numbers that are drawn anew change a share that
    has nothing to do with it. Kernels of a CPU add in one order, so that a few units of roundoff are much there; in
    fp32 the root is as little. NaN says nothing.
    """
    most = math.sqrt(_unit_roundoff(precision))
    if device.partition(":")[0] == "cpu":
        most = min(most, max(_TOLERATED_ROUNDOFFS * _unit_roundoff(precision), math.sqrt(_UNIT_ROUNDOFFS["fp32"])))
    return noise is None or not noise > most


def needs_repeat(outcome: Outcome, off: Outcome) -> bool:
    """Whether the verdict on an outcome depends on the noise of `off`, and that is not known."""
    mine, reference = _summary(outcome), _summary(off)
    if reference.noise is not None or not mine.grad_rel_diff:
        return False
    return not mine.grad_rel_diff <= tolerance(outcome.cell.workload.precision)


def _unit_roundoff(precision: str) -> float:
    return _UNIT_ROUNDOFFS.get(precision.removesuffix("-mixed"), 2.0**-24)


def tolerance(precision: str, *, reordered_layers: int = 0, noise: float | None = None) -> float:
    """The relative difference of gradients that another choice of kernels explains.

    Twice the `noise` of two runs of `off` is tolerated, too: ask `is_repeatable` first whether it can be roundoff's.

    Compiled layers round at other places throughout, and reentrant ones add gradients in another order. Roundings that
    are as good as random add up as the root of their number (Higham and Mary, A new approach to probabilistic rounding
    error analysis, 2019); twice that is tolerated.
    """
    rounding = max(_TOLERATED_ROUNDOFFS, 2 * math.sqrt(_ROUNDINGS_A_LAYER * reordered_layers))
    floor = _TOLERATED_NOISE * noise if noise is not None and math.isfinite(noise) else 0.0
    return max(rounding * _unit_roundoff(precision), floor)


def _cause(outcome: Outcome, mine: _Summary) -> str:
    """What is known to make a proof fail in this way, with the remedy."""
    from gcbench.diagnoses.known_causes import Observation, diagnose  # what a sound run does not need

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


def _message(outcome: Outcome, mine: _Summary, proof: str | None) -> str | None:
    parts = [outcome.failure.message] if outcome.failure else []
    if proof and proof.startswith(FAILED):
        parts.append(f"no saving is shown because the proof failed: {proof.partition(': ')[2]}{_cause(outcome, mine)}")
    if proof == NOT_REPEATABLE and outcome.cell.strategy == OFF:
        parts.append(f"{NOT_ITSELF}; {SEEDED}")
    said = outcome.prediction
    if said and said.num_alloc_retries and not outcome.failure:
        parts.append("it fits only by flushing the allocator's cache, so it is near out of memory")
    if any(result.draws_other_dropout for result in outcome.rounds):
        parts.append(
            "compiled layers draw other dropout than off, so that gradients cannot be compared; see gcbench check"
        )
    if mine.alloc_retries:
        times = "once" if mine.alloc_retries == 1 else f"{mine.alloc_retries} times"
        parts.append(
            f"the allocator had to flush and retry {times}: timings are pessimistic and the setting is near "
            "out of memory"
        )
    if not outcome.rounds and not outcome.failure and not outcome.prediction:
        parts.append(NOT_MEASURED_YET)
    return "; ".join(parts) or None
