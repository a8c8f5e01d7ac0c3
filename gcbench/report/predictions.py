"""What a prediction tells a person: the columns of its tables, the sentences beneath them, and what it leaves out."""

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
from gcbench.report import rows as tables
from gcbench.report import sentences as words
from gcbench.report.sentences import PHASES, listed
from gcbench.strategies import OFF

NOT_MEASURED = "Predicted, not measured: the memory of a training step, and nothing about its time."

NOTHING = 0.005
"""Of the peak; who saves less than this saves nothing."""
_SAME_PEAK = 0.01
"""Peaks this close count as the same when one with less recomputation is looked for."""
_TIGHT = 0.03
"""Of the device's memory; what is left below this is called tight."""
_MOST_NAMES = 4
"""Strategies listed by name in a sentence."""
_STANDING = ("parameters", "gradients", "optimizer state")
"""Kinds of memory that no strategy changes."""
_EVERY_LAYER = "checkpointing every layer"
"""The lever that a strategy could pull."""


@dataclass(frozen=True, kw_only=True)
class PredictedCell:
    """One cell: its row, and the prediction it was made of; None where there is none."""

    row: Row
    prediction: Prediction | None


def by_workload(report: Report) -> dict[Workload, tuple[PredictedCell, ...]]:
    """The cells of each workload, in the order of their first appearance."""
    groups: dict[Workload, list[PredictedCell]] = {}
    for row, outcome in zip(tables.rows(report), report.outcomes, strict=True):
        groups.setdefault(outcome.cell.workload, []).append(PredictedCell(row=row, prediction=outcome.prediction))
    return {workload: tuple(cells) for workload, cells in groups.items()}


def target(report: Report) -> str:
    """`NVIDIA A10, 21.99 GiB`: the device that the report is for, with its memory where there is a bound."""
    name = "the CPU" if words.device_type(report.machine.device) == "cpu" else report.machine.device_name
    limit = limit_bytes(report)
    memory = format_bytes(limit)
    return name if limit is None or memory in name else f"{name}, {memory}"


def limit_bytes(report: Report) -> int | None:
    """Memory of the device; None where there is no bound."""
    said = [outcome.prediction for outcome in report.outcomes if outcome.prediction]
    return next((prediction.limit_bytes for prediction in said), None)


def table_columns(group: Sequence[Row]) -> tuple[Column, ...]:
    """The columns of one workload's table, as text; those that are empty in all rows are left out."""

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
        Column(header="to spare", cells=of(lambda r: signed_bytes(r.spare_bytes))),
        Column(header="fits", cells=of(_fits), right=False, short=of(_fits_shortly), shorten=2),
    )
    always = ("strategy", "peak allocated")
    return tuple(c for c in columns if c.header in always or any(cell != UNKNOWN for cell in c.cells))


def signed_bytes(count: int | None) -> str:
    """`−3.20 GiB`, with a minus sign that is as wide as a digit."""
    return format_bytes(count).replace("-", "−")


def notes(group: Sequence[Row]) -> tuple[str, ...]:
    """A line for each row that has a message; not for those whose columns say it."""
    return words.notes(row for row in group if row.status != "oom" or row.spare_bytes is None)


