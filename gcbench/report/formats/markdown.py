"""Renders a report as Markdown: tables, sentences, what is missing, and all that is needed to repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from gcbench.core.records import Json, Machine, Report, Row
from gcbench.core.text_table import UNKNOWN, Column
from gcbench.core.units import counted, format_bytes, format_count, format_percent
from gcbench.report import additions, gaps, largest, sentences, timing
from gcbench.report import explanation as explained
from gcbench.report import predictions as predicted
from gcbench.report.explanation import PeakExplanation
from gcbench.report.formats.terminal import table_columns
from gcbench.report.overview import overview
from gcbench.report.plots import curves, memory_over_step, run_plots
from gcbench.report.predictions import PredictedCell
from gcbench.report.rows import NOTHING_SHOWN, by_workload, failed_proof, hides_saving, rows
from gcbench.report.sentences import notes
from gcbench.strategies import OFF

NAME = "markdown"
SUFFIX = ".md"

_RECOMPUTED = (
    "*layers recomputed* is counted in the real backward pass; *layers\\_checkpointed* in `table.csv` is what the plan "
    "requests of the layers that run. Where the two differ, the model's own code decided otherwise and the proof fails."
)
_NO_TIMES = "time: no kernel ran on the emulated card, so no step was timed"
_NO_GRADIENTS = (
    "gradients: they have no values on an emulated card; gcbench check compares them, on the CPU or a card that is here"
)
_NO_PROCESS = (
    "the memory of the process: what CUDA and its libraries take outside PyTorch's allocator is an estimate on an "
    "emulated card; gcbench predict names each part"
)
_CHECKPOINTED = (
    "*layers checkpointed* is what the plan requests. `gcbench run` counts *layers recomputed* in the real backward "
    "pass instead, which differs when the model skips layers or its own code decides what to recompute."
)


def render(report: Report) -> str:
    """Render GitHub Markdown for `report.md`, with links to the plots in `plots/` beside it."""
    head, *rest = _predicted(report) if report.source == "predicted" else _measured(report)
    blocks = [head, _bullets((*report.model_notices, *report.notices)), *rest]
    blocks += ["## Repeat it", f"```sh\n{report.command}\n```"]
    blocks += ["## Settings", _pairs("setting", {name: _plain(value) for name, value in report.settings.items()})]
    blocks += ["## Machine", _machine(report.machine)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _measured(report: Report) -> list[str]:
    table, is_emulated = rows(report), report.source == "emulated"
    blocks = [
        _emulated_head(report) if is_emulated else _measured_head(report),
        *_overview(report),
        _RECOMPUTED.replace("the proof fails", "the row says FAILED") if is_emulated else _RECOMPUTED,
    ]
    for workload, group in by_workload(table).items():
        title = sentences.title(workload, model=False, device=not is_emulated)
        blocks += [f"## {_escaped(title)}", answer(group), *map(_escaped, timing.paragraphs(report, workload))]
    blocks += [*_largest(report), *_plots(report)]
    return [*blocks, "## What was not measured", _bullets(not_measured(table))]


def _measured_head(report: Report) -> str:
    return f"{_head(report, f'on {report.machine.device_name}')} {_made(report, 'Measured')}."


def _emulated_head(report: Report) -> str:
    head = _head(report, f"emulated on {sentences.emulated_card(report)}")
    return f"{head} {_made(report, 'Emulated')}."


def _predicted(report: Report) -> list[str]:
    made = _made(report, "Made")
    blocks = [
        f"{_head(report, f'predicted for {predicted.target(report)}')} {made}. {predicted.not_measured(report)}",
        *_overview(report),
        _CHECKPOINTED,
    ]
    tried = report.settings.get("explain") is True
    for workload, cells in predicted.by_workload(report).items():
        blocks += [f"## {_escaped(sentences.title(workload, model=False, device=False))}", prediction(cells)]
        blocks += _explanation(explained.explanations(cells, tried=tried))
    blocks += [*_largest(report), *_plots(report)]
    terms = explained.terms(report)
    if terms:
        sizes = [(term.name, format_bytes(term.nbytes), explained.side(term), term.source) for term in terms]
        lines = [_line(["term", "size", "where", "source"]), _line(["---", "---:", "---", "---"]), *map(_line, sizes)]
        blocks += ["## Memory outside the trace", explained.OUTSIDE_TRACE, "\n".join(lines)]
    return [*blocks, "## What this prediction does not cover", _bullets(gaps.not_covered(report))]


def _overview(report: Report) -> list[str]:
    """Render all cells in one table, where there are several workloads."""
    table = overview(report)
    if table is None:
        return []
    return ["## Overview", _escaped(f"{table.title.removeprefix('Overview of ')}."), _table(table.columns)]


def _largest(report: Report) -> list[str]:
    """Render the cells at each strategy's largest batch, where there are several batches."""
    blocks: list[str] = []
    for table in largest.summaries(report):
        blocks += [f"## {_escaped(table.title)}", _escaped(f"{table.subtitle}."), _table(table.columns)]
        blocks += map(_escaped, table.summary.splitlines())
    return blocks


