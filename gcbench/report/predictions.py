"""Renders predictions: the columns of their tables and the sentences below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gcbench.core import headroom
from gcbench.core.headroom import CLOSE
from gcbench.core.prediction import Lever, Prediction
from gcbench.core.records import Report, Row, Workload
from gcbench.core.text_table import UNKNOWN, Column
from gcbench.core.units import format_bytes, format_percent
from gcbench.devices import cards
from gcbench.report import predicted_times
from gcbench.report import rows as tables
from gcbench.report import sentences as words
from gcbench.report.sentences import PHASES, SAME_PEAK_FRAC, listed
from gcbench.strategies import OFF

NOT_MEASURED = "Predicted, not measured: the peak memory of a training step"
"""Begins the sentence below every prediction."""

NEGLIGIBLE_FRAC = 0.005
"""Savings and additions below this fraction of the peak count as none."""
_TIGHT_FRAC = 0.03
"""Headroom below this fraction of the device's memory is called tight."""
_MOST_NAMES = 4
"""Strategies listed by name in a sentence."""
_MODEL_STATE = ("parameters", "gradients", "optimizer state")
"""Kinds of memory that no strategy changes."""
_EVERY_LAYER = "checkpointing every layer"
"""The lever that is itself a strategy."""


@dataclass(frozen=True, kw_only=True)
class PredictedCell:
    """One cell: its row and its prediction, None where there is none."""

    row: Row
    prediction: Prediction | None


def by_workload(report: Report) -> dict[Workload, tuple[PredictedCell, ...]]:
    """Group cells by workload, in the order of their first appearance."""
    groups: dict[Workload, list[PredictedCell]] = {}
    for row, outcome in zip(tables.rows(report), report.outcomes, strict=True):
        groups.setdefault(outcome.cell.workload, []).append(PredictedCell(row=row, prediction=outcome.prediction))
    return {workload: tuple(cells) for workload, cells in groups.items()}


def target(report: Report) -> str:
    """Return `NVIDIA A10, 21.99 GiB`: the device that the report is for, with its memory where that is limited."""
    name = "the CPU" if words.device_type(report.machine.device) == "cpu" else report.machine.device_name
    limit = limit_bytes(report)
    memory = format_bytes(limit)
    return name if limit is None or memory in name else f"{name}, {memory}"


def limit_bytes(report: Report) -> int | None:
    """Return the memory of the device; None without a limit."""
    return next((outcome.prediction.limit_bytes for outcome in report.outcomes if outcome.prediction), None)


def table_columns(group: Sequence[Row]) -> tuple[Column, ...]:
    """Return the columns of one workload's table, as text; columns that are empty in all rows are left out."""

    def of(text: Callable[[Row], str]) -> tuple[str, ...]:
        return tuple(text(row) for row in group)

    columns = (
        Column(header="strategy", cells=of(lambda r: r.strategy), right=False),
        Column(header="layers checkpointed", short_header="layers", cells=of(_checkpointed), shorten=1, drop=6),
        Column(
            header="peak allocated",
            short_header="peak",
            cells=of(lambda r: format_bytes(r.peak_allocated_bytes)),
            shorten=1,
        ),
        Column(header="peak in", cells=of(lambda r: r.peak_phase or UNKNOWN), right=False, drop=4),
        Column(header="saved", cells=of(lambda r: format_percent(r.memory_saved_frac)), drop=5),
        Column(header="reserved", cells=of(lambda r: format_bytes(r.peak_reserved_bytes)), drop=2),
        Column(header="process", cells=of(lambda r: format_bytes(r.peak_process_bytes)), drop=3),
        *predicted_times.table_columns(group),
        Column(header="headroom", cells=of(lambda r: signed_bytes(r.spare_bytes))),
        Column(header="fits", cells=of(_fits), right=False, short=of(_fits_shortly), shorten=2),
    )
    always = ("strategy", "peak allocated")
    return tuple(c for c in columns if c.header in always or any(cell != UNKNOWN for cell in c.cells))


def signed_bytes(count: int | None) -> str:
    """Return `−3.20 GiB`, with a minus sign as wide as a digit."""
    return format_bytes(count).replace("-", "−")


def notes(group: Sequence[Row]) -> tuple[str, ...]:
    """Return a line for each row with a message that its columns do not show."""
    return words.notes(row for row in group if row.status != "oom" or row.spare_bytes is None)


