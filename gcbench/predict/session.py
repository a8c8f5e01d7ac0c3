"""Runs one prediction: resolves target and model, has child processes predict the cells, prints the results."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from gcbench.core import headroom, snapshot_files
from gcbench.core.errors import GcbenchError, Interrupted, ThresholdBroken, UsageError
from gcbench.core.interruption import ignore_more
from gcbench.core.records import ERROR_KINDS, Failure, Machine, Outcome, Report
from gcbench.core.units import counted, format_bytes
from gcbench.devices.conditions import SLEEPING
from gcbench.devices.target import CPU, Target, TargetOptions, resolve_target
from gcbench.job import preflight
from gcbench.job.describe import describe
from gcbench.job.resolve import ResolvedRun, begin, described, resolve
from gcbench.job.settings import DEFAULT_STRATEGIES, Settings
from gcbench.models import flash_attention, sources
from gcbench.predict.task import CellToPredict, Predicted, PredictTask
from gcbench.processes import progress
from gcbench.processes.children import Children, ForkedChildren
from gcbench.processes.messages import Answer, raise_refusal
from gcbench.report import predictions as predicted
from gcbench.report.publish import publish, show, tell_snapshots
from gcbench.report.run_folder import Store

OnCell = Callable[[Report, int, int], object]

_MOST_CHILDREN = 4
_MEASUREMENT_SETTINGS = ("warmup", "steps", "rounds", "seed", "memory_limit")


def predict(
    settings: Settings,
    target_options: TargetOptions,
    *,
    out: Path | None,
    snapshot: Path | None,
    command: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Predict every cell, print it, and store it in `out` if there is one.

    Raises GcbenchError when a cell crashed or timed out, and ThresholdBroken when no cell fits.
    """
    early = resolve_target(target_options, None)  # reports an unknown name before anything heavy is imported
    source = preflight.model_of(settings)
    err = Console(stderr=True)
    with ExitStack() as stack:
        store = stack.enter_context(Store.create(out)) if out is not None else None
        done = 0
        try:
            with (
                ExitStack() as running,
                progress.choose(err, verb="predicting", noun="cells", quiet=quiet) as counter,
            ):
                children = [running.enter_context(ForkedChildren(defaults=SLEEPING)) for _ in range(num_children())]

                def keep(so_far: Report, answered: int, waiting: int) -> None:
                    nonlocal done
                    done = answered
                    counter.count(answered, waiting)
                    if store is not None and answered:
                        store.save(so_far)

                report = forecast(
                    settings,
                    target_options,
                    early,
                    source=source,
                    children=children,
                    command=command,
                    snapshot=snapshot,
                    on_cell=keep,
                )
            if store is not None:
                store.save(report)
                publish(report, store)
            folder = None if store is None else store.folder
            try:
                show(report, folder, explain=target_options.explain, as_json=as_json, quiet=quiet, err=err)
                if snapshot is not None and not quiet:
                    tell_snapshots(err, report, snapshot)
            finally:
                if store is not None:
                    store.close()
        except KeyboardInterrupt:
            ignore_more()
            raise Interrupted(_stored(store, done)) from None
    broken = [o for o in report.outcomes if o.failure and o.failure.kind in ERROR_KINDS]
    if broken:
        raise GcbenchError(
            f"{len(broken)} of {counted(len(report.outcomes), 'cell')} crashed or timed out; the table says why"
        )
    nothing = predicted.nothing_fits(report)
    if nothing is not None:
        raise ThresholdBroken(nothing)


def _stored(store: Store | None, done: int) -> str:
    """Return the message of an interruption: what was predicted and where it is."""
    if not done:
        return "interrupted before anything was predicted"
    cells = f"{done} {'cell was' if done == 1 else 'cells were'} predicted"
    if store is None:
        return f"interrupted; {cells}, and not stored, as there was no --out"
    folder = shlex.quote(str(store.folder))
    return f"interrupted; {cells} and stored in {store.folder}; show them with: gcbench report {folder}"


