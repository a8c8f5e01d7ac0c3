"""Measures the cells of a run from the parent process: workload by workload, in child processes that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gcbench.core import snapshot_files
from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.records import Cell, Machine, ModelFacts, Report, Workload
from gcbench.devices.target import CPU
from gcbench.job.describe import describe
from gcbench.job.resolve import LEAST_TIMED_S, ResolvedRun, begin, resolve
from gcbench.job.settings import Settings, as_json
from gcbench.measure.goal import Goal
from gcbench.measure.progress import Progress
from gcbench.measure.recorder import Recorder, reference_cell
from gcbench.measure.side_by_side import IN_ROUNDS as IN_ROUNDS
from gcbench.measure.side_by_side import TurnTaking
from gcbench.measure.task import MeasureTask
from gcbench.models.sources import ModelSource
from gcbench.processes.children import Children
from gcbench.report.rows import needs_repeat
from gcbench.report.run_folder import Store
from gcbench.strategies import OFF

PROCESS_UNREAD = (
    "Memory of the process outside the allocator was not measured: neither nvidia-smi nor nvidia-ml-py reports the "
    "card's used memory; for that column, put nvidia-smi on PATH or pip install nvidia-ml-py."
)


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
    started_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Measure what `previous` lacks, and save the report in `store` after each turn of a cell.

    Raises UsageError or UnavailableError before anything is measured; afterwards a failure becomes a row.

    Args:
        snapshot: the file for memory snapshots (`snapshot_files.files`).
        started_s: when the command started, on `clock`, from which the first batch size's time counts.
    """
    machine, facts = describe(settings, source, children)
    if snapshot is not None and machine.device == CPU:
        raise UnavailableError(
            "--snapshot needs a CUDA device, whose allocator PyTorch can record; use --device cuda, --emulate CARD, or "
            "gcbench predict with --snapshot for a card that is not here"
        )
    resolved = resolve(settings, facts, machine, model_notices=source.notices)
    report = _continue(previous, resolved, machine, facts) if previous else begin(resolved, machine, facts, command)
    recorder = Recorder(report, store)
    tasks = Tasks(resolved=resolved, source=source, recorder=recorder)
    if snapshot is not None:
        tasks.snapshots = snapshot_files.files(snapshot, resolved.cells)
    started_s = clock() if started_s is None else started_s
    for cells in _by_workload(resolved.cells):
        able = [cell for cell in cells if recorder.outcome(cell).failure is None]
        _measure_workload(_off_first(able), tasks, children, progress, deadline_from_s=started_s, clock=clock)
        started_s = clock()
    _repeat_off(recorder, tasks, children)
    if not _is_process_memory_read(recorder.report):
        recorder.add_notice(PROCESS_UNREAD)
    return recorder.report


def _measure_workload(
    cells: Sequence[Cell],
    tasks: Tasks,
    children: Children,
    progress: Progress,
    *,
    deadline_from_s: float,
    clock: Callable[[], float],
) -> None:
    """Measure the cells of one workload, as long as the settings want; `deadline_from_s` is when its time began."""
    settings, recorder = tasks.resolved.settings, tasks.recorder
    is_adaptive = settings.rounds is None
    limit_s = settings.max_time if is_adaptive else None
    goal = Goal(
        recorder=recorder,
        rounds=settings.rounds,
        target_frac=None if settings.target_interval is None else settings.target_interval / 100,
        deadline_s=None if limit_s is None else deadline_from_s + limit_s,
        num_cells=len(cells),
        clock=clock,
    )
    taking = TurnTaking(
        recorder=recorder,
        children=children,
        progress=progress,
        make_task=tasks.make,
        choose=goal.choose,
        timeout_s=settings.timeout,
        clock=clock,
    )
    if tasks.resolved.is_emulated:
        todo = [cell for cell in cells if not recorder.outcome(cell).rounds]
        if todo:
            progress.begin(num_rounds=1)
        for cell in todo:
            taking.round_alone(cell, None)
        return
    wanted = goal.wanted(cells)
    if not wanted:
        return
    progress.begin(num_rounds=settings.rounds, limit_s=limit_s)
    todo = [cell for cell in cells if cell in wanted or cell.strategy == OFF]
    goal.num_cells = len(todo)
    taking.measure(todo)


