"""`gcbench plan --measure`: benchmarks the leading candidates in rounds until the fastest is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from gcbench.core import model_changes
from gcbench.core.errors import GcbenchError
from gcbench.core.files import write_text
from gcbench.core.records import Cell, Outcome, Report, Row, Turn, Workload
from gcbench.core.units import counted
from gcbench.export._handover import SEARCHED
from gcbench.job.resolve import ResolvedRun, begin, described, target_notice
from gcbench.job.settings import Settings
from gcbench.measure.goal import num_turns
from gcbench.measure.progress import Progress
from gcbench.measure.recorder import Recorder
from gcbench.measure.runner import Tasks
from gcbench.measure.side_by_side import TurnTaking
from gcbench.plan import racing, ties
from gcbench.plan.decision import Candidate, Decision, choose, ranked, why_not_faster
from gcbench.plan.from_run import plan_of_row
from gcbench.plan.named import in_run_order, unconfirmed
from gcbench.plan.planned import PlanResult
from gcbench.processes.children import Children
from gcbench.report import stats
from gcbench.report.rows import failed_proof, rows, unproven
from gcbench.report.run_folder import Store
from gcbench.strategies.plan_file import as_json as plan_as_json

_STEPS = 2
"""Timed steps of a candidate in a turn."""


def confirm(planned: PlanResult, *, children: Children, store: Store, progress: Progress) -> PlanResult:
    """The plan with its leading candidates measured and the choice among them; the run is saved in `store`.

    Raises GcbenchError where no candidate could be measured.
    """
    decision = planned.decision
    entered = racing.contenders(decision.candidates)
    if not entered:
        return planned
    named: dict[Candidate, str] = {}
    report: Report | None = None
    num_rounds = 0
    still_in: Sequence[Cell] = ()
    while entered:
        named |= {each: _spec(each, planned, store) for each in entered}
        job = _job(planned, named)
        recorder = Recorder(_with_cells_of(report, begin(job, planned.machine, planned.facts, planned.command)), store)
        cells = job.cells[-len(entered) :]
        rounds_now, still_in = _race(recorder, job, cells, planned, children=children, progress=progress)
        report = recorder.report
        num_rounds = max(num_rounds, rounds_now)
        measured = _measured(report, named, planned)
        if any(each.fits for each in measured):
            break
        # None of them fits, so the next slower ones by estimate are measured.
        entered = racing.contenders([each for each in decision.candidates if each not in named])
    assert report is not None
    if not any(each.source == "measured" for each in measured):
        raise GcbenchError(f"none of {counted(len(named), 'candidate')} could be measured; see {store.folder}")
    obsolete = _unmeasured_notices(planned)
    steps = sum(result.num_steps for outcome in report.outcomes for result in outcome.rounds)
    rounds = {now: _outcome_of(report, named[was], was).rounds for was, now in zip(named, measured, strict=True)}
    tied = [
        now
        for was, now in zip(named, measured, strict=True)
        if now.fits and _outcome_of(report, named[was], was).cell in still_in
    ]
    found = settled(decision, dict(zip(named, measured, strict=True)), tied=tied, rounds=rounds)
    decided = replace(
        found,
        times_from=f"measurements of {counted(len(named), 'setting')} in up to {counted(num_rounds, 'round')}",
        notices=(
            *(notice for notice in decision.notices if notice not in obsolete),
            f"Measured: {counted(len(named), 'leading candidate')}, {counted(steps, 'training step')}; the other "
            "candidates are estimates, scaled to the measurements.",
            *(() if found.choice is None else ties.basis(found.choice, measured, rounds)),
            *unproven(rows(report)),
        ),
    )
    return replace(planned, decision=decided)


def _with_cells_of(report: Report | None, begun: Report) -> Report:
    """The newly begun report with the outcomes that were measured so far."""
    if report is None:
        return begun
    done = {outcome.cell: outcome for outcome in report.outcomes}
    return replace(begun, outcomes=tuple(done.get(each.cell, each) for each in begun.outcomes))


def _outcome_of(report: Report, spec: str, candidate: Candidate) -> Outcome:
    return next(
        outcome
        for outcome in report.outcomes
        if (outcome.cell.strategy, outcome.cell.workload.batch_size) == (spec, candidate.batch_size)
    )


def settled(
    decision: Decision,
    measured: Mapping[Candidate, Candidate],
    *,
    tied: Sequence[Candidate] = (),
    rounds: ties.Rounds | None = None,
) -> Decision:
    """The decision among the measured candidates, with the details of the new choice, if any of them fits.

    `measured` maps each candidate to itself as measured. `tied` are the measured ones that the race could not
    distinguish from the fastest; the simplest of them is chosen. The other estimates are scaled by the median of
    measured over estimated: only their ranking is reliable.
    """
    ran = list(measured.values())
    fitting = [each for each in ran if each.fits]
    if not fitting:
        others = [each for each in decision.candidates if each not in measured]
        smallest = min((each for each in ran if each.source == "measured"), key=lambda each: each.peak_bytes)
        rest = choose([each for each in others if each.peak_bytes < smallest.peak_bytes])
        if rest is not None:
            decision = with_details_of(decision, rest)
        return replace(
            decision,
            choice=rest,
            smallest=None if rest else smallest,
            candidates=ranked(ran) + tuple(others),
            binding=None if rest is None else "The fastest by estimate: no measured candidate fits.",
        )
    leader = ties.fastest(fitting, rounds or {})
    choice, others, ran = ties.beside(ran, tied or [leader], rounds or {})
    entered = next(was for was, now in measured.items() if now == choice)
    measured = dict(zip(measured, ran, strict=True))
    scale = median(now.tokens_per_s / was.tokens_per_s for was, now in measured.items() if now.source == "measured")
    estimates = [
        replace(each, tokens_per_s=each.tokens_per_s * scale, step_time_s=each.step_time_s / scale)
        for each in decision.candidates
        if each not in measured
    ]
    candidates = ranked(ran) + ranked(estimates)
    return replace(
        with_details_of(decision, entered),
        choice=choice,
        candidates=candidates,
        binding=" ".join(filter(None, (ties.sentence(choice, others), why_not_faster(candidates, choice)))),
    )


def with_details_of(decision: Decision, candidate: Candidate) -> Decision:
    """The decision with the details of this candidate in place of the choice's, as far as they are known."""
    details = next((each for each in decision.details if each.of == candidate), None)
    if details is None:
        return decision if candidate == decision.choice else replace(decision, peak_words="", levers=(), additions=())
    return replace(
        decision,
        peak_words=details.peak_words,
        levers=details.levers,
        additions=details.additions,
        fallback=details.fallback,
    )