def num_children() -> int:
    """Return how many child processes to start; a prediction uses one core and less than 1 GiB."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, _MOST_CHILDREN)


def forecast(
    settings: Settings,
    target_options: TargetOptions,
    target: Target | None,
    *,
    source: sources.ModelSource,
    children: Sequence[Children],
    command: str,
    snapshot: Path | None = None,
    on_cell: OnCell = lambda so_far, answered, waiting: None,
) -> Report:
    """Predict all cells, shared out among `children`, and return the report.

    Args:
        target: None for the device of this machine.
        snapshot: the file for memory snapshots (`snapshot_files.files`).
        on_cell: is called before the first cell and after each, never concurrently, with the report so far, the number
            of predicted cells and the number of all cells.
    """
    here = target_options.device if target is None and target_options.device else "auto" if target is None else CPU
    _check_attention(settings, target)
    _check_snapshot(snapshot, target)
    machine, facts = describe(replace(settings, device=here), source, children[0], target=target)
    if target is None:
        target = resolve_target(target_options, machine)
        _check_attention(settings, target)
        _check_snapshot(snapshot, target)
    assert target is not None
    job = resolve(settings, facts, described(machine, target), target, model_notices=source.notices)
    if flash_attention.is_stood_in(settings.attn_implementation, target):
        job = replace(job, notices=(*job.notices, flash_attention.NOTICE))
    report = begin(job, described(machine, target), facts, command)
    used = {name: value for name, value in report.settings.items() if name not in _MEASUREMENT_SETTINGS}
    report = replace(report, source="predicted", settings=used | target_options.as_json())
    timed_here = machine if _is_here(target_options, target, machine) else None
    return _predicted(report, job, target_options, target, source, children, on_cell, snapshot, timed_here)


def _is_here(target_options: TargetOptions, target: Target, machine: Machine) -> bool:
    """Return whether the target is this machine's device, so that its operators can have been timed."""
    if target.kind == CPU:
        return True
    return resolve_target(target_options, None) is None and machine.emulated is None


def _check_attention(settings: Settings, target: Target | None) -> None:
    flash_attention.check(
        settings.attn_implementation,
        target,
        precision=settings.precision,
        specs=settings.strategies or DEFAULT_STRATEGIES,
    )


def _check_snapshot(snapshot: Path | None, target: Target | None) -> None:
    """Raise UsageError for a memory snapshot of a device without CUDA's caching allocator."""
    if snapshot is not None and target is not None and target.kind == CPU:
        raise UsageError(
            "--snapshot shows the memory of a CUDA card, and the device is a CPU; name a card with --device (gcbench "
            "devices lists them)"
        )


def _predicted(
    report: Report,
    job: ResolvedRun,
    target_options: TargetOptions,
    target: Target,
    source: sources.ModelSource,
    children: Sequence[Children],
    on_cell: OnCell,
    snapshot: Path | None,
    here: Machine | None,
) -> Report:
    """Return the report with every cell predicted, shared out among `children`."""
    outcomes = list(report.outcomes)
    waiting = [number for number, outcome in enumerate(outcomes) if outcome.failure is None]
    answered = 0
    paths = {} if snapshot is None else snapshot_files.files(snapshot, [outcome.cell for outcome in outcomes])
    reserve_frac = (
        headroom.RESERVE_FRAC[target.kind] if target_options.reserve_frac is None else target_options.reserve_frac
    )
    one_at_a_time = threading.Lock()
    halted = threading.Event()
    on_cell(report, answered, len(waiting))

    def note(number: int, event: Predicted) -> None:
        nonlocal answered
        with one_at_a_time:
            if halted.is_set():
                return
            outcomes[number] = _outcome(outcomes[number], event, reserve_frac)
            answered += 1
            on_cell(replace(report, outcomes=tuple(outcomes)), answered, len(waiting))

    def work(own: Children, numbers: Sequence[int]) -> None:
        cells = [_cell(number, outcomes[number], job, paths.get(outcomes[number].cell)) for number in numbers]
        task = partial(_task, job, target_options, target, source, here)
        _answer(own, cells, task, note, timeout_s=job.settings.timeout, halted=halted)

    shares = _shares(waiting, outcomes, len(children))
    with ThreadPoolExecutor(len(children)) as pool:
        works = [pool.submit(work, own, share) for own, share in zip(children, shares, strict=True) if share]
        try:
            for done in works:
                done.result()
        except BaseException:  # an interruption must not wait for the other children
            halted.set()
            for own in children:
                own.halt()
            raise
    return replace(report, outcomes=tuple(outcomes))