def choice(cells: Sequence[PredictedCell]) -> PredictedCell | None:
    """Return the strategy to consider first: of those that fit, the one that checkpoints the fewest layers.

    Where nothing fits, it is the one that comes nearest; without a memory limit, the one with the fewest layers among
    the peaks within 1 % of the lowest. None where nothing was predicted.
    """
    there = [cell for cell in cells if cell.row.peak_allocated_bytes is not None]
    bounded = [cell for cell in there if cell.row.spare_bytes is not None]
    if not there:
        return None
    if bounded:
        fitting = [cell for cell in bounded if may_run(cell)]
        sure = [cell for cell in fitting if cell.row.fits != CLOSE]
        if fitting:
            return min(sure or fitting, key=lambda cell: (cell.row.layers_checkpointed, -_spare(cell)))
        return max(bounded, key=_spare)
    lowest = min(map(_peak, there))
    near = [cell for cell in there if _peak(cell) <= lowest * (1 + SAME_PEAK_FRAC)]
    return min(near, key=lambda cell: (cell.row.layers_checkpointed, _peak(cell)))


def summary(cells: Sequence[PredictedCell]) -> str:
    """Return the sentences below the table of one workload."""
    best = choice(cells)
    if best is None:
        return "Nothing could be predicted."
    there = [cell for cell in cells if cell.row.peak_allocated_bytes is not None]
    bounded = [cell for cell in there if cell.row.spare_bytes is not None]
    sentences = _fits_sentences(bounded, best) if bounded else _savings(there, best)
    sentences.append(_peak_sentence(best, there))
    kernels = dict.fromkeys(kernel for cell in there if cell.prediction for kernel in cell.prediction.attention)
    if kernels:
        plural = "kernels" if len(kernels) > 1 else "kernel"
        aside = (
            ", which saves whole score matrices, as no fused kernel supports it" if list(kernels) == ["math"] else ""
        )
        sentences.append(f"On this device attention uses the {listed(list(kernels))} {plural}{aside}.")
    sentences += predicted_times.sentences(
        [(cell.row, cell.prediction.why_no_time if cell.prediction else None) for cell in there]
    )
    return " ".join(sentences)


def not_measured(report: Report) -> str:
    """Return the sentence below a prediction, which says what it is."""
    if any(outcome.prediction and outcome.prediction.time for outcome in report.outcomes):
        return f"{NOT_MEASURED}, and its time."
    return f"{NOT_MEASURED}. Its time is not predicted."


def where(cell: PredictedCell) -> str:
    """Return `in the loss and logits (backward pass)`: where in the step the peak is."""
    explanation = cell.prediction.explanation if cell.prediction else None
    if explanation is None:
        return f"in the {PHASES[cell.row.peak_phase or 'forward']}"
    place, _, phase = explanation.part.rpartition(", ")
    if not place or phase not in PHASES:
        return f"in the {explanation.part}"
    if place == "before the layers":
        return f"before the first layer ({PHASES[phase]})"
    return f"in {'' if place.startswith('layer ') else 'the '}{place} ({PHASES[phase]})"


def checkpointing_lever(prediction: Prediction | None) -> Lever | None:
    """Return the lever that checkpoints every layer; None where it was not tried, or every layer is checkpointed."""
    levers = prediction.explanation.levers if prediction and prediction.explanation else ()
    return next((lever for lever in levers if lever.name == _EVERY_LAYER), None)


def _fits_sentences(cells: Sequence[PredictedCell], best: PredictedCell) -> list[str]:
    """Say which strategies fit, and with how much headroom."""
    limit = best.row.device_memory_bytes or 0
    failing = [cell for cell in cells if not may_run(cell)]
    if len(failing) == len(cells):
        return _nothing_fits(cells, best, limit)
    close = [cell for cell in cells if may_run(cell) and cell.row.fits == CLOSE]
    fitting = [cell for cell in cells if cell not in failing and cell not in close]
    name, spare = best.row.strategy, format_bytes(_spare(best))
    flushes = best.prediction is not None and bool(best.prediction.num_alloc_retries)
    tight = ", which is tight" if flushes or _spare(best) < _TIGHT_FRAC * limit else ""
    of = f"{best.row.layers_checkpointed} of {best.row.num_layers}"
    if not fitting:
        sentences = [
            f"Whether {name} fits in {format_bytes(limit)} is too close to tell: it leaves {spare}, and the "
            f"process may need {format_bytes(uncertain_bytes(best))} more than predicted."
        ]
    elif best.row.layers_checkpointed == 0:
        sentences = [
            f"{name} fits in {format_bytes(limit)} with {spare} of headroom{tight}: nothing has to be recomputed."
        ]
    elif len(fitting) == 1:
        only = "Only " if failing and not close else ""
        sentences = [f"{only}{name} fits in {format_bytes(limit)}, with {spare} of headroom{tight}."]
    elif len({cell.row.layers_checkpointed for cell in fitting}) == 1:
        sentences = [
            f"{_several(fitting)} fit in {format_bytes(limit)}, each with {of} layers checkpointed; {name} leaves the "
            f"most headroom, {spare}{tight}."
        ]
    else:
        sentences = [
            f"{_several(fitting)} fit in {format_bytes(limit)}; {name} checkpoints the fewest layers ({of}) and leaves "
            f"{spare} of headroom{tight}."
        ]
    roomiest = max(fitting or close, key=_spare)
    if _spare(roomiest) > _spare(best) * (1 + SAME_PEAK_FRAC):
        sentences.append(f"{roomiest.row.strategy} leaves the most headroom, {format_bytes(_spare(roomiest))}.")
    others = [cell for cell in close if cell is not best]
    if others:
        rooms = listed([format_bytes(_spare(cell)) for cell in others])
        verb = "are" if len(others) > 1 else "is"
        sentences.append(f"{listed(_names(others))} {verb} too close to tell, with {rooms} of headroom.")
    reserved = [cell for cell in failing if _spare(cell) >= 0]
    if reserved:
        verb = "fit" if len(reserved) > 1 else "fits"
        sentences.append(f"{listed(_names(reserved))} {verb} only without the reserve ({_reserve(best)}).")
    beyond = [cell for cell in failing if _spare(cell) < 0]
    if beyond:
        sentences.append(_failing(beyond))
    return sentences


