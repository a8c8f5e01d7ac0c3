"""`gcbench plan --from`: a decision from the measurements of a stored run, or a stored plan shown again."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from gcbench.core import headroom
from gcbench.core.errors import ResultsError, UsageError
from gcbench.core.records import ModelFacts, Report, Row
from gcbench.core.units import format_bytes
from gcbench.devices.target import CPU, Target, TargetOptions
from gcbench.job import settings as configs
from gcbench.job.settings import Settings
from gcbench.plan import ties
from gcbench.plan.decision import Candidate, Decision, Largest, ranked
from gcbench.plan.planned import PlanOptions, PlanResult
from gcbench.report.rows import failed_proof, rows, unproven
from gcbench.report.stats import MIN_ROUNDS
from gcbench.strategies import OFF, Plan, parse
from gcbench.strategies._for_model import plan_of
from gcbench.strategies.plan_file import of_json

_OF_THE_RUN = ("precision", "optim", "attn_implementation", "lora_r", "lora_target_modules", "layers", "set")


def decide(
    report: Report,
    folder: Path,
    settings: Settings,
    target_options: TargetOptions,
    options: PlanOptions,
    *,
    command: str,
) -> PlanResult:
    """The fastest measured candidate that fits; raises UsageError and ResultsError."""
    if target_options.device is not None:
        raise UsageError(
            f"--device {target_options.device}: the run was measured on {report.machine.device_name}; leave the flag "
            "out, or plan without --from"
        )
    if report.source != "measured":
        raise ResultsError(
            f"{folder} holds predictions, whose times were not measured; pass a run that gcbench run measured"
        )
    kind = report.machine.device.partition(":")[0]
    limit = target_options.device_memory or report.machine.device_memory_bytes
    if limit is None:
        raise UsageError(f"{folder} does not say how much memory its device has; pass --device-memory 24GiB")
    reserve = headroom.RESERVE_FRAC[kind] if options.reserve_frac is None else options.reserve_frac
    usable = headroom.usable_bytes(limit, reserve)
    table = [row for row in rows(report) if row.status == "ok" and row.tokens_per_s and not failed_proof(row)]
    lengths = sorted({row.seq_len for row in table})
    if settings.seq_len is not None:
        table = [row for row in table if row.seq_len == settings.seq_len[0]]
    elif len(lengths) > 1:
        raise UsageError(f"--seq-len is missing: {folder} has lengths {', '.join(map(str, lengths))}; choose one")
    if options.batch_sizes is not None:
        table = [row for row in table if row.batch_size in options.batch_sizes]
    if settings.strategies is not None:
        table = [row for row in table if row.strategy in settings.strategies]
    if not table:
        raise ResultsError(
            f"{folder} has no measured cell that matches; measure it with gcbench run, or leave out --batch, "
            "--seq-len and --strategies"
        )
    ran = {(o.cell.strategy, o.cell.workload.batch_size, o.cell.workload.seq_len): o.rounds for o in report.outcomes}
    rounds = {_candidate(row, report, usable): ran[row.strategy, row.batch_size, row.seq_len] for row in table}
    fitting = sum(each.fits for each in rounds)
    choice, others, candidates = ties.decided(list(rounds), rounds)
    how = "Chosen" if others else "The fastest"
    why = [f"{how} among {fitting} of {len(table)} measured settings that fit into {format_bytes(usable)}."]
    why += [ties.sentence(choice, others)] if choice and others else []
    notices = ["The largest batches are those of the run; larger ones were not measured."]
    if kind != CPU and any(row.peak_process_bytes is None for row in table):
        notices.append(
            "Device memory of the process outside the allocator was not measured: peaks exclude it, and --reserve has "
            "to cover it."
        )
    decision = Decision(
        limit_bytes=limit,
        usable_bytes=usable,
        reserve_frac=reserve,
        choice=choice,
        smallest=None if choice else min(candidates, key=lambda each: each.peak_bytes),
        candidates=ranked(candidates),
        largest=tuple(_largest(strategy, candidates) for strategy in dict.fromkeys(row.strategy for row in table)),
        binding=" ".join(why),
        times_from=f"measurements in {folder}",
        notices=(
            *notices,
            *(() if choice is None else ties.basis(choice, list(rounds), rounds)),
            *_too_few_rounds(table, folder),
            *unproven(table),
        ),
    )
    stored = {key: report.settings[key] for key in _OF_THE_RUN if report.settings.get(key) is not None}
    run_settings = configs.settings({"model": report.model.model, "batch_size": "1", **stored})
    return PlanResult(
        settings=run_settings,
        seq_len=table[0].seq_len,
        target=Target(kind=kind, name=report.machine.device, memory_bytes=limit),
        machine=report.machine,
        facts=report.model,
        decision=decision,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hub_id=None,
        model_notices=report.model_notices,
    )


def _too_few_rounds(table: list[Row], folder: Path) -> tuple[str, ...]:
    """A notice where times have no interval."""
    if all(row.step_time_low_s is not None for row in table):
        return ()
    return (
        f"{folder} has too few rounds for an interval, so the choice may be due to noise; "
        f"gcbench run --resume --out {shlex.quote(str(folder))} --rounds {MIN_ROUNDS} adds to them.",
    )


def _candidate(row: Row, report: Report, usable: int) -> Candidate:
    nbytes = row.peak_process_bytes if report.machine.device != "cpu" else row.peak_allocated_bytes
    nbytes = nbytes or row.peak_reserved_bytes or row.peak_allocated_bytes
    assert nbytes is not None and row.peak_allocated_bytes is not None
    assert row.step_time_s is not None and row.tokens_per_s is not None
    tokens = row.batch_size * row.seq_len
    return Candidate(
        strategy=row.strategy,
        plan=plan_of_row(row.strategy, report.plan_files, report.model),
        batch_size=row.batch_size,
        peak_bytes=nbytes,
        allocated_bytes=row.peak_allocated_bytes,
        peak_phase=row.peak_phase,  # type: ignore[arg-type]  # one of its names
        fits=nbytes <= usable,
        step_time_s=row.step_time_s,
        tokens_per_s=row.tokens_per_s,
        tokens_per_s_low=tokens / row.step_time_high_s if row.step_time_high_s else None,
        tokens_per_s_high=tokens / row.step_time_low_s if row.step_time_low_s else None,
        source="measured",
    )


def plan_of_row(spec: str, plan_files: dict[str, str], facts: ModelFacts) -> Plan:
    """The plan of a strategy of a stored run."""
    if facts.checkpointing_refusal is not None or spec == OFF:
        return Plan(num_layers=facts.num_layers)
    if spec in plan_files:
        plan = of_json(json.loads(plan_files[spec]))
        order = facts.layers_in_order
        plan = replace(plan, num_layers=facts.num_layers if order is None else len(order))
        return plan if order is None else plan.renumbered(order, facts.num_layers)
    return plan_of(parse(spec), facts)


def _largest(strategy: str, candidates: list[Candidate]) -> Largest:
    fitting = [each.batch_size for each in candidates if each.strategy == strategy and each.fits]
    return Largest(strategy=strategy, batch_size=max(fitting, default=None))
