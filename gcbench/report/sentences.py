"""Summarizes a table in sentences: the strategy that saves most, what it costs, and where the peak is then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gcbench.core import model_changes
from gcbench.core.records import Report, Row, Workload
from gcbench.core.units import format_bytes, format_percent, format_seconds
from gcbench.core.units import listed as listed
from gcbench.report.rows import NOTHING_SHOWN, failed_proof, hides_saving
from gcbench.report.stats import MIN_ROUNDS
from gcbench.strategies import OFF

FAILURES = {
    "oom": "out of memory",
    "unsupported": "not supported",
    "timeout": "timed out",
    "killed": "killed",
    "crash": "crashed",
}
"""Kind of failure -> the words for it in tables."""

PHASES = {"forward": "forward pass", "backward": "backward pass", "optimizer": "optimizer step"}

TOO_FEW_ROUNDS = f"too few rounds for an interval; --rounds {MIN_ROUNDS} gives one"

_CANNOT_HELP = (
    "No strategy saves memory: with this batch the peak is in the optimizer step, where checkpointing cannot help; "
    "raise the batch, or use a leaner optimizer."
)

SAME_PEAK_FRAC = 0.01
"""Peaks that differ by less count as the same when a cheaper strategy is searched for."""
_INVISIBLE_FRAC = 0.0005
"""A smaller fraction reads 0.0 %."""


def title(workload: Workload, *, model: bool = True, device: bool = True) -> str:
    """Return `gpt2 · batch 16 × 64 tokens · fp32 · adamw_torch · sdpa · cpu`, on request without model or device."""
    parts = [model_changes.named(workload.model, workload.model_changes)] if model else []
    parts += [f"batch {workload.batch_size} × {workload.seq_len} tokens", workload.precision, workload.optim]
    if workload.lora_r is not None:
        parts.append(lora(workload.lora_r))
    if workload.attn_implementation is not None:
        parts.append(workload.attn_implementation)
    if device:
        parts.append(workload.device)
    return " · ".join(parts)


def model_of(report: Report) -> str:
    """Return the model of a report, with the changes to its config."""
    return model_changes.named(
        report.model.model, model_changes.describe(report.settings.get("layers"), report.settings.get("set"))
    )


def lora(rank: int) -> str:
    """Return `LoRA r=8`."""
    return f"LoRA r={rank}"


def how_it_ended(row: Row) -> str:
    """Return how a failed cell ended; a prediction does not fit rather than runs out of memory."""
    return "does not fit" if row.status == "oom" and row.source == "predicted" else FAILURES[row.status]


EMULATED = (
    "Emulated: PyTorch's own CUDA code and its allocator ran on a card that is not there. Peaks and recomputed layers "
    "are real; nothing was computed, so there are no times and no gradients."
)
"""What the figures of an emulated card are, below every table of them."""
_SOURCES = {"measured": "measured", "emulated": "emulated: real steps that compute nothing", "predicted": "predicted"}


def is_emulated(rows: Iterable[Row]) -> bool:
    """Return whether the rows are of an emulated card."""
    return any(row.source == "emulated" for row in rows)


def emulated_card(report: Report) -> str:
    """Return `NVIDIA H100 80GB HBM3, 79.20 GiB`: the card that the report emulates, with its memory."""
    machine = report.machine
    return f"{machine.device_name}, {format_bytes(machine.device_memory_bytes)}"


def sources(a: Report, b: Report) -> tuple[str, ...]:
    """Say where the figures of two runs come from, unless both were measured or both predicted."""
    if a.source == b.source != "emulated":
        return ()
    sides = (("A", a), ("B", b))
    each = [f"{name} is {_SOURCES[report.source]} ({report.machine.device_name})" for name, report in sides]
    timed = [name for name, report in sides if _predicts_times(report)]
    without = [name for name, report in sides if report.source != "measured" and name not in timed]
    parts = [f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no times"] if without else []
    parts += [f"the times of {name} are predicted, and are not compared with measured ones" for name in timed]
    return ("; ".join([*each, *parts]),)


def _predicts_times(report: Report) -> bool:
    return any(outcome.prediction and outcome.prediction.time for outcome in report.outcomes)


def notes(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return a line for each row that has a message."""
    return tuple(
        f"{row.strategy}: {row.message if row.status == 'ok' else f'{how_it_ended(row)}: {row.message}'}"
        for row in rows
        if row.message
    )


