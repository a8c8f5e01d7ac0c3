"""What each command does, from settings to what is printed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from gcbench import config as configs
from gcbench import formats, screen, settings_file, spellings, streams
from gcbench import report as reports
from gcbench.errors import ThresholdBroken, UsageError
from gcbench.records import SCHEMA, Report
from gcbench.report import write_text
from gcbench.screen import Column, Table
from gcbench.settings_file import FileSettings
from gcbench.units import format_bytes, format_count


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
        previous = reports.reopen(out)
    file = settings_file.read(config, "run")
    raw = {**(previous.settings if previous else {}), **file.settings, **flags}
    wanted = configs.settings(raw)
    tell(file, raw, quiet=quiet)
    from gcbench import session  # only now: a wrong value is told before anything else is imported

    session.measure(
        wanted, out=out, previous=previous, command=shlex.join(["gcbench", *argv]), as_json=as_json, quiet=quiet
    )


def predict(
    flags: dict[str, object],
    *,
    device_memory: str | None,
    device_file: Path | None,
    reserve: str | None,
    expandable_segments: bool,
    explain: bool,
    exact: bool,
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Settings, cells, predictions, report: what `flags` and the file say would take on the device they name."""
    from gcbench.headroom import parse_reserve
    from gcbench.targets import Wish

    file = settings_file.read(config, "predict")
    raw = {**file.settings, **flags}
    # A card's name is no device of this machine; memory and segments are settings of a prediction alone.
    device = raw.pop("device", None)
    memory = memory_of_device(device_memory, file, raw.pop("memory_limit", None))
    if device is not None and not isinstance(device, str):
        raise UsageError(f"--device: {device!r} is not a name; write it as text")
    wanted = configs.settings(raw)
    wish = Wish(
        device=None if device is None else spellings.device(device),
        device_memory=memory,
        device_file=file.file("device_file", device_file),
        expandable_segments=file.is_set("expandable_segments", expandable_segments),
        explain=file.is_set("explain", explain),
        exact=file.is_set("exact", exact),
        reserve_frac=parse_reserve(file.text("reserve", reserve)),
    )
    tell(file, raw, quiet=quiet)
    from gcbench import forecast  # only now: a wrong value is told before anything else is imported

    forecast.predict(wanted, wish, out=out, command=shlex.join(["gcbench", *argv]), as_json=as_json, quiet=quiet)


def memory_of_device(given: str | None, file: FileSettings, limit: object) -> int | None:
    """Bytes that a device has by --device-memory, or else by the file, where `memory_limit` means it as well."""
    if given is not None:
        return configs.parse_memory("--device-memory", given)
    if "device_memory" in file.values:
        return configs.parse_memory("--device-memory", file.values["device_memory"])
    return configs.parse_memory("--memory-limit", limit)


def tell(file: FileSettings, raw: Mapping[str, object], *, quiet: bool) -> None:
    """Say on standard error what of a file was left out, and what of `raw` was taken in another sense."""
    file.tell(quiet=quiet)
    for sentence in () if quiet else configs.notices(raw):
        print(sentence, file=sys.stderr)


def check(
    flags: dict[str, object],
    *,
    precision: str | None,
    optim: str | None,
    attn_implementation: str | None,
    tuned: str | None,
    compiled: bool,
    full_size: bool,
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Combinations, small real steps, verdicts: does checkpointing work for this model?"""
    from gcbench import checks

    file = settings_file.read(config, "check")
    tried = {
        "precision": precision if precision is not None else file.values.get("precision"),
        "optim": optim if optim is not None else file.values.get("optim"),
        "attn_implementation": (
            attn_implementation if attn_implementation is not None else file.values.get("attn_implementation")
        ),
        "train": tuned if tuned is not None else file.values.get("train"),
    }
    others = {key: value for key, value in file.settings.items() if key not in tried}
    wanted = configs.settings({"batch_size": "2", **others, **flags})
    for flag, values in (("--batch", wanted.batch_size), ("--seq-len", wanted.seq_len or ())):
        if len(values) > 1:
            raise UsageError(f"{flag}: a check takes one value, and here are {len(values)}; leave the others out")
    if wanted.strategies == ("off",):
        raise UsageError(
            "--strategies off: it is what all others are compared with; name another, or leave the flag out"
        )
    choice = {
        "precisions": configs.several("--precision", tried["precision"], configs.precision),
        "optims": configs.several("--optim", tried["optim"], configs.optimizer),
        "attentions": configs.several("--attn-implementation", tried["attn_implementation"], configs.attention),
        "tuned": configs.several("--train", tried["train"], configs.one_of(checks.TUNED)),
    }
    compiled = compiled and not file.is_set("no_compile", False)
    full_size = file.is_set("full_size", full_size)
    tell(file, {**others, **flags, **tried}, quiet=quiet)
    from gcbench import check_session  # only now: a wrong value is told before anything else is imported

    check_session.check(
        check_session.Wanted(
            model=wanted.model,
            strategies=tuple(s for s in wanted.strategies if s != "off") if wanted.strategies else None,
            compiled=compiled,
            device=wanted.device,
            batch_size=wanted.batch_size[0],
            seq_len=wanted.seq_len[0] if wanted.seq_len else None,
            layers=wanted.layers,
            overrides=wanted.set,
            full_size=full_size,
            trust_remote_code=wanted.trust_remote_code,
            seed=wanted.seed,
            timeout_s=wanted.timeout,
            **choice,
        ),
        out=out,
        command=shlex.join(["gcbench", *argv]),
        as_json=as_json,
        quiet=quiet,
    )


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
    from gcbench import runner
    from gcbench.children import ForkedChildren
    from gcbench.tasks import DescribeTask

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
    streams.print_json(json.dumps({"schema": SCHEMA, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
