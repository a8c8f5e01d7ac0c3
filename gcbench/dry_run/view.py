"""Renders a dry run: a table of peaks by phase, and sentences below it; as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gcbench.core import json_codec
from gcbench.core.text_table import Column, Table, plain
from gcbench.core.text_table import show as show_all
from gcbench.core.units import counted, format_bytes, format_seconds
from gcbench.dry_run import values
from gcbench.dry_run.records import (
    OF_A_STEP,
    SCHEMA,
    DryRun,
    Observed,
    OutOfMemory,
    Place,
    PredictedTime,
    WouldFit,
)
from gcbench.strategies import OFF

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_READS = 6
_KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer states": "optimizer states",
    "buffers": "buffers of the model",
    "optimizer": "temporary tensors of the optimizer's step",
    "backward": "allocated by the backward pass (gradients of activations, temporary tensors)",
    "rest": "allocated by other lines",
}


def document(result: DryRun) -> str:
    """Return the JSON document of `--json`: one row per phase, and everything that was seen."""
    encoded = json_codec.encode(result)
    value = {
        "schema": SCHEMA,
        "command": encoded.pop("invocation"),
        "script": encoded.pop("command"),
        "created": encoded.pop("created"),
        "rows": rows(result),
        "verdict": encoded.pop("verdict"),
        "process_bytes": None if result.observed is None else result.observed.process_bytes,
        **encoded,
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def rows(result: DryRun) -> list[dict[str, object]]:
    """Return one row per phase: before the first step, the first step, the later ones, evaluation, saving."""
    observed = result.observed
    if observed is None:
        return []
    return [
        {
            "device": result.card.name,
            "source": "emulated",
            "step": step,
            "peak_phase": phase,
            "peak_allocated_bytes": peak[0],
            "peak_reserved_bytes": peak[1],
            "peak_process_bytes": None if observed.context_bytes is None else peak[1] + observed.context_bytes,
        }
        for step, phase, peak in _peaks(observed)
    ]


def _peaks(observed: Observed) -> Iterator[tuple[str, str, list[int]]]:
    """Yield step, phase, and peak allocated and reserved bytes."""
    if "start" in observed.outside:
        yield "before", "start", observed.outside["start"]
    unfinished = observed.unfinished if observed.out_of_memory or observed.num_steps == 0 else None
    for step, peaks in (
        ("first", observed.first.peaks if observed.first else {}),
        ("later", observed.later_peaks),
        ("unfinished", unfinished.peaks if unfinished else {}),
    ):
        for phase in OF_A_STEP:
            if phase in peaks:
                yield step, phase, peaks[phase]
    for phase in ("evaluation", "save"):
        if phase in observed.outside:
            yield "outside", phase, observed.outside[phase]


def renderables(result: DryRun) -> list[RenderableType]:
    """Return the table and the sentences."""
    from rich.text import Text

    parts: list[RenderableType] = []
    if result.observed is not None and result.observed.by_card:
        parts.append(_table(result, result.observed))
    for name, lines in sections(result):
        parts += [Text(name, style="bold"), *(Text(f"  {line}") for line in lines), Text("")]
    return parts


def _table(result: DryRun, observed: Observed) -> Table:
    found = list(_peaks(observed))
    highest = max(range(len(found)), key=lambda number: found[number][2][0])
    context = observed.context_bytes
    columns = [
        Column(header="when", cells=tuple(_when(observed, step, phase) for step, phase, _ in found), right=False),
        Column(header="allocated", cells=tuple(format_bytes(peak[0]) for _, _, peak in found)),
        Column(header="reserved", cells=tuple(format_bytes(peak[1]) for _, _, peak in found)),
    ]
    if context is not None:
        columns.append(
            Column(
                header="nvidia-smi, about", cells=tuple(format_bytes(peak[1] + context) for _, _, peak in found), drop=1
            )
        )
    return Table(
        title=f"{' '.join(result.command)}",
        subtitle=(
            f"{result.card.title}, {format_bytes(result.card.memory_bytes)}, emulated (nothing is computed); "
            f"torch {observed.torch}"
        ),
        columns=tuple(columns),
        bold=frozenset({(highest, "allocated"), (highest, "reserved")}),
    )


def _when(observed: Observed, step: str, phase: str) -> str:
    count = observed.num_steps
    if step == "before":
        return "before the first step"
    if step == "first":
        return f"first step, {phase}"
    if step == "later":
        return f"{'step 2' if count == 2 else f'steps 2 to {count}'}, {phase}"
    if step == "unfinished":
        return f"step {count + 1} (unfinished), {phase}"
    return "evaluation (forward without gradients)" if phase == "evaluation" else "saving"


def sections(result: DryRun) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the lines of each section."""
    observed = result.observed
    yield "verdict", [_sentence(result.verdict.sentence)]
    if observed is None:
        return
    if observed.num_steps or observed.unfinished is not None:
        yield "training", list(_training(observed))
    if observed.out_of_memory:
        yield "out of memory", list(_out_of_memory(observed, observed.out_of_memory[-1]))
    if result.would_fit is not None:
        yield "what would fit", list(_would_fit(result.would_fit, observed))
    if result.time is not None:
        yield "time", [_time(result.time, observed)]
    told = list(_values(observed))
    if told:
        yield "values", told
    if observed.refused:
        yield "not emulated", [f"{', '.join(observed.refused)}: called, and refused by the emulated card."]
    if observed.snapshot or observed.snapshot_failed:
        yield "snapshot", [_snapshot(observed)]