def device_type(device: str) -> str:
    """Return `cuda` for `cuda:1`."""
    return device.partition(":")[0]


def summary(rows: Sequence[Row]) -> str:
    """Return the sentences below the table of one workload; `rows` are the cells of that workload."""
    usable = [row for row in rows if row.status == "ok" and row.peak_allocated_bytes is not None]
    proven = [row for row in usable if not hides_saving(row)]
    off = next((row for row in rows if row.strategy == OFF), None)
    others = [row for row in proven if row.strategy != OFF]
    broken = [row for row in usable if failed_proof(row)]
    sentences = []
    if not usable:
        sentences.append(_nothing_measured(rows))
    elif off and off.peak_allocated_bytes is not None and not hides_saving(off):
        sentences.extend(_against_off(off, others, [row for row in rows if row.strategy != OFF and row not in broken]))
    elif off and hides_saving(off) and not failed_proof(off):
        sentences.append(_unrepeatable(off))
    elif others:
        sentences.extend(_without_off(off, others))
    if broken:
        sentences.append(_broken(broken))
    if is_emulated(rows):
        sentences.append(EMULATED)
    if usable and device_type(usable[0].device) == "cpu":
        sentences.append(
            "These are CPU figures: the memory of activations carries over to a GPU only roughly, and times do not."
        )
    return " ".join(sentences)


def interval(low: float | None, high: float | None) -> str | None:
    """Return `22 to 33 %` for 0.22 and 0.33, with a decimal below 10 % or where both would look equal."""
    if low is None or high is None:
        return None
    whole = max(abs(low), abs(high)) >= 0.0995 and round(100 * low) != round(100 * high)
    start, end = (f"{100 * end:.{0 if whole else 1}f}".replace("-", "−") for end in (low, high))
    return f"{start} to {end} %"


def tokens(per_second: float | None) -> str:
    """Return `2,048` for tokens per second, with a decimal below 100."""
    return "–" if per_second is None else f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def time_paid(row: Row) -> str:
    """Return `for 27 % more time (95 %: 22 to 33 %)`, with the interval or the reason why there is none."""
    paid, low, high = row.time_overhead_frac, row.time_overhead_low_frac, row.time_overhead_high_frac
    if row.source == "emulated":
        return ""
    if paid is None:
        return "at a time that was not measured against off"
    limits = interval(low, high)
    if low is None or high is None:
        basis = TOO_FEW_ROUNDS
    else:
        basis = f"95 %: {limits}"
        if low <= 0 <= high:
            return f"with no difference in time shown ({basis})"
    if abs(paid) < _INVISIBLE_FRAC:
        return f"for less than 0.1 % of the time ({basis})"
    return f"for {format_percent(abs(paid))} {'more' if paid > 0 else 'less'} time ({basis})"


def _against_off(off: Row, others: Sequence[Row], tried: Sequence[Row]) -> list[str]:
    peak, where = format_bytes(off.peak_allocated_bytes), PHASES[off.peak_phase or "forward"]
    if not others:
        reason = f": {_endings(tried)}" if tried else ""
        return [f"Only off was {off.source}{reason}; its peak is {peak}, in the {where}."]
    best = min(others, key=_by_peak)
    saved = best.memory_saved_frac or 0.0
    if saved < _INVISIBLE_FRAC and off.peak_phase == "optimizer":
        return [_CANNOT_HELP]
    if saved < _INVISIBLE_FRAC:
        return [f"No strategy saves memory: off has a peak of {peak}, in the {where}, and none is below it."]
    text = f"{best.strategy} saves {format_percent(saved)} of peak memory {time_paid(best)}".rstrip()
    sentences = [f"{text}; {_where_now(best, off)}."]
    cheaper = _cheaper(best, others)
    if cheaper:
        sentences.append(f"{cheaper.strategy} comes within 1 % of the same peak {time_paid(cheaper)}.")
    return sentences


def _where_now(best: Row, off: Row) -> str:
    adverb = "still" if best.peak_phase == off.peak_phase else "now"
    text = f"the peak is {adverb} in the {PHASES[best.peak_phase or 'forward']}"
    return f"{text}, so checkpointing more will not help" if best.peak_phase == "optimizer" else text


