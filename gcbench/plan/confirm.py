"""`gcbench plan --measure`: the few settings that could be the best are run in rounds until one of them has won."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from gcbench.core import model_changes
from gcbench.core.errors import GcbenchError
from gcbench.core.files import write_text
from gcbench.core.records import Cell, Outcome, Report, Row, Workload
from gcbench.core.units import counted
from gcbench.job.resolve import ResolvedRun, begin, described, target_notice
from gcbench.job.settings import Settings
from gcbench.measure import runner
from gcbench.measure.runner import Progress
from gcbench.plan import racing, told_apart
from gcbench.plan.decision import FOUND, Candidate, Decision, choose, ranked, why_not_faster
from gcbench.plan.from_run import plan_of_row
from gcbench.plan.named import in_run_order, unconfirmed
from gcbench.plan.planned import PlanResult
from gcbench.processes.children import Children
from gcbench.report.rows import failed_proof, rows, unproven
from gcbench.report.run_folder import Store
from gcbench.strategies.plan_file import as_json as plan_as_json

_STEPS = 2
"""Timed steps of a contender in a round."""


def confirm(planned: PlanResult, *, children: Children, store: Store, progress: Progress) -> PlanResult:
    """The plan with its best candidates measured, and the choice among them; the run is kept in `store`."""
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
        report = _with_cells_of(report, begin(job, planned.machine, planned.facts, planned.command))
        store.save(report)
        cells = job.cells[-len(entered) :]
        report, rounds_now, still_in = _race(
            report, job, cells, planned, children=children, store=store, progress=progress
        )
        num_rounds = max(num_rounds, rounds_now)
        measured = _measured(report, named, planned)
        if any(each.fits for each in measured):
            break
        # What should have fitted did not, so those come next that are expected to be slower.
        entered = racing.contenders([each for each in decision.candidates if each not in named])
    assert report is not None
    if not any(each.source == "measured" for each in measured):
        raise GcbenchError(f"none of {counted(len(named), 'setting')} that ran can be used; {store.folder} says why")
    before = _before(planned)
    steps = sum(result.num_steps for outcome in report.outcomes for result in outcome.rounds)
    rounds = {now: _outcome_of(report, named[was], was).rounds for was, now in zip(named, measured, strict=True)}
    alike = [
        now
        for was, now in zip(named, measured, strict=True)
        if now.fits and _outcome_of(report, named[was], was).cell in still_in
    ]
    decided = replace(
        settled(decision, dict(zip(named, measured, strict=True)), alike=alike, rounds=rounds),
        times_from=f"measurements of {counted(len(named), 'setting')} in up to {counted(num_rounds, 'round')}",
        notices=(
            *(notice for notice in decision.notices if notice not in before),
            f"Measured: {counted(len(named), 'setting')} that could be the best, {counted(steps, 'training step')}; "
            "what was not run is an estimate, in the scale of what was.",
            *unproven(rows(report)),
        ),
    )
    return replace(planned, decision=decided)


def _with_cells_of(report: Report | None, begun: Report) -> Report:
    """A report of more cells, with what was measured so far."""
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
    alike: Sequence[Candidate] = (),
    rounds: told_apart.Rounds | None = None,
) -> Decision:
    """The decision among those that were run; what is said is of the new choice, if anything fits.

    `alike` are those that were still in when the race ended: which of them is faster was not shown, and the simplest is
    taken. Estimates of the others are changed by what those that were run took against theirs: ranking is what is right
    about them.
    """
    ran = list(measured.values())
    fitting = [each for each in ran if each.fits]
    if not fitting:
        others = [each for each in decision.candidates if each not in measured]
        smallest = min((each for each in ran if each.source == "measured"), key=lambda each: each.peak_bytes)
        rest = choose([each for each in others if each.peak_bytes < smallest.peak_bytes])
        if rest is not None:
            decision = _of(decision, rest)
        return replace(
            decision,
            choice=rest,
            smallest=None if rest else smallest,
            candidates=ranked(ran) + tuple(others),
            binding=None if rest is None else "the fastest by estimate of those that fit: no setting that ran did",
        )
    leader = choose(ran)
    assert leader is not None
    choice, others, ran = told_apart.beside(ran, alike or [leader], rounds or {})
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
        _of(decision, entered),
        choice=choice,
        candidates=candidates,
        binding=" ".join(filter(None, (told_apart.sentence(choice, others), why_not_faster(candidates, choice)))),
    )


def _of(decision: Decision, candidate: Candidate) -> Decision:
    """What is said of the choice, said of another candidate as far as that is known."""
    told = next((told for told in decision.details if told.of == candidate), None)
    if told is None:
        return decision if candidate == decision.choice else replace(decision, peak_words="", levers=(), additions=())
    return replace(
        decision, peak_words=told.peak_words, levers=told.levers, additions=told.additions, fallback=told.fallback
    )


def _before(planned: PlanResult) -> tuple[str, ...]:
    """What was said as long as nothing had been run."""
    target = planned.target
    return (target_notice(target, described(planned.machine, target)), *unconfirmed(target, is_here=True))


def _spec(candidate: Candidate, planned: PlanResult, store: Store) -> str:
    """The candidate's strategy; a found plan gets a file of its own."""
    if candidate.strategy != FOUND:
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
    wanted: Settings = replace(
        settings,
        device=planned.machine.device,
        batch_size=tuple(dict.fromkeys(candidate.batch_size for candidate in named)),
        seq_len=(planned.seq_len,),
        strategies=tuple(dict.fromkeys(named.values())),
        warmup=1,
        steps=_STEPS,
        rounds=racing.MOST_ROUNDS,
        memory_limit=_room(planned),
    )
    return ResolvedRun(
        settings=wanted,
        cells=cells,
        plans={spec: candidate.plan for candidate, spec in named.items()},
        refusals={},
        plan_files={spec: path.read_text(encoding="utf-8") for spec, path in files.items()},
        least_steps=_STEPS,
        notices=(),
    )


