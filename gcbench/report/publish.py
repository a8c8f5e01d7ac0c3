"""Writes the tables and plots of a run or prediction beside its report, and prints it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from gcbench.core import snapshot_files, streams
from gcbench.core.files import write_text
from gcbench.core.records import Report
from gcbench.report import formats
from gcbench.report.run_folder import Store


def publish(report: Report, store: Store, *, plots: bool = True) -> None:
    """Write the tables and plots beside the report; the store reports a write that fails."""
    with store.forgiving(report):
        if plots:
            from gcbench.report.plots.run_plots import draw, remove_stale

            draw(report, store.folder / "plots")
            remove_stale(report, store.folder / "plots")
        for name, file in (("csv", "table.csv"), ("markdown", "report.md")):
            write_text(store.folder / file, formats.get(name).render(report))


def show(
    report: Report, folder: Path | None, *, explain: bool = False, as_json: bool, quiet: bool, err: Console
) -> None:
    """Print the report, and on standard error its notices and the folder."""
    with streams.stored_in(folder) if folder is not None else nullcontext():
        if as_json:
            streams.print_json(formats.get("json").render(report))
        else:
            from gcbench.report.formats import terminal

            terminal.show(report, explain=explain)
        if quiet:
            return
        for notice in (*(report.model_notices if as_json else ()), *report.notices):
            err.print(notice, markup=False, highlight=False, soft_wrap=True)
        if folder is not None:
            err.print(f"Everything is in {folder}", markup=False, highlight=False, soft_wrap=True)


def tell_snapshots(err: Console, report: Report, snapshot: Path) -> None:
    """Print where the memory snapshots of a report's cells are."""
    paths = snapshot_files.files(snapshot, [outcome.cell for outcome in report.outcomes])
    sentence = snapshot_files.written(list(paths.values()))
    if sentence is not None:
        err.print(sentence, markup=False, highlight=False, soft_wrap=True)