def _shares(waiting: Sequence[int], outcomes: Sequence[Outcome], count: int) -> list[list[int]]:
    """Share out cells: whole workloads where there are enough, because their cells share the most work."""
    workloads = list(dict.fromkeys(outcomes[number].cell.workload for number in waiting))
    shares: list[list[int]] = [[] for _ in range(count)]
    for position, number in enumerate(waiting):
        turn = workloads.index(outcomes[number].cell.workload) if len(workloads) >= count else position
        shares[turn % count].append(number)
    return shares


def _answer(
    children: Children,
    cells: Sequence[CellToPredict],
    task: Callable[[Sequence[CellToPredict]], PredictTask],
    note: Callable[[int, Predicted], None],
    *,
    timeout_s: float | None,
    halted: threading.Event,
) -> None:
    """Have a child predict the cells; a cell that crashes the child costs one row, and another child continues."""
    waiting = {cell.number: cell for cell in cells}

    def on_event(event: object) -> None:
        if isinstance(event, Predicted):
            del waiting[event.number]
            note(event.number, event)

    while waiting and not halted.is_set():
        answer = children.run(task(tuple(waiting.values())), on_event=on_event, timeout_s=timeout_s)
        raise_refusal(Answer(refusal=answer.refusal))
        if waiting and not halted.is_set():  # the child ended at the first of the waiting cells
            number = next(iter(waiting))
            del waiting[number]
            failure = answer.failure or Failure(kind="crash", message="the child process returned no prediction")
            note(number, Predicted(number=number, failure=failure))


def _cell(number: int, outcome: Outcome, job: ResolvedRun, snapshot: Path | None) -> CellToPredict:
    workload = outcome.cell.workload
    return CellToPredict(
        number=number,
        batch_size=workload.batch_size,
        seq_len=workload.seq_len,
        plan=job.plans[outcome.cell.strategy],
        snapshot=None if snapshot is None else str(snapshot),
    )


def _task(
    job: ResolvedRun,
    target_options: TargetOptions,
    target: Target,
    source: sources.ModelSource,
    here: Machine | None,
    cells: Sequence[CellToPredict],
) -> PredictTask:
    settings = job.settings
    return PredictTask(
        source=source,
        layers=settings.layers,
        overrides=settings.set or {},
        attn_implementation=settings.attn_implementation,
        lora=settings.lora,
        precision=settings.precision,
        optim=settings.optim,
        target=target,
        cells=tuple(cells),
        explain=target_options.explain,
        exact=target_options.exact,
        pretrained=settings.pretrained,
        here=here,
    )


def _outcome(outcome: Outcome, event: Predicted, reserve_frac: float) -> Outcome:
    if event.prediction is None:
        return replace(outcome, prediction=None, failure=event.failure)
    prediction, failure = replace(event.prediction, reserve_frac=reserve_frac), event.failure
    needed, usable = prediction.needed_bytes, prediction.usable_bytes
    if usable is not None and needed > usable:
        available = headroom.held_back(prediction.limit_bytes or 0, reserve_frac)
        failure = Failure(kind="oom", message=f"needs {format_bytes(needed)}, and there are {available}")
    return replace(outcome, prediction=prediction, failure=failure)