def _unmeasured_notices(planned: PlanResult) -> tuple[str, ...]:
    """The notices that hold only as long as nothing was measured."""
    target = planned.target
    return (target_notice(target, described(planned.machine, target)), *unconfirmed(target, is_here=True))


def _spec(candidate: Candidate, planned: PlanResult, store: Store) -> str:
    """The candidate's strategy; a searched plan is written to a file of its own."""
    if candidate.strategy != SEARCHED:
        return candidate.strategy
    path = store.folder / f"plan-batch-{candidate.batch_size}.json"
    document = plan_as_json(in_run_order(candidate.plan, planned.facts.layers_in_order))
    write_text(path, json.dumps(document, indent=1) + "\n")
    return f"plan:{path}"


def _job(planned: PlanResult, named: dict[Candidate, str]) -> ResolvedRun:
    settings = planned.settings
    cells = tuple(
        Cell(
            workload=Workload(
                model=settings.model,
                device=planned.machine.device,
                batch_size=candidate.batch_size,
                seq_len=planned.seq_len,
                precision=settings.precision,
                optim=settings.optim,
                attn_implementation=planned.facts.attn_implementation,
                lora_r=settings.lora_r,
                model_changes=model_changes.describe(settings.layers, settings.set),
            ),
            strategy=spec,
        )
        for candidate, spec in named.items()
    )
    files = {spec: Path(spec.removeprefix("plan:")) for spec in named.values() if spec.startswith("plan:")}
    confirmed: Settings = replace(
        settings,
        device=planned.machine.device,
        batch_size=tuple(dict.fromkeys(candidate.batch_size for candidate in named)),
        seq_len=(planned.seq_len,),
        strategies=tuple(dict.fromkeys(named.values())),
        warmup=1,
        steps=_STEPS,
        rounds=racing.MOST_ROUNDS,
        memory_limit=_allocator_limit(planned),
    )
    return ResolvedRun(
        settings=confirmed,
        cells=cells,
        plans={spec: candidate.plan for candidate, spec in named.items()},
        refusals={},
        plan_files={spec: path.read_text(encoding="utf-8") for spec, path in files.items()},
        least_steps=_STEPS,
        notices=(),
    )


