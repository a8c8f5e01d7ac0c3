"""The report of a run for people: tables, what they say, what is missing, and all it takes to repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from gcbench.core.records import Json, Machine, Report, Row
from gcbench.core.text_table import UNKNOWN, Column
from gcbench.core.units import counted, format_bytes, format_count, format_percent
from gcbench.report import additions, gaps, sentences
from gcbench.report import explanation as explained
from gcbench.report import predictions as predicted
from gcbench.report.explanation import Block
from gcbench.report.formats.terminal import table_columns
from gcbench.report.overview import overview
from gcbench.report.plots import memory_over_step, run_plots
from gcbench.report.predictions import PredictedCell
from gcbench.report.rows import NOTHING_SHOWN, by_workload, failed_proof, hides_saving, rows
from gcbench.report.sentences import notes
from gcbench.strategies import OFF

NAME = "markdown"
SUFFIX = ".md"


def render(report: Report) -> str:
    """GitHub Markdown for `report.md` in the run's folder, with its plots in `plots/` beside it."""
    said = _predicted(report) if report.source == "predicted" else _measured(report)
    blocks = [said[0], _bullets((*report.model_notices, *report.notices)), *said[1:]]
    blocks += ["## Repeat it", f"```sh\n{report.command}\n```"]
    blocks += ["## Settings", _pairs("setting", {name: _plain(value) for name, value in report.settings.items()})]
    blocks += ["## Machine", _machine(report.machine)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _measured(report: Report) -> list[str]:
    table = rows(report)
    blocks = [f"{_head(report, f'on {report.machine.device_name}')} {_made(report, 'Measured')}.", *_overview(report)]
    for workload, group in by_workload(table).items():
        blocks += [f"## {_escaped(sentences.title(workload, model=False))}", answer(group)]
    blocks += _plots(report)
    return [*blocks, "## What was not measured", _bullets(not_measured(table))]


def _predicted(report: Report) -> list[str]:
    made = _made(report, "Made")
    blocks = [
        f"{_head(report, f'predicted for {predicted.target(report)}')} {made}. {predicted.NOT_MEASURED}",
        *_overview(report),
    ]
    tried = report.settings.get("explain") is True
    for workload, cells in predicted.by_workload(report).items():
        blocks += [f"## {_escaped(sentences.title(workload, model=False, device=False))}", prediction(cells)]
        blocks += _explanation(explained.blocks(cells, tried=tried))
    blocks += _plots(report)
    terms = explained.terms(report)
    if terms:
        sizes = [(term.name, format_bytes(term.nbytes), explained.side(term), term.source) for term in terms]
        lines = [_line(["term", "size", "where", "source"]), _line(["---", "---:", "---", "---"]), *map(_line, sizes)]
        blocks += ["## What the trace cannot see", explained.UNSEEN, "\n".join(lines)]
    return [*blocks, "## What this prediction does not cover", _bullets(gaps.not_covered(report))]


def _overview(report: Report) -> list[str]:
    """All cells in one table, where there are several workloads."""
    found = overview(report)
    return (
        []
        if found is None
        else ["## Overview", _escaped(f"{found.title.removeprefix('Overview of ')}."), _table(found.columns)]
    )


def answer(group: Sequence[Row]) -> str:
    """The table of one workload's rows, notes on single rows, and what it says in words."""
    return "\n\n".join(
        block
        for block in (_table(table_columns(group)), _bullets(notes(group)), _escaped(sentences.summary(group)))
        if block
    )


def prediction(cells: Sequence[PredictedCell]) -> str:
    """The table of one workload's predictions, notes on single rows, and what it says in words."""
    group = [cell.row for cell in cells]
    return "\n\n".join(
        block
        for block in (
            _table(predicted.table_columns(group)),
            _bullets(predicted.notes(group)),
            *map(_escaped, additions.paragraphs(cells)),
        )
        if block
    )


def not_measured(table: Sequence[Row]) -> tuple[str, ...]:
    """What a reader might look for and not find, a sentence each."""
    gaps = []
    for workload, group in by_workload(table).items():
        where = sentences.title(workload, model=False)
        for row in group:
            if row.status != "ok":
                kept = " (its row keeps what it had measured by then)" if row.layers_recomputed is not None else ""
                gaps.append(f"{row.strategy} at {where}: {sentences.FAILURES[row.status]}{kept}")
            elif row.layers_recomputed is None:
                gaps.append(f"{row.strategy} at {where}: the run ended before this cell")
            elif failed_proof(row):
                gaps.append(f"the saving of {row.strategy} at {where}: it failed the proof")
            elif hides_saving(row):
                gaps.append(f"the saving of {row.strategy} at {where}: {NOTHING_SHOWN}")
            elif row.step_time_s is not None and row.step_time_low_s is None:
                gaps.append(f"the interval of the step time of {row.strategy} at {where}: {sentences.TOO_FEW_ROUNDS}")
        if OFF not in {row.strategy for row in group}:
            gaps.append(f"savings and overheads at {where}: off is not among its strategies")
    measured = [row for row in table if row.peak_allocated_bytes is not None]
    if measured and all(row.peak_reserved_bytes is None for row in measured):
        gaps.append("reserved memory: this device has no caching allocator to ask")
    if measured and all(row.peak_process_bytes is None for row in measured):
        gaps.append("the memory of the process: it could not be read here")
    return tuple(gaps) or ("nothing: every cell has its memory, its time and its proof",)


def strategies() -> str:
    """The table of all kinds of strategies."""
    from gcbench.strategies import kinds

    lines = [_line(["strategy", "kept", "recomputed", "elsewhere called"]), _line(["---"] * 4)]
    lines += [f"| `{k.syntax}` | {' | '.join(map(_escaped, (k.kept, k.recomputed, k.elsewhere)))} |" for k in kinds()]
    return "\n".join(lines)


def _head(report: Report, where: str) -> str:
    """The headline, and the model in a sentence."""
    model = report.model
    return (
        f"# gcbench: {_escaped(sentences.model_of(report))} {_escaped(where)}\n\n"
        f"{_escaped(sentences.model_of(report))} ({model.model_type}): {format_count(model.num_params)} parameters, "
        f"{counted(model.num_layers, 'layer')} that can be checkpointed."
    )


def _made(report: Report, how: str) -> str:
    return f"{how} {report.created} with gcbench {report.gcbench_version}"


def _explanation(blocks: Sequence[Block]) -> list[str]:
    """What is alive at the peaks, a column per strategy, and what is said of each in words."""
    if not blocks:
        return []
    kinds = dict.fromkeys(share.kind for block in blocks for share in block.shares)
    # What is left over comes last, whichever block names it first.
    names = sorted(kinds, key=lambda kind: kind == explained.REST)
    lines = [
        _line(["alive at the peak", *(", ".join(block.strategies) for block in blocks)]),
        _line(["---", *("---:" for _ in blocks)]),
        *(_line([name, *(_share(block, name) for block in blocks)]) for name in names),
    ]
    told = [
        f"{block.heading}. {'. '.join(f'{_capital(name)}: {text}' for name, text in block.facts)}." for block in blocks
    ]
    return ["### Where the peak is", "\n".join(lines), _bullets(told)]


def _share(block: Block, kind: str) -> str:
    nbytes = next((share.nbytes for share in block.shares if share.kind == kind), None)
    return UNKNOWN if nbytes is None else f"{format_bytes(nbytes)} ({format_percent(nbytes / block.peak_bytes)})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(columns: Sequence[Column]) -> str:
    lines = [_line(c.header for c in columns), _line("---:" if c.right else "---" for c in columns)]
    lines += [_line(cells) for cells in zip(*(c.cells for c in columns), strict=True)]
    return "\n".join(lines)


def _plots(report: Report) -> list[str]:
    captions = {
        run_plots.MEMORY: "Peak memory of each phase of a training step",
        run_plots.TRADEOFF: "Memory saved against time paid",
        **{name: memory_over_step.caption(workload) for name, workload in memory_over_step.files(report).items()},
    }
    links = [f"![{captions[name]}](plots/{name})" for name in run_plots.drawable(report)]
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