def _training(observed: Observed) -> Iterator[str]:
    steps = counted(observed.num_steps, "optimizer step")
    seen = observed.workload
    if observed.stopped is not None and observed.stopped.why == "steps":
        steps += ", then the script was ended (--steps)"
    elif observed.stopped is not None:
        steps += (
            f", then the script was ended: the loop at {_short(observed.stopped.file)}:{observed.stopped.line} depends "
            "on a value, which does not change here"
        )
    busiest = observed.busiest
    if busiest is not None and busiest.backwards > 1:
        steps += f"; {counted(busiest.backwards, 'micro-batch')} a step".replace("batchs", "batches")
    yield f"{steps}."
    if seen.model_class is not None:
        shape = f", inputs up to {seen.batch_size} × {seen.seq_len}" if seen.seq_len is not None else ""
        autocast = f", autocast to {seen.autocast}" if seen.autocast else ""
        optimizer = f", {seen.optimizer}" if seen.optimizer else ""
        yield f"{seen.model_class}, weights in {seen.dtype}{autocast}{optimizer}{shape}."
    if busiest is not None:
        yield _checkpointing(observed)


def _time(found: PredictedTime, observed: Observed) -> str:
    """Return what a step would take; nothing was timed here, as nothing was computed."""
    if found.seconds is None or found.low_s is None or found.high_s is None or found.tokens_per_s is None:
        return f"The time of a step is not predicted: {found.why_not}."
    step = observed.busiest
    which = "A step of one micro-batch" if step is not None and step.backwards > 1 else "A step"
    band = f"{format_seconds(found.low_s)} to {format_seconds(found.high_s)}"
    speed = f"{float(f'{found.tokens_per_s:.2g}'):,.0f} tokens/s"
    return (
        f"{which} would take about {format_seconds(found.seconds)} ({band}), {speed}: predicted, not measured, from "
        f"{found.source}."
    )


def _checkpointing(observed: Observed) -> str:
    step = observed.busiest
    assert step is not None
    total = observed.workload.num_layers
    if not step.checkpointed:
        of = f" ({counted(total, 'layer')} could be checkpointed)" if total else ""
        return f"Gradient checkpointing is off: no call of torch.utils.checkpoint was seen{of}."
    layers = f"{step.layers_checkpointed} of {counted(total, 'layer')}" if total else counted(step.checkpointed, "call")
    again = step.layers_recomputed if total else step.recomputed
    kind = ", reentrant" if observed.checkpoint_reentrant else ""
    if not again and observed.num_steps == 0:
        return f"Gradient checkpointing is on{kind}: {layers} checkpointed; no backward pass came to recompute them."
    return f"Gradient checkpointing is on{kind}: {layers} checkpointed, {again} really recomputed in a step."


