"""The report of a run for people: tables, what they say, what is missing, and all it takes to repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from gcbench import plots, words
from gcbench.formats.terminal import Column, notes, table_columns
from gcbench.records import Json, Machine, Report, Row
from gcbench.tables import OFF, by_workload, failed_proof, rows
from gcbench.units import format_bytes, format_count

NAME = "markdown"
SUFFIX = ".md"


def render(report: Report) -> str:
    """GitHub Markdown for `report.md` in the run's folder, with its plots in `plots/` beside it."""
    table = rows(report)
    blocks = [f"# gcbench: {_escaped(report.model.model)} on {_escaped(report.machine.device_name)}", _facts(report)]
    if report.notices:
        blocks.append(_bullets(report.notices))
    for workload, group in by_workload(table).items():
        blocks += [f"## {_escaped(words.title(workload, model=False))}", answer(group)]
    blocks += _plots(report)
    blocks += ["## What was not measured", _bullets(not_measured(table))]
    blocks += ["## Repeat it", f"```sh\n{report.command}\n```"]
    blocks += ["## Settings", _pairs("setting", {name: _plain(value) for name, value in report.settings.items()})]
    blocks += ["## Machine", _machine(report.machine)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def answer(group: Sequence[Row]) -> str:
    """The table of one workload's rows, notes on single rows, and what it says in words."""
    return "\n\n".join(
        block
        for block in (_table(table_columns(group)), _bullets(notes(group)), _escaped(words.summary(group)))
        if block
    )


def not_measured(table: Sequence[Row]) -> tuple[str, ...]:
    """What a reader might look for and not find, a sentence each."""
    gaps = []
    for workload, group in by_workload(table).items():
        where = words.title(workload, model=False)
        for row in group:
            if row.status != "ok":
                kept = " (its row keeps what it had measured by then)" if row.layers_recomputed is not None else ""
                gaps.append(f"{row.strategy} at {where}: {words.FAILURES[row.status]}{kept}")
            elif row.layers_recomputed is None:
                gaps.append(f"{row.strategy} at {where}: the run ended before this cell")
            elif failed_proof(row):
                gaps.append(f"the saving of {row.strategy} at {where}: it failed the proof")
            elif row.step_time_s is not None and row.step_time_low_s is None:
                gaps.append(f"the interval of the step time of {row.strategy} at {where}: it has one sample")
        if OFF not in {row.strategy for row in group}:
            gaps.append(f"savings and overheads at {where}: off is not among its strategies")
    measured = [row for row in table if row.peak_allocated_bytes is not None]
    if measured and all(row.peak_reserved_bytes is None for row in measured):
        gaps.append("reserved memory: this device has no caching allocator to ask")
    if measured and all(row.peak_process_bytes is None for row in measured):
        gaps.append("the memory of the process: it could not be read here")
    return tuple(gaps) or ("nothing: every cell has its memory, its time and its proof",)


def _facts(report: Report) -> str:
    model = report.model
    return (
        f"{_escaped(model.model)} ({model.model_type}): {format_count(model.num_params)} parameters, "
        f"{model.num_layers} layers that can be checkpointed. "
        f"Measured {report.created} with gcbench {report.gcbench_version}."
    )


def _table(columns: Sequence[Column]) -> str:
    lines = [_line(c.header for c in columns), _line("---:" if c.right else "---" for c in columns)]
    lines += [_line(cells) for cells in zip(*(c.cells for c in columns), strict=True)]
    return "\n".join(lines)


def _plots(report: Report) -> list[str]:
    captions = {
        plots.MEMORY: "Peak memory of each phase of a training step",
        plots.TRADEOFF: "Memory saved against time paid",
    }
    links = [f"![{captions[name]}](plots/{name})" for name in plots.drawable(report)]
    return ["## Plots", *links] if links else []


def _machine(machine: Machine) -> str:
    facts = {
        "device": machine.device,
        "device name": machine.device_name,
        "device memory": format_bytes(machine.device_memory_bytes),
        "platform": machine.platform,
    }
    return _pairs("machine", facts | machine.settings | machine.versions)


def _pairs(header: str, pairs: Mapping[str, str]) -> str:
    return "\n".join([_line([header, "value"]), _line(["---", "---"]), *(_line(pair) for pair in pairs.items())])


def _plain(value: Json) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown takes as it is: no cell borders, emphasis, tags or line breaks of its own."""
    return " ".join(re.sub(r"([\\|*<`\[]|(?<!\w)_|_(?!\w))", r"\\\1", text).split())