def _failing(cells: Sequence[PredictedCell]) -> str:
    if len(cells) > _MOST_NAMES:
        nearest = max(cells, key=_spare)
        return (
            f"{len(cells)} strategies do not fit; {nearest.row.strategy} comes nearest, "
            f"{format_bytes(-_spare(nearest))} too large."
        )
    missing = listed([format_bytes(-_spare(cell)) for cell in cells])
    return f"{listed(_names(cells))} {'do' if len(cells) > 1 else 'does'} not fit, by {missing}."


def _nothing_fits(cells: Sequence[PredictedCell], best: PredictedCell, limit: int) -> list[str]:
    row = best.row
    opening = "Nothing fits" if len(cells) > 1 else f"{row.strategy} does not fit"
    nearest = f"{row.strategy} comes nearest and" if len(cells) > 1 else "it"
    if _spare(best) >= 0:
        return [
            f"{opening} in {_usable(best)}: {nearest} needs {format_bytes(-_usable_headroom(best))} more.",
            _only_the_reserve(cells, best),
        ]
    sentence = f"{opening} in {format_bytes(limit)}: {nearest} needs {format_bytes(-_spare(best))} more than there is."
    state = _model_state_bytes(best.prediction)
    if state > limit:
        lora = "LoRA (--lora-r), " if row.lora_r is None else ""
        sentences = [
            sentence,
            f"Parameters, gradients and optimizer state alone take {format_bytes(state)}, so no strategy and no "
            f"batch fits; {lora}a leaner optimizer, a smaller model or a larger device might.",
        ]
        devices = cards.among(state, limit)
        if devices is not None:
            sentences.append(
                f"No card has that much memory: {devices} or more of this size could share it (FSDP or ZeRO-3 in the "
                "trainer), but gcbench predicts one device."
            )
        return sentences
    batch = "a smaller batch, " if row.batch_size > 1 else ""
    return [sentence, f"Try {batch}a shorter sequence or a leaner optimizer."]


def _only_the_reserve(cells: Sequence[PredictedCell], best: PredictedCell) -> str:
    """Say what fits with a smaller reserve, and whether that is certain."""
    limit, frac = best.row.device_memory_bytes or 0, _reserve_frac(best)
    smaller = headroom.smaller_reserve(limit - _spare(best), limit_bytes=limit, reserve_frac=frac) or 0.0
    there = headroom.usable_bytes(limit, smaller)
    fitting = [cell for cell in cells if limit - _spare(cell) <= there]
    verb = "fit" if len(fitting) > 1 else "fits"
    sure = ", which is too close to tell" if all(cell.row.fits == CLOSE for cell in fitting) else ""
    return (
        f"Only the reserve is in the way: with {headroom.reserve_flag(smaller)} {_several(fitting)} {verb}, with "
        f"{format_bytes(max(map(_spare, fitting)))} of headroom{sure}."
    )


def nothing_fits(report: Report) -> str | None:
    """Return the error message, with a remedy, of a prediction in which no cell fits; None where one does."""
    cells = [cell for group in by_workload(report).values() for cell in group]
    bounded = [cell for cell in cells if cell.row.spare_bytes is not None]
    if not bounded or len(bounded) < len(cells) or any(map(may_run, bounded)):
        return None
    best = max(bounded, key=_spare)
    needs = format_bytes((best.row.device_memory_bytes or 0) - _spare(best))
    message = f"nothing fits into {_usable(best)}, the nearest is {best.row.strategy} with {needs}"
    if _spare(best) >= 0:
        return f"{message}; {_only_the_reserve(bounded, best).removesuffix('.').replace('Only', 'only')}"
    remedies = ["a smaller batch"] if best.row.batch_size > 1 else []
    remedies += ["a shorter sequence", "a leaner optimizer", "LoRA (--lora-r)" if best.row.lora_r is None else ""]
    return f"{message}; try {', '.join(filter(None, remedies))} or a larger device"


