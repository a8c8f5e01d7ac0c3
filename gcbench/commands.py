"""What each command does, from settings to what is printed."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from gcbench import config as configs
from gcbench import formats, progress, runner, sources
from gcbench import report as reports
from gcbench.children import ForkedChildren
from gcbench.errors import GcbenchError, Interrupted, ThresholdBroken, UsageError
from gcbench.records import SCHEMA, Report
from gcbench.report import write_text
from gcbench.store import Store, default_folder
from gcbench.tasks import DescribeTask
from gcbench.units import format_count

FAILED_STATUSES = ("crash", "timeout", "killed")
"""Those that make `run` exit with 1: out of memory and unsupported are results."""


def run(
    flags: dict[str, object],
    *,
    config: Path | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Settings, cells, outcomes, report: measure what `flags` and the files say, and show it."""
    previous: Report | None = None
    if resume:
        if out is None:
            raise UsageError("--resume needs the folder of the run to finish; add --out DIR")
        store, previous = Store.reopen(out)
    given = {
        **(previous.settings if previous else {}),
        **(configs.read_toml(config) if config else {}),
        **{key: value for key, value in flags.items() if value is not None},
    }
    wanted = configs.settings(given)
    source = sources.resolve(wanted.model, pretrained=wanted.pretrained, trust_remote_code=wanted.trust_remote_code)
    if previous is None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        store = Store.create(out or default_folder(sources.slug(wanted.model), now))
    command = shlex.join(["gcbench", *argv])
    err = Console(stderr=True)
    with _interruptible(store):
        try:
            with ForkedChildren(preload=_preload(source)) as children, progress.choose(err, quiet=quiet) as display:
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


def _preload(source: sources.ModelSource) -> tuple[str, ...]:
    """The module of the model's own code, for the server process to import once for all children."""
    model_type = str(source.config["model_type"]).replace("-", "_")
    return (f"transformers.models.{model_type}.modeling_{model_type}",)


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
        from gcbench.formats.terminal import tables

        out = Console()
        for table in tables(report):
            out.print(table)
    if quiet:
        return
    for notice in report.notices:
        err.print(notice, markup=False, highlight=False, soft_wrap=True)
    err.print(f"Everything is in {store.folder}", markup=False, highlight=False, soft_wrap=True)


def compare(a: Path, b: Path, *, fail_on: Sequence[str], force: bool, as_json: bool) -> None:
    """Match the cells of two runs and say what changed; raises ThresholdBroken when a --fail-on is."""
    from gcbench import compare as comparing

    mistakes: list[str] = []
    thresholds: dict[str, float] = {}
    for text in (part for item in fail_on for part in item.split(",")):
        try:
            name, share = comparing.parse_threshold(text)
            thresholds[name] = share
        except ValueError as err:
            mistakes.append(f"--fail-on: {err}")
    if mistakes:
        raise UsageError.of(mistakes)
    comparison = comparing.compare(reports.load(a), reports.load(b), force=force)
    if as_json:
        _print_rows(comparing.to_rows(comparison))
    else:
        out = Console()
        for part in comparing.render(comparison):
            out.print(part)
    broken = comparing.broken(comparison, thresholds)
    if broken:
        raise ThresholdBroken("; ".join(broken))


def report(folder: Path, *, format: str, out: Path | None) -> None:
    """Render a stored run."""
    legal = (*formats.names(), "png")
    if format not in legal:
        raise UsageError(f"--format {format!r} is unknown; legal are {', '.join(legal)}")
    stored = reports.load(folder)
    if format == "png":
        from gcbench.plots import draw

        target = out or reports.report_path(folder).parent / "plots"
        with _writable(target):
            for path in draw(stored, target):
                print(path)
        return
    if out is not None:
        with _writable(out):
            write_text(out, formats.get(format).render(stored))
        return
    if format == "terminal":
        from gcbench.formats.terminal import tables

        console = Console()
        for table in tables(stored):
            console.print(table)
        return
    print(formats.get(format).render(stored), end="")


@contextmanager
def _writable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise UsageError(f"--out {place} cannot be written ({err.strerror}); take another --out") from None


def models(*, as_json: bool) -> None:
    """List the catalogue."""
    from gcbench import catalogue

    known = catalogue.architectures()
    if as_json:
        _print_rows([{f.name: getattr(entry, f.name) for f in fields(entry)} for entry in known])
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("model", "parameters", "family", "Hub id"):
        table.add_column(header, justify="right" if header == "parameters" else "left", no_wrap=header != "Hub id")
    for entry in known:
        table.add_row(entry.name, format_count(entry.published_params), entry.family, entry.hub_id)
    console = Console()
    console.print(table)
    console.print(
        f"\n{len(known)} built-in architectures work offline; any other Hub id, folder or config.json of a causal LM "
        "works too.",
        highlight=False,
    )


def strategies(*, as_json: bool) -> None:
    """List the kinds of strategies."""
    from gcbench.strategies import kinds

    listed = [
        {"strategy": k.syntax, "kept": k.kept, "recomputed": k.recomputed, "elsewhere": k.elsewhere} for k in kinds()
    ]
    if as_json:
        _print_rows(listed)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold")
    for header in ("strategy", "kept in the forward pass", "recomputed in the backward", "called elsewhere"):
        table.add_column(header, no_wrap=header == "strategy")
    for row in listed:
        table.add_row(*row.values())
    Console().print(table)


def env(*, device: str, as_json: bool) -> None:
    """Describe the machine, asked of a child process."""
    wanted = configs.parse_device(device)
    with ForkedChildren() as children:
        answer = children.run(DescribeTask(device=wanted), on_event=lambda event: None, timeout_s=120)
    runner.raise_refusal(answer)
    machine = answer.machine
    assert machine is not None
    row: dict[str, object] = {
        "device": machine.device,
        "device_name": machine.device_name,
        "device_memory_bytes": machine.device_memory_bytes,
        "platform": machine.platform,
        **machine.versions,
        **machine.settings,
    }
    if as_json:
        _print_rows([row])
        return
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:<{width}}  {value}")


def _print_rows(rows: Sequence[object]) -> None:
    print(json.dumps({"schema": SCHEMA, "rows": rows}, indent=1, ensure_ascii=False))
