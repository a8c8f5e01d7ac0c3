"""One run from settings to what is printed: the model found, the cells measured, the results published."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from gcbench import formats, progress, runner, sources
from gcbench import report as reports
from gcbench.children import ForkedChildren
from gcbench.config import Settings
from gcbench.errors import GcbenchError, Interrupted, ThresholdBroken
from gcbench.records import Report
from gcbench.report import write_text
from gcbench.store import Store, default_folder
from gcbench.units import format_bytes

FAILED_STATUSES = ("crash", "timeout", "killed")
"""Those that make `run` exit with 1: out of memory and unsupported are results."""


def measure(
    wanted: Settings, *, out: Path | None, previous: Report | None, command: str, as_json: bool, quiet: bool
) -> None:
    """Measure what `previous` lacks, keep it in the run folder and show it; raises GcbenchError at the end when a
    cell crashed, timed out or was killed, or when the results could not be written."""
    source = sources.resolve(wanted.model, pretrained=wanted.pretrained, trust_remote_code=wanted.trust_remote_code)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder = out or default_folder(sources.slug(wanted.model), now)
    store = Store(folder) if previous else Store.create(folder, can_resume=True)
    err = Console(stderr=True)
    with _interruptible(store):
        try:
            with (
                ForkedChildren(preload=sources.modules(source)) as children,
                progress.choose(err, quiet=quiet) as display,
            ):
                report = runner.run(
                    wanted,
                    source=source,
                    children=children,
                    store=store,
                    progress=display,
                    command=command,
                    previous=previous,
                )
        except GcbenchError:
            store.discard_if_empty()
            raise
        _publish(report, store)
    _show(report, store, as_json=as_json, quiet=quiet, err=err)
    store.close()
    broken = [outcome for outcome in report.outcomes if outcome.failure and outcome.failure.kind in FAILED_STATUSES]
    if broken:
        raise GcbenchError(
            f"{len(broken)} of {len(report.outcomes)} cells crashed, timed out or were killed; "
            f"the reasons are in the table and in {store.folder / reports.REPORT_NAME}"
        )
    if report.outcomes and all(outcome.failure and outcome.failure.kind == "oom" for outcome in report.outcomes):
        limit = wanted.memory_limit or report.machine.device_memory_bytes
        memory = f" into {format_bytes(limit)}" if limit is not None else ""
        raise ThresholdBroken(
            f"nothing fits{memory}: every cell ran out of memory; take a smaller batch, a shorter sequence, a leaner "
            "optimizer or a larger device (gcbench plan looks for what fits)"
        )


@contextmanager
def _interruptible(store: Store) -> Iterator[None]:
    """Make Ctrl-C and a polite kill end the run with what was measured kept."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the last save short
        raise Interrupted(_kept(store)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _kept(store: Store) -> str:
    """After an interruption: what there is, and how to go on."""
    try:
        report = reports.load(store.folder)
    except GcbenchError:
        store.discard_if_empty()
        return "interrupted before anything was measured"
    _publish(report, store, plots=False)
    done = sum(len(outcome.rounds) for outcome in report.outcomes)
    return (
        f"interrupted; {done} measured rounds are kept in {store.folder}; "
        f"finish with: gcbench run --resume --out {shlex.quote(str(store.folder))}"
    )


def _publish(report: Report, store: Store, *, plots: bool = True) -> None:
    """Write the tables and plots beside the report; a full disk is told by the store."""
    with store.forgiving(report):
        if plots:
            from gcbench.plots import draw

            draw(report, store.folder / "plots")
        for name, file in (("csv", "table.csv"), ("markdown", "report.md")):
            write_text(store.folder / file, formats.get(name).render(report))


def _show(report: Report, store: Store, *, as_json: bool, quiet: bool, err: Console) -> None:
    if as_json:
        print(formats.get("json").render(report), end="")
    else:
        from gcbench.formats import terminal

        terminal.show(report)
    if quiet:
        return
    for notice in report.notices:
        err.print(notice, markup=False, highlight=False, soft_wrap=True)
    err.print(f"Everything is in {store.folder}", markup=False, highlight=False, soft_wrap=True)