@dataclass(kw_only=True)
class Tasks:
    """Makes the tasks of a run.

    Attributes:
        snapshots: the file for each cell's memory snapshot, of the process that measures its memory.
    """

    resolved: ResolvedRun
    source: ModelSource
    recorder: Recorder
    snapshots: Mapping[Cell, Path] = field(default_factory=dict)

    def make(self, cell: Cell, number: int, turn: int | None) -> MeasureTask:
        """Make the task of the cell's process of this number, which takes one turn, or each that it is told to."""
        with_memory = not self.recorder.has_memory(cell)
        return replace(
            task_for(self.resolved, self.source, cell, number, turn=turn, with_memory=with_memory),
            snapshot=str(self.snapshots[cell]) if with_memory and cell in self.snapshots else None,
        )


def _is_process_memory_read(report: Report) -> bool:
    """Return whether the memory of the process is known wherever it should be: of cells that a card measured."""
    peaks = [result.memory for outcome in report.outcomes for result in outcome.rounds if result.memory]
    return (
        report.source != "measured"
        or report.machine.device == CPU
        or not peaks
        or any(peak.process_bytes is not None for peak in peaks)
    )


def _continue(previous: Report, resolved: ResolvedRun, machine: Machine, facts: ModelFacts) -> Report:
    """Return the stored report; raises UsageError where its rounds cannot be compared with those measured now."""
    now = as_json(resolved.settings)
    # None of them changes what one turn measures: more turns are added to the stored ones.
    free = {"timeout", "rounds", "target_interval", "max_time"}
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


def _by_workload(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Group cells by workload, in the order of their first appearance."""
    groups: dict[Workload, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.workload, []).append(cell)
    return list(groups.values())


def _off_first(cells: Iterable[Cell]) -> list[Cell]:
    """Put `off` first, as the other gradients are compared with its own; the rest in the order of the tables."""
    return sorted(cells, key=lambda cell: cell.strategy != OFF)


def task_for(
    resolved: ResolvedRun, source: ModelSource, cell: Cell, number: int, *, turn: int | None, with_memory: bool
) -> MeasureTask:
    """Make the task of the process of this number of a cell."""
    settings = resolved.settings
    assert settings.warmup is not None
    device_type = cell.workload.device.partition(":")[0]
    return MeasureTask(
        cell=cell,
        round=number,
        source=source,
        layers=settings.layers,
        overrides=settings.set or {},
        attn_implementation=settings.attn_implementation,
        plan=resolved.plans[cell.strategy],
        seed=settings.seed,
        # Without the step that measures memory, one more, so that the process gets no more memory in timed steps.
        warmup=settings.warmup + (not with_memory),
        steps=settings.steps or resolved.least_steps,
        least_timed_s=0.0 if settings.steps or resolved.is_emulated else LEAST_TIMED_S[device_type],
        with_memory=with_memory,
        turn=turn,
        memory_limit_bytes=settings.memory_limit,
        lora=settings.lora,
    )


def _repeat_off(recorder: Recorder, tasks: Tasks, children: Children) -> None:
    """Measure the noise of `off` by one more run, where a verdict depends on it and only one process of `off` ran."""
    for outcome in recorder.report.outcomes:
        off = next((o for o in recorder.report.outcomes if o.cell == reference_cell(outcome.cell.workload)), None)
        if off is None or not off.rounds or not needs_repeat(outcome, off):
            continue
        task = replace(
            task_for(tasks.resolved, tasks.source, off.cell, recorder.next_round(off.cell), turn=0, with_memory=False),
            warmup=1,
            steps=0,
            least_timed_s=0.0,
        )
        answer = children.run(task, on_event=lambda event: None, timeout_s=tasks.resolved.settings.timeout)
        if answer.result is None or answer.fingerprint is None:
            continue  # the verdict without the noise remains
        repeated = recorder.compared(answer.result, answer.fingerprint, off.cell)
        if repeated.grad_rel_diff is not None:
            recorder.put(replace(off, repeat_rel_diffs=(repeated.grad_rel_diff,)))