def _room(planned: PlanResult) -> int | None:
    """What the allocator of a card may take, so that it gives back what it keeps where a smaller device would run out.

    Without a limit, a card with room to spare holds more than the device that was asked about would ever be asked for.
    """
    usable = planned.decision.usable_bytes
    return None if usable is None or planned.machine.device == "cpu" else usable - planned.decision.outside_bytes


def _race(
    report: Report,
    job: ResolvedRun,
    cells: Sequence[Cell],
    planned: PlanResult,
    *,
    children: Children,
    store: Store,
    progress: Progress,
) -> tuple[Report, int, Sequence[Cell]]:
    """Rounds of those that are still in, how many there were, and who was in at the end."""
    running = cells
    progress.begin(num_steps=len(running) * racing.MOST_ROUNDS * (_STEPS + 2), num_rounds=racing.MOST_ROUNDS)
    for number in range(racing.MOST_ROUNDS):
        for cell in running:
            task = runner.task_for(job, planned.source_or_raise, cell, number)
            progress.enter(cell, round=number, num_steps=task.num_steps)
            report = runner.measure_round(report, task, job, children, store, progress)
            progress.leave(next(outcome for outcome in report.outcomes if outcome.cell == cell))
        rates = {
            outcome.cell: [1 / min(result.step_times_s) * outcome.cell.workload.batch_size for result in outcome.rounds]
            for outcome in report.outcomes
            if outcome.failure is None and outcome.cell in running
        }
        if not rates:
            return report, number + 1, ()
        now = racing.standing(rates)
        running = [cell for cell in running if cell in now.still_in]
        if now.is_settled:
            return report, number + 1, running
    return report, racing.MOST_ROUNDS, running


def _held_of_card(row: Row, decision: Decision) -> int | None:
    """What the process held of the card; without nvidia-smi, what the allocator held and the predicted rest."""
    if row.peak_process_bytes is not None or row.peak_reserved_bytes is None:
        return row.peak_process_bytes
    return row.peak_reserved_bytes + decision.outside_bytes


def _measured(report: Report, named: dict[Candidate, str], planned: PlanResult) -> list[Candidate]:
    """The contenders with what was measured of them; one that failed does not fit."""
    table = {(row.strategy, row.batch_size): row for row in rows(report)}
    usable = planned.decision.usable_bytes
    found = []
    for candidate, spec in named.items():
        row = table[spec, candidate.batch_size]
        held = row.peak_allocated_bytes if planned.machine.device == "cpu" else _held_of_card(row, planned.decision)
        if row.status != "ok" or failed_proof(row) or not row.step_time_s or not row.tokens_per_s or held is None:
            found.append(replace(candidate, fits=False))
            continue
        tokens = candidate.batch_size * planned.seq_len
        found.append(
            replace(
                candidate,
                plan=plan_of_row(spec, report.plan_files, planned.facts),
                peak_bytes=held,
                allocated_bytes=row.peak_allocated_bytes or held,
                fits=usable is None or held <= usable,
                step_time_s=row.step_time_s,
                tokens_per_s=row.tokens_per_s,
                tokens_per_s_low=tokens / row.step_time_high_s if row.step_time_high_s else None,
                tokens_per_s_high=tokens / row.step_time_low_s if row.step_time_low_s else None,
                source="measured",
            )
        )
    return found