def _cheaper(best: Row, others: Sequence[Row]) -> Row | None:
    """Return the cheapest strategy with the same peak whose interval shows it to be cheaper; None if there is none."""
    limit = (best.peak_allocated_bytes or 0) * (1 + SAME_PEAK_FRAC)
    cheaper = [
        row for row in others if row is not best and (row.peak_allocated_bytes or 0) <= limit and _is_cheaper(row, best)
    ]
    return min(cheaper, key=_by_time, default=None)


def _is_cheaper(row: Row, than: Row) -> bool:
    high, low = row.time_overhead_high_frac, than.time_overhead_low_frac
    return high is not None and low is not None and high < low


def _without_off(off: Row | None, others: Sequence[Row]) -> list[str]:
    best = min(others, key=_by_peak)
    peak, where = format_bytes(best.peak_allocated_bytes), PHASES[best.peak_phase or "forward"]
    if off is not None and off.status == "oom":
        step = f" and steps of {format_seconds(best.step_time_s)}" if best.step_time_s is not None else ""
        sentences = [f"off does not fit in memory; {best.strategy} does, with a peak of {peak} in the {where}{step}."]
        fastest = min((row for row in others if row.step_time_s is not None), key=_by_time, default=best)
        high, low = fastest.step_time_high_s, best.step_time_low_s
        if fastest is not best and high is not None and low is not None and high < low:
            sentences.append(
                f"{fastest.strategy} fits too, with a peak of {format_bytes(fastest.peak_allocated_bytes)} "
                f"and steps of {format_seconds(fastest.step_time_s)}."
            )
        return sentences
    if off is None:
        why = f"off was not {best.source}, so what checkpointing saves is unknown; add off to the strategies."
    elif failed_proof(off):
        why = "off failed the proof, so what checkpointing saves is unknown."
    else:
        why = f"{_endings([off])}, so what checkpointing saves is unknown."
    return [f"The lowest peak is that of {best.strategy}: {peak}, in the {where}.", why]


def _nothing_measured(rows: Sequence[Row]) -> str:
    if all(row.status == "oom" for row in rows):
        return "Nothing fits in memory; try a smaller batch, a shorter sequence or a leaner optimizer."
    return f"Nothing was {rows[0].source}: {_endings(rows)}."


def _endings(rows: Iterable[Row]) -> str:
    """Return `off crashed; per-layer timed out`, with strategies that ended the same way grouped."""
    endings: dict[str, list[str]] = {}
    for row in rows:
        endings.setdefault(FAILURES.get(row.status, "was not reached"), []).append(row.strategy)
    return "; ".join(f"{listed(names)} {_verb(ending, len(names))}" for ending, names in endings.items())


def _verb(ending: str, count: int) -> str:
    if ending == "out of memory":
        return "ran out of memory"
    plural = count > 1
    forms = {
        "not supported": "are not supported" if plural else "is not supported",
        "killed": "were killed" if plural else "was killed",
        "was not reached": "were not reached" if plural else "was not reached",
    }
    return forms.get(ending, ending)


def _broken(rows: Sequence[Row]) -> str:
    reasons = "; ".join(f"{row.strategy}: {_why(row)}" if len(rows) > 1 else _why(row) for row in rows)
    pronoun = "its figures are" if len(rows) == 1 else "their figures are"
    return f"{listed([row.strategy for row in rows])} failed the proof ({reasons}), so {pronoun} not to be used."


def _unrepeatable(off: Row) -> str:
    noise = off.grad_noise_floor
    size = f" by {noise:.2g}" if noise is not None and math.isfinite(noise) else ""
    return (
        f"{NOTHING_SHOWN[0].upper()}{NOTHING_SHOWN[1:]}. Its gradients differ{size} from run to run, with the same "
        "weights, batch and seeds, so no saving is shown; peaks and times are as measured."
    )


def _why(row: Row) -> str:
    return (row.proof or "").partition(": ")[2]


def _by_peak(row: Row) -> tuple[float, float]:
    return (row.peak_allocated_bytes or 0, _by_time(row))


def _by_time(row: Row) -> float:
    return row.step_time_s if row.step_time_s is not None else float("inf")
