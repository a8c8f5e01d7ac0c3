"""Schedules the rounds of all cells in the parent process, runs each in a child, and saves the report after each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from gcbench.core import snapshot_files
from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.gradient_fingerprint import Fingerprint, difference
from gcbench.core.json_codec import decode, encode
from gcbench.core.records import Cell, Failure, Machine, ModelFacts, Outcome, Report, RoundResult, Workload
from gcbench.devices.target import CPU
from gcbench.job.describe import describe
from gcbench.job.resolve import LEAST_TIMED_S, ResolvedRun, begin, resolve
from gcbench.job.settings import Settings, as_json
from gcbench.measure.task import MeasureTask
from gcbench.models.sources import ModelSource
from gcbench.processes.children import Children
from gcbench.processes.messages import Event
from gcbench.report.rows import needs_repeat
from gcbench.report.run_folder import Store
from gcbench.strategies import OFF

PROCESS_UNREAD = (
    "Memory of the process outside the allocator was not measured: neither nvidia-smi nor nvidia-ml-py reports the "
    "card's used memory; for that column, put nvidia-smi on PATH or pip install nvidia-ml-py."
)


class Progress(Protocol):
    """Shows the progress of a run."""

    def begin(self, *, num_steps: int, num_rounds: int) -> None: ...

    def enter(self, cell: Cell, *, round: int, num_steps: int) -> None: ...

    def step(self, event: Event) -> None: ...

    def leave(self, outcome: Outcome) -> None: ...

    def skip(self, *, num_steps: int) -> None: ...


def run(
    settings: Settings,
    *,
    source: ModelSource,
    children: Children,
    store: Store,
    progress: Progress,
    command: str,
    previous: Report | None = None,
    snapshot: Path | None = None,
) -> Report:
    """Measure every round of every cell that `previous` lacks, and save the report in `store` after each of them.

    Raises UsageError or UnavailableError before anything is measured; afterwards a failure becomes a row.

    `snapshot` is the file for memory snapshots (`snapshot_files.files`).
    """
    machine, facts = describe(settings, source, children)
    if snapshot is not None and machine.device == CPU:
        raise UnavailableError(
            "--snapshot needs a CUDA device, whose allocator PyTorch can record; use --device cuda, --emulate CARD, or "
            "gcbench predict with --snapshot for a card that is not here"
        )
    resolved = resolve(settings, facts, machine, model_notices=source.notices)
    report = _continue(previous, resolved, machine, facts) if previous else begin(resolved, machine, facts, command)
    store.save(report)
    schedule = [(cell, number) for number in range(resolved.settings.rounds) for cell in _off_first(resolved.cells)]
    todo = [(cell, number) for cell, number in schedule if not _is_done(report, cell, number)]
    tasks = [task_for(resolved, source, cell, number) for cell, number in todo]
    if snapshot is not None:
        files = snapshot_files.files(snapshot, resolved.cells)
        tasks = [replace(task, snapshot=str(files[task.cell])) if task.with_memory else task for task in tasks]
    progress.begin(num_steps=sum(task.num_steps for task in tasks), num_rounds=resolved.settings.rounds)
    for task in tasks:
        if _is_done(report, task.cell, task.round):  # it failed in an earlier round
            progress.skip(num_steps=task.num_steps)
            continue
        progress.enter(task.cell, round=task.round, num_steps=task.num_steps)
        report = measure_round(report, task, resolved, children, store, progress)
        progress.leave(_outcome(report, task.cell))
    return _without_process_memory(_repeat_off(report, resolved, source, children, store), store)


def _without_process_memory(report: Report, store: Store) -> Report:
    """Return the report, saved with a notice where the memory of the process on a card could not be read."""
    peaks = [result.memory for outcome in report.outcomes for result in outcome.rounds if result.memory]
    is_read = (
        report.source != "measured"
        or report.machine.device == "cpu"
        or not peaks
        or any(peak.process_bytes is not None for peak in peaks)
    )
    if is_read or PROCESS_UNREAD in report.notices:
        return report
    report = replace(report, notices=(*report.notices, PROCESS_UNREAD))
    store.save(report)
    return report


def _continue(previous: Report, resolved: ResolvedRun, machine: Machine, facts: ModelFacts) -> Report:
    """Return the stored report; raises UsageError where its rounds cannot be compared with those measured now."""
    now = as_json(resolved.settings)
    # Neither changes what one round measures: more rounds are added to the stored ones.
    free = {"timeout", "rounds"}
    changed = sorted(k for k in now | previous.settings if k not in free and now.get(k) != previous.settings.get(k))
    if changed:
        changes = ", ".join(f"{key} {previous.settings.get(key)!r} is now {now.get(key)!r}" for key in changed)
        raise UsageError(f"--resume continues the stored run, and its settings differ: {changes}; take a new --out")
    if previous.source != resolved.source:
        raise UsageError(
            f"--resume continues the stored run, which is {previous.source}, and this one would be {resolved.source}; "
            "take a new --out"
        )
    libraries = ("torch", "transformers", *(["peft"] if resolved.settings.lora else []))
    for what, before, after in (
        ("device", previous.machine.device_name, machine.device_name),
        *((name, previous.machine.versions.get(name), machine.versions.get(name)) for name in libraries),
    ):
        if before != after:
            raise UsageError(
                f"--resume needs the {what} of the stored run: that was {before} and this is {after}; take a new --out"
            )
    if previous.model.num_trainable_params is None:  # stored by a version that did not count them
        facts = replace(facts, num_trainable_params=None)
    if resolved.plan_files != previous.plan_files:
        raise UsageError("--resume needs the plan files of the stored run, and one has changed since; take a new --out")
    if facts != previous.model:
        raise UsageError(
            f"--resume needs the model of the stored run, and {facts.model} differs from it: its config or "
            "transformers' code for it has changed; take a new --out"
        )
    return replace(previous, settings=now, model_notices=resolved.model_notices)


def _off_first(cells: Iterable[Cell]) -> list[Cell]:
    """Put `off` first, as the other gradients are compared with its own; the rest in the order of the tables."""
    return sorted(cells, key=lambda cell: cell.strategy != OFF)


def _outcome(report: Report, cell: Cell) -> Outcome:
    return next(outcome for outcome in report.outcomes if outcome.cell == cell)


def _is_done(report: Report, cell: Cell, number: int) -> bool:
    outcome = _outcome(report, cell)
    return outcome.failure is not None or any(result.round == number for result in outcome.rounds)


def task_for(resolved: ResolvedRun, source: ModelSource, cell: Cell, number: int) -> MeasureTask:
    """Make the task that measures one round of one cell."""
    settings = resolved.settings
    assert settings.warmup is not None
    return MeasureTask(
        cell=cell,
        round=number,
        source=source,
        layers=settings.layers,
        overrides=settings.set or {},
        attn_implementation=settings.attn_implementation,
        plan=resolved.plans[cell.strategy],
        seed=settings.seed,
        warmup=settings.warmup,
        steps=settings.steps or resolved.least_steps,
        least_timed_s=0.0 if settings.steps or resolved.is_emulated else LEAST_TIMED_S,
        with_memory=number == 0,
        memory_limit_bytes=settings.memory_limit,
        lora=settings.lora,
    )


def measure_round(
    report: Report, task: MeasureTask, resolved: ResolvedRun, children: Children, store: Store, progress: Progress
) -> Report:
    """Measure one round, and return the report with its result or failure, saved in `store`."""
    start = time.monotonic()
    answer = children.run(task, on_event=progress.step, timeout_s=resolved.settings.timeout)
    outcome = _outcome(report, task.cell)
    if answer.result is None or (answer.fingerprint is None and not resolved.is_emulated):
        why = answer.refusal.message if answer.refusal else "the child gave no result"
        outcome = replace(outcome, failure=answer.failure or Failure(kind="crash", message=why))
    else:
        result = replace(answer.result, wall_s=time.monotonic() - start)
        if answer.fingerprint is not None:
            store.save_gradients(task.cell, task.round, json.dumps(encode(answer.fingerprint)))
            result = _compared(result, answer.fingerprint, task.cell, store)
        outcome = replace(outcome, rounds=(*outcome.rounds, result))
    outcomes = tuple(outcome if o.cell == task.cell else o for o in report.outcomes)
    report = replace(report, outcomes=outcomes)
    store.save(report)
    return report


def _repeat_off(report: Report, resolved: ResolvedRun, source: ModelSource, children: Children, store: Store) -> Report:
    """Measure the noise of `off` by one more run, where a verdict depends on it and only one round of `off` exists."""
    for outcome in report.outcomes:
        off = next((o for o in report.outcomes if o.cell == _reference_cell(outcome.cell.workload)), None)
        if off is None or not off.rounds or not needs_repeat(outcome, off):
            continue
        task = replace(task_for(resolved, source, off.cell, 1), warmup=1, steps=0, least_timed_s=0.0, with_memory=False)
        answer = children.run(task, on_event=lambda event: None, timeout_s=resolved.settings.timeout)
        if answer.result is None or answer.fingerprint is None:
            continue  # the verdict without the noise remains
        repeated = _compared(answer.result, answer.fingerprint, off.cell, store)
        if repeated.grad_rel_diff is not None:
            with_noise = replace(off, repeat_rel_diffs=(repeated.grad_rel_diff,))
            report = replace(report, outcomes=tuple(with_noise if o.cell == off.cell else o for o in report.outcomes))
            store.save(report)
    return report


def _compared(result: RoundResult, fingerprint: Fingerprint, cell: Cell, store: Store) -> RoundResult:
    """Add to a result the difference of its gradients from those of `off` in round 0."""
    stored = store.load_gradients(_reference_cell(cell.workload), 0)
    if stored is None or result.draws_other_dropout:
        return result
    found = difference(fingerprint, decode(Fingerprint, json.loads(stored)))
    return replace(result, grad_rel_diff=found.relative, grad_worst_param=found.worst)


def _reference_cell(workload: Workload) -> Cell:
    return Cell(workload=workload, strategy=OFF)