def answer(group: Sequence[Row]) -> str:
    """Render the table of one workload's rows, notes on rows, and sentences."""
    return "\n\n".join(
        block
        for block in (_table(table_columns(group)), _bullets(notes(group)), _escaped(sentences.summary(group)))
        if block
    )


def prediction(cells: Sequence[PredictedCell]) -> str:
    """Render the table of one workload's predictions, notes on rows, and sentences."""
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
    """Return what a reader may miss in the report, a sentence each."""
    is_emulated = sentences.is_emulated(table)
    gaps = [_NO_TIMES, _NO_GRADIENTS, _NO_PROCESS] if is_emulated else []
    for workload, group in by_workload(table).items():
        where = sentences.title(workload, model=False, device=not is_emulated)
        for row in group:
            if row.status != "ok":
                kept = " (its row has what was measured before)" if row.layers_recomputed is not None else ""
                gaps.append(f"{row.strategy} at {where}: {sentences.FAILURES[row.status]}{kept}")
            elif row.layers_recomputed is None:
                gaps.append(f"{row.strategy} at {where}: the run ended before this cell")
            elif failed_proof(row):
                why = "its layers were not recomputed as planned" if is_emulated else "it failed the proof"
                gaps.append(f"the saving of {row.strategy} at {where}: {why}")
            elif hides_saving(row):
                gaps.append(f"the saving of {row.strategy} at {where}: {NOTHING_SHOWN}")
            elif row.step_time_s is not None and row.step_time_low_s is None:
                gaps.append(f"the interval of the step time of {row.strategy} at {where}: {sentences.TOO_FEW_ROUNDS}")
        if OFF not in {row.strategy for row in group}:
            gaps.append(f"savings{'' if is_emulated else ' and overheads'} at {where}: off is not among its strategies")
    measured = [row for row in table if row.peak_allocated_bytes is not None]
    if measured and all(row.peak_reserved_bytes is None for row in measured):
        gaps.append("reserved memory: this device has no caching allocator")
    if measured and not is_emulated and all(row.peak_process_bytes is None for row in measured):
        gaps.append("the memory of the process: it could not be read here")
    return tuple(gaps) or ("nothing: every cell has its memory, time and proof",)


def strategies() -> str:
    """Render the table of all kinds of strategies."""
    from gcbench.strategies import kinds

    lines = [_line(["strategy", "saved", "recomputed", "also known as"]), _line(["---"] * 4)]
    lines += [f"| `{k.syntax}` | {' | '.join(map(_escaped, (k.kept, k.recomputed, k.elsewhere)))} |" for k in kinds()]
    return "\n".join(lines)


def _head(report: Report, where: str) -> str:
    """Render the headline, and the model in a sentence."""
    model = report.model
    return (
        f"# gcbench: {_escaped(sentences.model_of(report))} {_escaped(where)}\n\n"
        f"{_escaped(sentences.model_of(report))} ({model.model_type}): {format_count(model.num_params)} parameters, "
        f"{counted(model.num_layers, 'layer')} that can be checkpointed."
    )


def _made(report: Report, how: str) -> str:
    return f"{how} {report.created} with gcbench {report.gcbench_version}"


def _explanation(peaks: Sequence[PeakExplanation]) -> list[str]:
    """Render what is allocated at the peaks, a column per strategy, and the facts about each."""
    if not peaks:
        return []
    kinds = dict.fromkeys(share.kind for peak in peaks for share in peak.shares)
    # The rest comes last, whichever peak has it first.
    names = sorted(kinds, key=lambda kind: kind == explained.REST)
    lines = [
        _line(["allocated at the peak", *(", ".join(peak.strategies) for peak in peaks)]),
        _line(["---", *("---:" for _ in peaks)]),
        *(_line([name, *(_share(peak, name) for peak in peaks)]) for name in names),
    ]
    facts = [
        f"{peak.heading}. {'. '.join(f'{_capital(name)}: {text}' for name, text in peak.facts)}." for peak in peaks
    ]
    return ["### Where the peak is", "\n".join(lines), _bullets(facts)]


def _share(peak: PeakExplanation, kind: str) -> str:
    nbytes = next((share.nbytes for share in peak.shares if share.kind == kind), None)
    return UNKNOWN if nbytes is None else f"{format_bytes(nbytes)} ({format_percent(nbytes / peak.peak_bytes)})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(columns: Sequence[Column]) -> str:
    lines = [_line(c.header for c in columns), _line("---:" if c.right else "---" for c in columns)]
    lines += [_line(cells) for cells in zip(*(c.cells for c in columns), strict=True)]
    return "\n".join(lines)


def _plots(report: Report) -> list[str]:
    captions = {
        run_plots.MEMORY: "Peak memory of each phase of a training step",
        run_plots.TRADEOFF: "Memory saved versus time overhead",
        **{name: curves.caption(dimension) for name, dimension in curves.files(report).items()},
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
    """Escape text so that Markdown shows it literally: no cell borders, emphasis, tags or line breaks."""
    return " ".join(re.sub(r"([\\|*<`\[]|(?<!\w)_|_(?!\w))", r"\\\1", text).split())