def _out_of_memory(observed: Observed, event: OutOfMemory) -> Iterator[str]:
    if observed.num_out_of_memory > 1:
        yield f"Memory ran out {observed.num_out_of_memory} times; the last time:"
    elif observed.num_steps > event.done_steps:
        yield "The script caught the error and went on:"
    asked = f"{format_bytes(event.requested)} more for {_of(event.phase)}"
    yield f"{asked}, with {format_bytes(event.allocated)} allocated and {format_bytes(event.free)} free on the card."
    if event.place is not None:
        yield f"at {_place(event.place)}"
    if event.library_place is not None:
        yield f"in {_place(event.library_place)}"
    if event.alive:
        yield "Allocated then:"
    for group in event.alive:
        what = _KINDS.get(group.kind)
        if what is None:
            what = f"from {group.function or 'line'} ({_short(group.file)}:{group.line})"
        yield f"  {format_bytes(group.bytes):>10}  {what}, {counted(group.count, 'block')}"


def _of(phase: str) -> str:
    if phase in OF_A_STEP:
        return {"forward": "the forward pass", "backward": "the backward pass"}.get(phase, "the optimizer's step")
    return {"start": "what precedes the first step", "evaluation": "an evaluation"}.get(phase, "saving")


def _place(place: Place) -> str:
    text = f": {place.text}" if place.text else ""
    return f"{_short(place.file)}:{place.line}, {place.function}{text}"


def _short(file: str | None) -> str:
    """Return a file as a person would write it: relative to here, or from the package on."""
    if file is None:
        return "?"
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in file:
            return file.rpartition(marker)[2]
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _would_fit(found: WouldFit, observed: Observed) -> Iterator[str]:
    if found.sentence is not None or found.strategy is None:
        least = (
            f"; the least that gcbench plan finds needs {format_bytes(found.peak_bytes)}" if found.peak_bytes else ""
        )
        yield _sentence(f"{found.sentence or 'no setting was found'}{least}")
    else:
        batch = observed.workload.batch_size or 1
        accumulated = batch // (found.batch_size or 1)
        size = f"batch {found.batch_size}"
        if accumulated > 1:
            size += f" with {accumulated} times the gradient accumulation"
        yield (
            f"{_setting(found.strategy)} at {size} would need {format_bytes(found.peak_bytes)} "
            f"in all, {format_bytes(found.allocated_bytes)} of it allocated ({found.source} by gcbench plan)."
        )
        if accumulated > 1 and found.same_batch_strategy is not None:
            yield (
                f"{_setting(found.same_batch_strategy)} at its own batch {batch} would need "
                f"{format_bytes(found.same_batch_peak_bytes)}."
            )
        elif accumulated > 1:
            yield f"At its own batch {batch}, nothing that gcbench plan tries fits."
    if found.command is not None:
        yield f"{found.command}"
    elif found.strategy is not None:
        yield "--out keeps the model's config and prints the command that plans it again."


def _setting(strategy: str) -> str:
    return "No checkpointing" if strategy == OFF else f"Checkpointing with {strategy}"


def _values(observed: Observed) -> Iterator[str]:
    told = values.told(observed.reads)
    for read, text in told[:_MOST_READS]:
        yield f"{_short(read.file)}:{read.line}: {text}."
    if len(told) > _MOST_READS:
        yield f"… and {len(told) - _MOST_READS} more, in --json."
    if observed.saved_files:
        first, *others = observed.saved_files
        more = f" and {counted(len(others), 'other file')}" if others else ""
        yield f"{first}{more}: saved by the script, and what comes from the card in it was never computed."


def _snapshot(observed: Observed) -> str:
    if observed.snapshot is None:
        return f"It was not written ({observed.snapshot_failed})."
    return f"{observed.snapshot}: open it at pytorch.org/memory_viz."


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def text(result: DryRun, *, width: int) -> str:
    """Return the report as plain text."""
    return plain(renderables(result), width=width)


def show(result: DryRun) -> None:
    """Print the report on standard output."""
    show_all(renderables(result))