def choice(cells: Sequence[PredictedCell]) -> PredictedCell | None:
    """The strategy to look at first: of those that fit, the one that checkpoints the fewest layers.

    Where nothing fits, the one that comes nearest; without a bound, the lowest peak, or the fewest layers among those
    within 1 % of it. None where nothing was predicted.
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
    alike = [cell for cell in there if _peak(cell) <= lowest * (1 + _SAME_PEAK)]
    return min(alike, key=lambda cell: (cell.row.layers_checkpointed, _peak(cell)))


def summary(cells: Sequence[PredictedCell]) -> str:
    """The sentences under the table of one workload."""
    best = choice(cells)
    if best is None:
        return "Nothing could be predicted."
    there = [cell for cell in cells if cell.row.peak_allocated_bytes is not None]
    bounded = [cell for cell in there if cell.row.spare_bytes is not None]
    sentences = _room(bounded, best) if bounded else _savings(there, best)
    sentences.append(_peak_sentence(best, there))
    kernels = dict.fromkeys(kernel for cell in there if cell.prediction for kernel in cell.prediction.attention)
    if kernels:
        plural = "kernels" if len(kernels) > 1 else "kernel"
        aside = (
            ", which keeps whole matrices of scores, as no fused kernel takes it" if list(kernels) == ["math"] else ""
        )
        sentences.append(f"On this device attention takes the {listed(list(kernels))} {plural}{aside}.")
    return " ".join(sentences)


def where(cell: PredictedCell) -> str:
    """`in the loss and logits (backward pass)`: where in the step its peak is."""
    said = cell.prediction.explanation if cell.prediction else None
    if said is None:
        return f"in the {PHASES[cell.row.peak_phase or 'forward']}"
    place, _, phase = said.part.rpartition(", ")
    if not place or phase not in PHASES:
        return f"in the {said.part}"
    if place == "before the layers":
        return f"below the first layer ({PHASES[phase]})"
    return f"in {'' if place.startswith('layer ') else 'the '}{place} ({PHASES[phase]})"


def checkpointing_lever(prediction: Prediction | None) -> Lever | None:
    """What checkpointing every layer would do; None where every layer is, or where it was not tried."""
    levers = prediction.explanation.levers if prediction and prediction.explanation else ()
    return next((lever for lever in levers if lever.name == _EVERY_LAYER), None)


def _room(cells: Sequence[PredictedCell], best: PredictedCell) -> list[str]:
    """Which strategies fit, and with how much to spare."""
    limit = best.row.device_memory_bytes or 0
    failing = [cell for cell in cells if not may_run(cell)]
    if len(failing) == len(cells):
        return _nothing_fits(cells, best, limit)
    close = [cell for cell in cells if may_run(cell) and cell.row.fits == CLOSE]
    fitting = [cell for cell in cells if cell not in failing and cell not in close]
    name, spare = best.row.strategy, format_bytes(_spare(best))
    flushes = best.prediction is not None and bool(best.prediction.num_alloc_retries)
    tight = ", which is tight" if flushes or _spare(best) < _TIGHT * limit else ""
    of = f"{best.row.layers_checkpointed} of {best.row.num_layers}"
    if not fitting:
        sentences = [
            f"Whether {name} fits in {format_bytes(limit)} is too close to tell: it leaves {spare}, and what the "
            f"device holds may be {format_bytes(uncertain_bytes(best))} more than predicted."
        ]
    elif best.row.layers_checkpointed == 0:
        sentences = [
            f"{name} fits in {format_bytes(limit)} with {spare} to spare{tight}: nothing has to be recomputed."
        ]
    elif len(fitting) == 1:
        only = "Only " if failing and not close else ""
        sentences = [f"{only}{name} fits in {format_bytes(limit)}, with {spare} to spare{tight}."]
    elif len({cell.row.layers_checkpointed for cell in fitting}) == 1:
        sentences = [
            f"{_several(fitting)} fit in {format_bytes(limit)}, each with {of} layers checkpointed; {name} leaves the "
            f"most, {spare}{tight}."
        ]
    else:
        sentences = [
            f"{_several(fitting)} fit in {format_bytes(limit)}; {name} checkpoints the fewest layers ({of}) and leaves "
            f"{spare} to spare{tight}."
        ]
    roomiest = max(fitting or close, key=_spare)
    if _spare(roomiest) > _spare(best) * (1 + _SAME_PEAK):
        sentences.append(f"{roomiest.row.strategy} leaves the most, {format_bytes(_spare(roomiest))}.")
    others = [cell for cell in close if cell is not best]
    if others:
        rooms = listed([format_bytes(_spare(cell)) for cell in others])
        verb = "are" if len(others) > 1 else "is"
        sentences.append(f"{listed(_names(others))} {verb} too close to tell, with {rooms} to spare.")
    held = [cell for cell in failing if _spare(cell) >= 0]
    if held:
        verb = "fit" if len(held) > 1 else "fits"
        sentences.append(f"{listed(_names(held))} {verb} only without the reserve ({_reserve(best)}).")
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
            f"{opening} in {_usable(best)}: {nearest} needs {format_bytes(-_room_left(best))} more.",
            _only_the_reserve(cells, best),
        ]
    sentence = f"{opening} in {format_bytes(limit)}: {nearest} needs {format_bytes(-_spare(best))} more than there is."
    standing = _standing_bytes(best.prediction)
    if standing > limit:
        lora = "LoRA (--lora-r), " if row.lora_r is None else ""
        told = [
            sentence,
            f"Parameters, gradients and optimizer state alone take {format_bytes(standing)}, so no strategy and no "
            f"batch fits; {lora}a leaner optimizer, a smaller model or a larger device might.",
        ]
        devices = cards.among(standing, limit)
        if devices is not None:
            told.append(
                f"No card holds that much: {devices} or more of this size could share it (FSDP or ZeRO-3 in the "
                "trainer), and gcbench predicts one device."
            )
        return told
    batch = "a smaller batch, " if row.batch_size > 1 else ""
    return [sentence, f"Try {batch}a shorter sequence or a leaner optimizer."]


def _only_the_reserve(cells: Sequence[PredictedCell], best: PredictedCell) -> str:
    """What a smaller reserve would let in, and whether that is sure to fit."""
    limit, frac = best.row.device_memory_bytes or 0, _reserve_frac(best)
    smaller = headroom.smaller_reserve(limit - _spare(best), limit_bytes=limit, reserve_frac=frac) or 0.0
    there = headroom.usable_bytes(limit, smaller)
    let_in = [cell for cell in cells if limit - _spare(cell) <= there]
    verb = "fit" if len(let_in) > 1 else "fits"
    sure = ", which is too close to tell" if all(cell.row.fits == CLOSE for cell in let_in) else ""
    return (
        f"Only the reserve stands in the way: with {headroom.reserve_flag(smaller)} {_several(let_in)} {verb}, with "
        f"{format_bytes(max(map(_spare, let_in)))} of the device to spare{sure}."
    )


def nothing_fits(report: Report) -> str | None:
    """The sentence that ends a prediction of which no cell fits, with a remedy; None where one does."""
    cells = [cell for group in by_workload(report).values() for cell in group]
    bounded = [cell for cell in cells if cell.row.spare_bytes is not None]
    if not bounded or len(bounded) < len(cells) or any(map(may_run, bounded)):
        return None
    best = max(bounded, key=_spare)
    needs = format_bytes((best.row.device_memory_bytes or 0) - _spare(best))
    said = f"nothing fits into {_usable(best)}, the nearest is {best.row.strategy} with {needs}"
    if _spare(best) >= 0:
        return f"{said}; {_only_the_reserve(bounded, best).removesuffix('.').replace('Only', 'only')}"
    ways = ["a smaller batch"] if best.row.batch_size > 1 else []
    ways += ["a shorter sequence", "a leaner optimizer", "LoRA (--lora-r)" if best.row.lora_r is None else ""]
    return f"{said}; take {', '.join(filter(None, ways))} or a larger device"


def _standing_bytes(prediction: Prediction | None) -> int:
    """What parameters, gradients and optimizer state hold together at their highest; 0 where it is unknown."""
    if prediction is None or prediction.curve is None:
        return 0
    of_kind = dict(zip(prediction.curve.kinds, prediction.curve.nbytes, strict=True))
    return max(map(sum, zip(*(of_kind[kind] for kind in _STANDING if kind in of_kind), strict=True)), default=0)


def _savings(cells: Sequence[PredictedCell], best: PredictedCell) -> list[str]:
    """What checkpointing saves where no bound says what fits."""
    off = next((cell for cell in cells if cell.row.strategy == OFF), None)
    lowest = min(cells, key=_peak)
    if off is None:
        return [f"The lowest peak is that of {best.row.strategy}; add off to the strategies to see what it saves."]
    saved = lowest.row.memory_saved_frac or 0.0
    if len(cells) == 1:
        return [f"off has a peak of {format_bytes(_peak(off))}."]
    if saved < NOTHING:
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
    if left is not None and _peak(best) - left < NOTHING * _peak(best):
        return f"{text}, where checkpointing more saves nothing."
    return f"{text}."


def _with_more_layers(best: PredictedCell, cells: Sequence[PredictedCell]) -> int | None:
    """The lowest peak that more layers give, by the lever or by the other strategies; None where none was tried."""
    lever = checkpointing_lever(best.prediction)
    tried = [_peak(cell) for cell in cells if cell.row.layers_checkpointed > best.row.layers_checkpointed]
    return min([*tried, *([lever.peak_bytes] if lever else [])], default=None)


def _several(cells: Sequence[PredictedCell]) -> str:
    return listed(_names(cells)) if len(cells) <= _MOST_NAMES else f"{len(cells)} strategies"


def _names(cells: Sequence[PredictedCell]) -> list[str]:
    return [cell.row.strategy for cell in cells]


def _spare(cell: PredictedCell) -> int:
    return cell.row.spare_bytes or 0


def _room_left(cell: PredictedCell) -> int:
    """What the cell leaves of what may be used; negative where it does not fit there."""
    return _spare(cell) - (cell.row.device_memory_bytes or 0) + (cell.row.usable_bytes or 0)


def may_run(cell: PredictedCell) -> bool:
    """Whether it stays within the memory that may be used; it may still be too close to tell."""
    return _room_left(cell) >= 0


def uncertain_bytes(cell: PredictedCell) -> int:
    """By how much what the cell holds may be more than predicted."""
    return headroom.uncertain_bytes(cell.row.peak_reserved_bytes)


def _reserve_frac(cell: PredictedCell) -> float:
    return cell.prediction.reserve_frac if cell.prediction else 0.0


def _reserve(cell: PredictedCell) -> str:
    """`5.0 % of 39.39 GiB`."""
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
