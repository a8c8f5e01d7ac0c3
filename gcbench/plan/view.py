"""Renders a decision: as text, Markdown, rows and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcbench.core import headroom, streams
from gcbench.core.records import SCHEMA, Json
from gcbench.core.text_table import Column, Table, plain, unbroken
from gcbench.core.text_table import show as show_all
from gcbench.core.units import format_bytes, format_percent, format_seconds
from gcbench.export._handover import SEARCHED
from gcbench.plan import nothing_fits, ties
from gcbench.plan.additions import of_decision
from gcbench.plan.decision import Candidate, Decision, best_of_each, described
from gcbench.strategies import OFF
from gcbench.strategies.plan_file import as_json as plan_as_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from gcbench.export import Emitted
    from gcbench.plan.planned import PlanResult


def rows(planned: PlanResult) -> list[dict[str, Json]]:
    """One row per candidate: the columns of `gcbench run` first, then those of a decision."""
    settings, decision = planned.settings, planned.decision
    choice = decision.choice
    return [
        {
            "model": settings.model,
            "strategy": candidate.strategy,
            "status": "ok" if candidate.fits else "oom",
            "device": planned.target.name,
            "batch_size": candidate.batch_size,
            "seq_len": planned.seq_len,
            "precision": settings.precision,
            "optim": settings.optim,
            "attn_implementation": planned.facts.attn_implementation,
            "num_params": planned.facts.num_params,
            "num_layers": planned.facts.num_layers,
            "layers_checkpointed": candidate.plan.layers_checkpointed,
            "peak_allocated_bytes": candidate.allocated_bytes,
            "peak_phase": candidate.peak_phase,
            "step_time_s": candidate.step_time_s,
            "tokens_per_s": candidate.tokens_per_s,
            "source": candidate.source,
            "lora_r": settings.lora_r,
            "device_memory_bytes": decision.limit_bytes,
            "peak_bytes": candidate.peak_bytes,
            "usable_bytes": decision.usable_bytes,
            "tokens_per_s_low": candidate.tokens_per_s_low,
            "tokens_per_s_high": candidate.tokens_per_s_high,
            "tokens_per_s_frac": candidate.tokens_per_s / choice.tokens_per_s if choice else None,
            "is_choice": candidate == choice,
            "model_changes": planned.changes,
            "peak_is_lower_bound": candidate.is_lower_bound,
            "tokens_per_s_frac_low": candidate.frac_low,
            "tokens_per_s_frac_high": candidate.frac_high,
            "model_notice": " ".join(planned.model_notices) or None,
            "emulated_bytes": candidate.emulated_bytes,
        }
        for candidate in decision.candidates
    ]


def document(planned: PlanResult, emitted: Emitted | None) -> str:
    """The JSON document of `--json`: the rows and the decision."""
    decision = planned.decision
    choice = decision.choice
    value: dict[str, object] = {
        "schema": SCHEMA,
        "command": planned.command,
        "created": planned.created,
        "rows": rows(planned),
        "choice": None if choice is None else next(row for row in rows(planned) if row["is_choice"]),
        "plan": None if choice is None else plan_as_json(choice.plan),
        "plan_file": str(planned.plan_file) if planned.plan_file else None,
        "smallest_peak_bytes": decision.smallest.peak_bytes if decision.smallest else None,
        "longest_seq_len": decision.longest_seq_len,
        "largest_batch_sizes": {each.strategy: each.batch_size for each in decision.largest},
        "gains": [
            {"name": lever.name, "flag": lever.flag, "peak_bytes": lever.peak_bytes, "fits": lever.fits}
            for lever in decision.levers
        ],
        "additions": [
            {"name": added.name, "nbytes": added.nbytes, "peak_bytes": added.peak_bytes} for added in decision.additions
        ],
        "reserve_frac": decision.reserve_frac,
        "times_from": decision.times_from,
        "notices": [*planned.model_notices, *decision.notices],
    }
    if emitted is not None:
        value["emitted"] = {"text": emitted.text, "notice": emitted.notice}
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def answer(planned: PlanResult) -> list[tuple[str, str]]:
    """The answer as (name, text) lines."""
    decision = planned.decision
    choice = decision.choice
    if choice is None:
        return nothing_fits.lines(planned)
    return [
        ("batch", f"{choice.batch_size} × {planned.seq_len} tokens"),
        ("checkpointing", described(choice)),
        ("peak", _peak(choice, decision)),
        *([("emulated", _emulated(choice, decision))] if choice.emulated_bytes is not None else []),
        ("speed", _speed(choice, decision)),
        ("why", _why(decision)),
        *(("note", text) for text in of_decision(decision)),
    ]


def _peak(choice: Candidate, decision: Decision) -> str:
    text = format_bytes(choice.peak_bytes)
    if decision.limit_bytes is None or decision.usable_bytes is None:
        return text
    spare = decision.limit_bytes - choice.peak_bytes
    reserve = f", {format_percent(decision.reserve_frac)} of it held back" if decision.reserve_frac else ""
    close = ""
    if choice.source != "measured" and decision.outside_bytes:
        uncertain = headroom.uncertain_bytes(choice.peak_bytes - decision.outside_bytes)
        if spare < uncertain:
            close = f": too close to tell, as the device may use {format_bytes(uncertain)} more than predicted"
    return f"{text} of {format_bytes(decision.limit_bytes)}{reserve}; headroom {format_bytes(spare)}{close}"


def _emulated(choice: Candidate, decision: Decision) -> str:
    inside = (choice.emulated_bytes or 0) - decision.outside_bytes
    return (
        f"{format_bytes(choice.emulated_bytes)}, predicted {format_bytes(choice.peak_bytes)}: PyTorch's own allocator "
        f"reserved {format_bytes(inside)} on an emulated card; {format_bytes(decision.outside_bytes)} outside it are "
        "predicted"
    )


def _speed(choice: Candidate, decision: Decision) -> str:
    rate = f"{choice.tokens_per_s:,.0f} tokens/s"
    if choice.source == "measured":
        return f"{rate} (measured)"
    best = best_named(decision)
    lead = ""
    if best is not None and best != choice:
        more = choice.tokens_per_s / best.tokens_per_s - 1
        word = "more" if more > 0 else "fewer"
        lead = f"{format_percent(abs(more))} {word} tokens/s than {best.strategy} at batch {best.batch_size}; "
    return f"{lead}about {rate}, {format_seconds(choice.step_time_s)} a step (estimated from {decision.times_from})"


def best_named(decision: Decision) -> Candidate | None:
    """The fastest named strategy that fits."""
    fitting = [each for each in decision.candidates if each.fits and each.strategy != SEARCHED]
    return max(fitting, key=lambda each: each.tokens_per_s, default=None)


def _why(decision: Decision) -> str:
    parts = [part for part in (decision.binding, decision.peak_words and f"Peak in the {decision.peak_words}.") if part]
    return " ".join(parts)


def frontier_table(planned: PlanResult) -> Table:
    """The table of the best candidate of each strategy."""
    decision = planned.decision
    choice = decision.choice
    largest = {each.strategy: each.batch_size for each in decision.largest}
    group = best_of_each(decision.candidates, choice)

    def relative(candidate: Candidate) -> str:
        if not candidate.fits:
            return "does not fit"
        if choice is None:
            return "–"
        if candidate == choice:
            return "the choice"
        if choice.source == "measured" and candidate.source != "measured":
            return "not measured"
        change = format_percent(candidate.tokens_per_s / choice.tokens_per_s - 1, sign=True)
        if candidate.source != "measured":
            return change
        return f"{change} ({ties.interval_of(candidate) or 'no interval'})"

    return Table(
        title="The best of each strategy",
        columns=(
            Column(header="strategy", cells=tuple(each.strategy for each in group), right=False),
            Column(header="batch", cells=tuple(str(each.batch_size) for each in group)),
            Column(
                header="layers recomputed",
                short_header="layers",
                shorten=1,
                drop=2,
                cells=tuple(str(each.plan.layers_checkpointed) for each in group),
            ),
            Column(header="peak", cells=tuple(each.peak_text for each in group)),
            Column(header="tokens/s", cells=tuple(relative(each) for each in group)),
            Column(
                header="largest batch",
                cells=tuple(
                    "–" if largest.get(each.strategy) is None else str(largest[each.strategy]) for each in group
                ),
            ),
        ),
    )


def levers_table(decision: Decision) -> Table | None:
    """The table of other changes that would reduce the peak; None without any."""
    shown = decision.choice or decision.smallest
    levers = [lever for lever in decision.levers if shown is not None and lever.peak_bytes < shown.peak_bytes]
    if not levers or shown is None:
        return None
    return Table(
        title="Changes that would reduce this peak",
        columns=(
            Column(header="change", cells=tuple(lever.name for lever in levers), right=False),
            Column(header="new peak", cells=tuple(format_bytes(lever.peak_bytes) for lever in levers)),
            Column(header="saves", cells=tuple(format_bytes(shown.peak_bytes - lever.peak_bytes) for lever in levers)),
            Column(header="how", cells=tuple(lever.flag or "in the trainer" for lever in levers), right=False),
        ),
    )


def next_steps(planned: PlanResult) -> list[tuple[str, str]]:
    """The next steps as (purpose, command or line of Python)."""
    choice = planned.decision.choice
    if choice is None or (choice.strategy == SEARCHED and planned.plan_file is None):
        return []
    spec = f"plan:{planned.plan_file}" if choice.strategy == SEARCHED else choice.strategy
    return [
        ("in your own loop", f"gcbench.apply(model, {spec!r})"),
        ("for a trainer", f"gcbench plan … --emit {'python' if choice.strategy == SEARCHED else 'trainer'}"),
        ("to measure it", f"gcbench run {shlex.join(_flags(planned, choice.batch_size, spec))}"),
    ]


def _flags(planned: PlanResult, batch_size: int, spec: str) -> list[str]:
    """The flags of `gcbench run` for the workload; defaults are left out."""
    settings = planned.settings
    flags = ["-m", settings.model, "-b", str(batch_size), "--seq-len", str(planned.seq_len)]
    for flag, value, usual in (
        ("--precision", settings.precision, "fp32"),
        ("--optim", settings.optim, "adamw_torch"),
        ("--attn-implementation", settings.attn_implementation, None),
        ("--layers", settings.layers, None),
        ("--lora-r", settings.lora_r, None),
        ("--lora-target-modules", ",".join(settings.lora_target_modules or ()), ""),
    ):
        if value != usual:
            flags += [flag, str(value)]
    for name, changed in (settings.set or {}).items():
        flags += ["--set", f"{name}={json.dumps(changed)}"]
    return [*flags, "--strategies", spec if spec == OFF else f"{OFF},{spec}"]


def renderables(planned: PlanResult) -> list[RenderableType]:
    """The answer for a terminal, as rich objects."""
    from rich.table import Table as Grid
    from rich.text import Text

    settings = planned.settings
    memory = f", {format_bytes(planned.decision.limit_bytes)}" if planned.decision.limit_bytes else ""
    what = f"{planned.name} · {planned.seq_len} tokens · {settings.precision} · {settings.optim}"
    head = Text(f"{what} on {planned.where}{memory}")
    head.stylize("bold")
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    for name, text in answer(planned):
        grid.add_row(name, Text(text))
    parts: list[RenderableType] = [head, Text(), grid, Text(), frontier_table(planned)]
    levers = levers_table(planned.decision)
    if levers is not None:
        parts.append(levers)
    parts += [Text(notice, style="bold") for notice in planned.model_notices]
    for purpose, command in next_steps(planned):
        parts += [Text(f"{purpose}:"), unbroken(f"  {command}")]
    return parts


def markdown(planned: PlanResult) -> str:
    """The answer as Markdown, with every candidate."""
    lines = [f"# gcbench plan: {planned.name}", "", f"`{planned.command}`", ""]
    lines += [f"- **{name}**: {text}" for name, text in answer(planned)]
    lines += [f"- {notice}" for notice in planned.model_notices]
    lines += ["", "| strategy | batch | peak | tokens/s | |", "|---|---:|---:|---:|---|"]
    choice = planned.decision.choice
    for candidate in planned.decision.candidates:
        mark = "the choice" if candidate == choice else "" if candidate.fits else "does not fit"
        lines.append(
            f"| `{candidate.strategy}` | {candidate.batch_size} | {candidate.peak_text} | "
            f"{candidate.tokens_per_s:,.0f} | {mark} |"
        )
    if planned.decision.levers:
        lines += ["", "| change | new peak |", "|---|---:|"]
        lines += [f"| {lever.name} | {format_bytes(lever.peak_bytes)} |" for lever in planned.decision.levers]
    return "\n".join(lines) + "\n"


def show(
    planned: PlanResult,
    emitted: Emitted | None,
    *,
    as_json: bool,
    quiet: bool,
    err: Console,
    folder: Path | None,
    emits: bool = False,
) -> None:
    """Print the answer; with `emits`, only the tool's settings go to standard output, and the answer to `err`.

    `folder` is the one that the plan was stored in, None where it was not stored.
    """
    from rich.console import Console

    if as_json:
        streams.print_json(document(planned, emitted))
    elif emitted is not None:
        print(emitted.text, end="")
    screen = err if emits else Console()
    if not as_json and not (quiet and emits):
        show_all(renderables(planned), screen)
    if quiet:
        return
    of_model = planned.model_notices if as_json else ()
    notices = [*of_model, *planned.decision.notices, *([emitted.notice] if emitted and emitted.notice else [])]
    for notice in [*notices, *([f"Everything is in {folder}"] if folder is not None else [])]:
        err.print(notice, markup=False, highlight=False, soft_wrap=True)


def show_stored(planned: PlanResult) -> None:
    """Print a stored plan with its notices."""
    from rich.console import Console

    show_all(renderables(planned))
    for notice in planned.decision.notices:
        Console(stderr=True).print(notice, markup=False, highlight=False, soft_wrap=True)


def rendered(planned: PlanResult, format: str) -> str:
    """The plan in a text format of `gcbench report`."""
    from gcbench.report.formats import csv_table

    if format == "markdown":
        return markdown(planned)
    if format == "terminal":
        return text(planned, width=120)
    return csv_table.table(rows(planned)) if format == "csv" else document(planned, None)


def text(planned: PlanResult, *, width: int) -> str:
    """The answer as plain text."""
    return plain(renderables(planned), width=width)


__all__: Sequence[str] = ("answer", "document", "markdown", "renderables", "rows", "show", "text")
