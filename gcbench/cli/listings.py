"""Prints the lists of models, devices and strategies, and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from gcbench.core import text_table as screen
from gcbench.core.text_table import Column, Table
from gcbench.core.units import format_bytes, format_count
from gcbench.job import settings as configs
from gcbench.processes.messages import raise_refusal
from gcbench.report.formats.json_rows import print_rows


def models(*, as_json: bool) -> None:
    """Print the model catalogue."""
    from gcbench.models import catalogue

    known = catalogue.architectures()
    if as_json:
        print_rows([{f.name: getattr(entry, f.name) for f in fields(entry)} for entry in known])
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
    """Print the cards of the catalogue and of `device_file`."""
    from gcbench.devices import cards

    known = (*cards.cards(), *(cards.read(device_file) if device_file else ()))
    if as_json:
        print_rows([{f.name: _as_json(getattr(card, f.name)) for f in fields(card)} for card in known])
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
        "Memory is what torch reports, not the advertised size; rates are dense peaks. --json adds the source of every "
        "figure, --device-file adds cards."
    )
    screen.show([Table(columns=columns, summary=summary)])


def _as_json(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def strategies(*, as_json: bool) -> None:
    """Print the kinds of strategies."""
    from gcbench.strategies import kinds

    known = kinds()
    if as_json:
        print_rows(
            {"strategy": k.syntax, "kept": k.kept, "recomputed": k.recomputed, "elsewhere": k.elsewhere} for k in known
        )
        return
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console()
    for kind in known:
        console.print(Text(kind.syntax, style="bold"))
        grid = Grid.grid(padding=(0, 2, 0, 0))
        for name, text in (("saved", kind.kept), ("recomputed", kind.recomputed), ("also known as", kind.elsewhere)):
            grid.add_row(f"  {name}", text)
        console.print(grid)


def env(*, device: str, as_json: bool) -> None:
    """Print versions and settings of this machine, which a child process reports."""
    from gcbench.job.describe import DescribeTask
    from gcbench.processes.children import ForkedChildren

    task = DescribeTask(device=configs.parse_device(device))
    with ForkedChildren() as children:
        answer = children.run(task, on_event=lambda event: None, timeout_s=120)
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
        print_rows([row])
        return
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:<{width}}  {value}")
