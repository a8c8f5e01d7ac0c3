"""Runs a measurement from its settings to its output: find the model, measure the cells, publish the results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from gcbench.core.errors import GcbenchError, Interrupted, ThresholdBroken
from gcbench.core.interruption import ignore_more
from gcbench.core.records import ERROR_KINDS, Report
from gcbench.core.units import counted, format_bytes
from gcbench.devices import cards
from gcbench.devices.conditions import SLEEPING
from gcbench.emulate import environment
from gcbench.job import preflight
from gcbench.job.settings import Settings
from gcbench.measure import progress, runner
from gcbench.models import sources
from gcbench.processes.children import ForkedChildren
from gcbench.report import report_file as reports
from gcbench.report.publish import publish, show, tell_snapshots
from gcbench.report.run_folder import Store


def measure(
    settings: Settings,
    *,
    out: Path | None,
    previous: Report | None,
    snapshot: Path | None,
    command: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure what `previous` lacks, store it in the run folder and show it.

    Raises GcbenchError at the end when a cell crashed, timed out or was killed, or when results could not be written.
    """
    started_s = time.monotonic()
    source = preflight.model_of(settings, pretrained=settings.pretrained)
    card = None if settings.emulate is None else cards.find_to_emulate(settings.emulate)
    # Built before a folder is made: where a card cannot be emulated here, nothing is left behind.
    added = None if card is None else environment.environment(card)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if previous is not None and out is not None:
        store = Store.reopen(out)
    else:
        store = Store.create(out, can_resume=True) if out else Store.new(sources.slug(settings.model), now)
    err = Console(stderr=True)
    with store, _stored_when_interrupted(store):
        if previous is not None:
            previous = reports.reopen(store.folder)  # again, now that it is locked
        with (
            ForkedChildren(
                preload=("gcbench.measure.worker", *sources.modules(source)), environment=added, defaults=SLEEPING
            ) as children,
            progress.choose(err, quiet=quiet, verb="measuring" if card is None else "emulating") as display,
        ):
            report = runner.run(
                settings,
                source=source,
                children=children,
                store=store,
                progress=display,
                command=command,
                previous=previous,
                snapshot=snapshot,
                started_s=started_s,
            )
        publish(report, store)
        try:
            show(report, store.folder, as_json=as_json, quiet=quiet, err=err)
            if snapshot is not None and not quiet:
                tell_snapshots(err, report, snapshot)
        finally:
            store.close()
    broken = [outcome for outcome in report.outcomes if outcome.failure and outcome.failure.kind in ERROR_KINDS]
    if broken:
        raise GcbenchError(
            f"{len(broken)} of {counted(len(report.outcomes), 'cell')} crashed, timed out or were killed; "
            f"the reasons are in the table and in {store.folder / reports.REPORT_NAME}"
        )
    if report.outcomes and all(outcome.failure and outcome.failure.kind == "oom" for outcome in report.outcomes):
        limit = settings.memory_limit or report.machine.device_memory_bytes
        memory = f" into {format_bytes(limit)}" if limit is not None else ""
        raise ThresholdBroken(
            f"nothing fits{memory}: every cell ran out of memory; take a smaller batch, a shorter sequence, a leaner "
            "optimizer or a larger device (gcbench plan searches for a plan that fits)"
        )


@contextmanager
def _stored_when_interrupted(store: Store) -> Iterator[None]:
    """Turn KeyboardInterrupt into Interrupted, with all measured rounds stored."""
    try:
        yield
    except KeyboardInterrupt:
        ignore_more()  # a second one must not cut the last save short
        raise Interrupted(_interrupted(store)) from None


def _interrupted(store: Store) -> str:
    """The message after an interruption: what is stored, and how to resume."""
    try:
        report = reports.load(store.folder)
    except GcbenchError:
        return "interrupted before anything was measured"
    publish(report, store, plots=False)
    finish = f"finish with: gcbench run --resume --out {shlex.quote(str(store.folder))}"
    cells = sum(bool(outcome.rounds) for outcome in report.outcomes)
    if not cells:
        return f"interrupted before anything was measured; {finish}"
    turns = sum(len(result.turns) for outcome in report.outcomes for result in outcome.rounds)
    timed = f" and {counted(turns, 'timed turn')}" if turns else ""
    kept = f"the memory of {counted(cells, f'{report.source} cell')}{timed}"
    return f"interrupted; {kept} {'are' if turns else 'is'} kept in {store.folder}; {finish}"