def _model_state_bytes(prediction: Prediction | None) -> int:
    """Return the peak of parameters, gradients and optimizer state together, in bytes; 0 where it is unknown."""
    if prediction is None or prediction.curve is None:
        return 0
    of_kind = dict(zip(prediction.curve.kinds, prediction.curve.nbytes, strict=True))
    return max(map(sum, zip(*(of_kind[kind] for kind in _MODEL_STATE if kind in of_kind), strict=True)), default=0)


def _savings(cells: Sequence[PredictedCell], best: PredictedCell) -> list[str]:
    """Say what checkpointing saves, for a device without a memory limit."""
    off = next((cell for cell in cells if cell.row.strategy == OFF), None)
    lowest = min(cells, key=_peak)
    if off is None:
        return [f"The lowest peak is that of {best.row.strategy}; add off to the strategies to see what it saves."]
    saved = lowest.row.memory_saved_frac or 0.0
    if len(cells) == 1:
        return [f"off has a peak of {format_bytes(_peak(off))}."]
    if saved < NEGLIGIBLE_FRAC:
        return ["No strategy saves memory."]
    row = lowest.row
    text = f"{row.strategy} saves {format_percent(saved)} of the peak of off"
    sentences = [f"{text}, with {row.layers_checkpointed} of {row.num_layers} layers checkpointed."]
    if best.row.strategy != OFF and best.row.layers_checkpointed < row.layers_checkpointed:
        sentences.append(
            f"{best.row.strategy} comes within 1 % of the same peak with {best.row.layers_checkpointed} of "
            f"{best.row.num_layers}."
        )
    return sentences


def _peak_sentence(best: PredictedCell, cells: Sequence[PredictedCell]) -> str:
    text = f"The peak of {best.row.strategy} is {where(best)}"
    if 0 < best.row.num_layers <= best.row.layers_checkpointed:
        return f"{text}, and no layer is left to checkpoint."
    left = _with_more_layers(best, cells)
    if left is not None and _peak(best) - left < NEGLIGIBLE_FRAC * _peak(best):
        return f"{text}, where checkpointing more saves nothing."
    return f"{text}."


def _with_more_layers(best: PredictedCell, cells: Sequence[PredictedCell]) -> int | None:
    """Return the lowest peak with more layers checkpointed, of the lever and the other strategies; None if untried."""
    lever = checkpointing_lever(best.prediction)
    tried = [_peak(cell) for cell in cells if cell.row.layers_checkpointed > best.row.layers_checkpointed]
    return min([*tried, *([lever.peak_bytes] if lever else [])], default=None)


def _several(cells: Sequence[PredictedCell]) -> str:
    return listed(_names(cells)) if len(cells) <= _MOST_NAMES else f"{len(cells)} strategies"


def _names(cells: Sequence[PredictedCell]) -> list[str]:
    return [cell.row.strategy for cell in cells]


def _spare(cell: PredictedCell) -> int:
    return cell.row.spare_bytes or 0


def _usable_headroom(cell: PredictedCell) -> int:
    """Return what the cell leaves of the usable memory, in bytes; negative where it does not fit."""
    return _spare(cell) - (cell.row.device_memory_bytes or 0) + (cell.row.usable_bytes or 0)


def may_run(cell: PredictedCell) -> bool:
    """Return whether the cell fits in the usable memory; it may still be too close to tell."""
    return _usable_headroom(cell) >= 0


def uncertain_bytes(cell: PredictedCell) -> int:
    """Return by how many bytes the cell may exceed its prediction."""
    return headroom.uncertain_bytes(cell.row.peak_reserved_bytes)


def _reserve_frac(cell: PredictedCell) -> float:
    return cell.prediction.reserve_frac if cell.prediction else 0.0


def _reserve(cell: PredictedCell) -> str:
    """Return `5.0 % of 39.39 GiB`."""
    return f"{format_percent(_reserve_frac(cell))} of {format_bytes(cell.row.device_memory_bytes)}"


def _usable(cell: PredictedCell) -> str:
    return headroom.held_back(cell.row.device_memory_bytes or 0, _reserve_frac(cell))


def _peak(cell: PredictedCell) -> int:
    return cell.row.peak_allocated_bytes or 0


def _checkpointed(row: Row) -> str:
    return f"{row.layers_checkpointed}/{row.num_layers}"


def _fits(row: Row) -> str:
    return row.fits or UNKNOWN


def _fits_shortly(row: Row) -> str:
    short: dict[str | None, str] = {CLOSE: "close", headroom.RESERVED: "reserve"}
    return short.get(row.fits, _fits(row))