def _allocator_limit(planned: PlanResult) -> int | None:
    """Bytes that the CUDA allocator may reserve, so that it frees cached blocks as it would on the planned device.

    Without the limit, a card with more memory than the planned device would cache more than fits there.
    """
    usable = planned.decision.usable_bytes
    return None if usable is None or planned.machine.device == "cpu" else usable - planned.decision.outside_bytes


def _race(
    recorder: Recorder,
    job: ResolvedRun,
    cells: Sequence[Cell],
    planned: PlanResult,
    *,
    children: Children,
    progress: Progress,
) -> tuple[int, Sequence[Cell]]:
    """Have the candidates take turns until the race is settled: (number of turns, cells not yet eliminated)."""
    running = cells

    def choose(alive: Sequence[Cell], took_s: Mapping[Cell, float]) -> Sequence[Cell]:
        nonlocal running
        rates = _rates([o for o in recorder.outcomes(cells) if o.failure is None and o.cell in running])
        able = [cell for cell in alive if cell in running]
        if any(cell not in rates for cell in able):
            return [cell for cell in able if cell not in rates]
        if not rates:
            return ()
        now = racing.state(rates)
        # Where memory has no room for all at a time, some have had no turn yet.
        running = [cell for cell in running if cell not in rates or cell in now.still_in]
        if now.is_settled:
            return ()
        return [cell for cell in able if cell in now.still_in and len(rates[cell]) < racing.MOST_ROUNDS]

    progress.begin(num_rounds=racing.MOST_ROUNDS)
    TurnTaking(
        recorder=recorder,
        children=children,
        progress=progress,
        make_task=Tasks(resolved=job, source=planned.source_or_raise, recorder=recorder).make,
        choose=choose,
        timeout_s=planned.settings.timeout,
    ).measure(cells)
    ended = recorder.outcomes(cells)
    return max(map(num_turns, ended)), [o.cell for o in ended if o.cell in running and o.failure is None]


def _rates(outcomes: Sequence[Outcome]) -> dict[Cell, list[float]]:
    """Sequences per second in each turn of the cells that have taken one.

    Seconds of processor time, as in the overheads of a run, where all turns have it; else those of the fastest step.
    """
    turns = {outcome.cell: found for outcome in outcomes if (found := stats.turns(outcome.rounds))}
    by_processor = all(stats.processor_step_s(turn) for each in turns.values() for turn in each)

    def seconds(turn: Turn) -> float:
        return (stats.processor_step_s(turn) if by_processor else None) or min(turn.step_times_s)

    return {cell: [cell.workload.batch_size / seconds(turn) for turn in each] for cell, each in turns.items()}


def _process_bytes(row: Row, decision: Decision) -> int | None:
    """Device memory of the process in bytes; without nvidia-smi, reserved memory plus the predicted rest."""
    if row.peak_process_bytes is not None or row.peak_reserved_bytes is None:
        return row.peak_process_bytes
    return row.peak_reserved_bytes + decision.outside_bytes


def _measured(report: Report, named: dict[Candidate, str], planned: PlanResult) -> list[Candidate]:
    """The candidates with their measurements; one that failed is marked as not fitting."""
    table = {(row.strategy, row.batch_size): row for row in rows(report)}
    usable = planned.decision.usable_bytes
    found = []
    for candidate, spec in named.items():
        row = table[spec, candidate.batch_size]
        nbytes = row.peak_allocated_bytes if planned.machine.device == "cpu" else _process_bytes(row, planned.decision)
        if row.status != "ok" or failed_proof(row) or not row.step_time_s or not row.tokens_per_s or nbytes is None:
            found.append(replace(candidate, fits=False))
            continue
        tokens = candidate.batch_size * planned.seq_len
        found.append(
            replace(
                candidate,
                plan=plan_of_row(spec, report.plan_files, planned.facts),
                peak_bytes=nbytes,
                allocated_bytes=row.peak_allocated_bytes or nbytes,
                fits=usable is None or nbytes <= usable,
                step_time_s=row.step_time_s,
                tokens_per_s=row.tokens_per_s,
                tokens_per_s_low=tokens / row.step_time_high_s if row.step_time_high_s else None,
                tokens_per_s_high=tokens / row.step_time_low_s if row.step_time_low_s else None,
                source="measured",
            )
        )
    return found
