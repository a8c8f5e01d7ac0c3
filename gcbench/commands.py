"""What each command does, from settings to what is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from gcbench import config as configs
from gcbench import formats, screen, streams
from gcbench import report as reports
from gcbench.errors import ThresholdBroken, UsageError
from gcbench.files import write_text
from gcbench.records import SCHEMA
from gcbench.screen import Column, Table
from gcbench.tasks import raise_refusal
from gcbench.units import format_bytes, format_count


def compare(a: Path, b: Path, *, fail_on: Sequence[str], force: bool, as_json: bool) -> None:
    """Match two runs, predictions or plans and say what changed; raises ThresholdBroken when a --fail-on is."""
    from gcbench import compare as comparing
    from gcbench import stored_commands

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
    if stored_commands.are_plans(a, b):
        stored_commands.compare_plans(a, b, thresholds, force=force, as_json=as_json)
        return
    comparison = comparing.compare(reports.load(a), reports.load(b), force=force)
    if as_json:
        _print_rows(comparing.to_rows(comparison))
    else:
        screen.show(comparing.render(comparison))
    broken = comparing.broken(comparison, thresholds)
    if broken:
        raise ThresholdBroken("; ".join(broken))


def report(folder: Path, *, format: str, out: Path | None) -> None:
    """Render a stored run, prediction, plan or check."""
    legal = (*formats.names(), "png")
    if format not in legal:
        raise UsageError(f"--format {format!r} is unknown; legal are {', '.join(legal)}")
    from gcbench import stored as kept
    from gcbench import stored_commands
    from gcbench.stored_commands import writable

    kind = kept.kind_of(folder)
    if kind != "run":
        stored_commands.report(folder, kind, format=format, out=out)
        return
    stored = reports.load(folder)
    if format == "png":
        from gcbench.plots import draw

        target = out or reports.report_path(folder).parent / "plots"
        with writable(target):
            for path in draw(stored, target):
                print(path)
        return
    if out is not None:
        with writable(out):
            write_text(out, formats.get(format).render(stored))
        return
    if format == "terminal":
        from gcbench.formats import terminal

        terminal.show(stored)
        return
    text = formats.get(format).render(stored)
    if format == "json":
        streams.print_json(text)
    else:
        print(text, end="")


def models(*, as_json: bool) -> None:
    """List the catalogue."""
    from gcbench import catalogue

    known = catalogue.architectures()
    if as_json:
        _print_rows([{f.name: getattr(entry, f.name) for f in fields(entry)} for entry in known])
        return
    columns = (
        Column(header="model", cells=tuple(entry.name for entry in known), right=False),
        Column(
            header="parameters",
            short_header="size",
            shorten=2,
            cells=tuple(format_count(entry.published_params) for entry in known),
        ),
        Column(header="Hub id", cells=tuple(entry.hub_id for entry in known), right=False, drop=1),
    )
    summary = (
        f"{len(known)} built-in architectures work offline; any other Hub id, folder or config.json of a causal LM "
        "works too."
    )
    screen.show([Table(columns=columns, summary=summary)])


def devices(device_file: Path | None, *, as_json: bool) -> None:
    """List the cards that a prediction can be made for."""
    from gcbench import cards

    known = (*cards.cards(), *(cards.read(device_file) if device_file else ()))
    if as_json:
        _print_rows([{f.name: _as_json(getattr(card, f.name)) for f in fields(card)} for card in known])
        return
    rates = [card.matmul_flops.get("bf16") for card in known]
    speeds = [card.bandwidth_bytes_per_s for card in known]
    unknown = screen.UNKNOWN
    columns = (
        Column(header="device", cells=tuple(card.name for card in known), right=False),
        Column(header="memory", cells=tuple(format_bytes(card.memory_bytes) for card in known)),
        Column(header="capability", cells=tuple(card.compute_capability or unknown for card in known), drop=2),
        Column(header="bf16 TFLOP/s", cells=tuple(f"{r / 1e12:.0f}" if r else unknown for r in rates), drop=4),
        Column(header="bandwidth", cells=tuple(f"{s / 1e12:.2f} TB/s" if s else unknown for s in speeds), drop=3),
        Column(header="name", cells=tuple(card.full_name or unknown for card in known), right=False, drop=1),
    )
    summary = (
        "Memory is what torch finds, not what is on the box; rates are dense peaks. Sources of every figure: --json. "
        "Cards of your own: --device-file."
    )
    screen.show([Table(columns=columns, summary=summary)])


def _as_json(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def strategies(*, as_json: bool) -> None:
    """List the kinds of strategies."""
    from gcbench.strategies import kinds

    listed = [
        {"strategy": k.syntax, "kept": k.kept, "recomputed": k.recomputed, "elsewhere": k.elsewhere} for k in kinds()
    ]
    if as_json:
        _print_rows(listed)
        return
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console()
    for row in listed:
        spec, *said = row.items()
        console.print(Text(spec[1], style="bold"))
        grid = Grid.grid(padding=(0, 2, 0, 0))
        for name, text in said:
            grid.add_row(f"  {name}", text)
        console.print(grid)


def env(*, device: str, as_json: bool) -> None:
    """Describe the machine, asked of a child process."""
    from gcbench.children import ForkedChildren
    from gcbench.describe import DescribeTask

    wanted = configs.parse_device(device)
    with ForkedChildren() as children:
        answer = children.run(DescribeTask(device=wanted), on_event=lambda event: None, timeout_s=120)
    raise_refusal(answer)
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
    streams.print_json(json.dumps({"schema": SCHEMA, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
