"""Compares two runs: matches their cells, judges memory and time, and checks thresholds."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from gcbench.core.errors import UsageError
from gcbench.core.records import Cell, Outcome, Report, Row
from gcbench.core.units import format_bytes, format_percent, format_seconds
from gcbench.report import sentences as words
from gcbench.report import stats
from gcbench.report.change import Change as Change
from gcbench.report.change import Verdict as Verdict
from gcbench.report.formats.terminal import UNKNOWN, Column, Table
from gcbench.report.rows import failed_proof, rows
from gcbench.report.thresholds import THRESHOLDS as THRESHOLDS
from gcbench.report.thresholds import parse_threshold as parse_threshold

if TYPE_CHECKING:
    from rich.console import RenderableType

FORCE = "--force"
PROOF_FAILED = "proof failed"
_TOO_FEW_ROUNDS = (
    f"times have too few rounds for an interval, so they are not judged; --rounds {stats.MIN_ROUNDS} in both gives one"
)
_ANY = ""
"""Replaces, in the key of a cell, a value that is not compared."""

_OF_MEASURING = {"warmup", "steps", "rounds", "target_interval", "max_time", "timeout", "emulate"}
"""Settings that runs of different sources have each their own of."""
_IN_THE_KEY = {
    "model",
    "batch_size",
    "seq_len",
    "strategies",
    "precision",
    "optim",
    "attn_implementation",
    "device",
    "lora_r",
}
"""Settings that decide which cells a run has; they are compared as parts of the cells."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The cells of two runs, those of A first, and in sentences what else differs between the runs."""

    changes: tuple[Change, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A cell in one of the runs."""

    row: Row
    outcome: Outcome

    @property
    def status(self) -> str:
        return PROOF_FAILED if self.row.status == "ok" and failed_proof(self.row) else self.row.status


def compare(a: Report, b: Report, *, force: bool) -> Comparison:
    """Match the cells of two runs and judge each.

    Raises UsageError when the runs differ in device, precision or the model's size, unless `force`, which ignores
    these; and when no cell matches.
    """
    clashes = _clashes(a, b)
    if clashes and not force:
        raise UsageError(
            f"the runs cannot be compared: {'; '.join(clashes.values())}; "
            f"measure again under the same conditions, or add {FORCE} to compare anyway"
        )
    ignored = {*clashes, *(["device"] if a.source != b.source else [])}
    cells_a, cells_b = _cells(a, ignored), _cells(b, ignored)
    if not cells_a.keys() & cells_b.keys():
        raise UsageError(f"the runs have no cell in common: A has {_extent(a)}; B has {_extent(b)}")
    keys = dict.fromkeys((*cells_a, *cells_b))
    changes = tuple(_change(key, cells_a.get(key), cells_b.get(key)) for key in keys)
    too_few = (_TOO_FEW_ROUNDS,) if any(change.time_verdict == "too few rounds" for change in changes) else ()
    despite = (f"compared despite {clash}" for clash in clashes.values())
    return Comparison(
        changes=changes,
        notices=(*words.sources(a, b), *despite, *too_few, *_basis(changes), *_differences(a, b), *_about_models(a, b)),
    )


def _basis(changes: Iterable[Change]) -> tuple[str, ...]:
    """Say that changes of time are of processor time, where step times beside them are wall time."""
    if not any(change.time_change_basis == stats.PROCESSOR_TIME for change in changes):
        return ()
    return (
        "changes of time are of processor time (user), which leaves out what other processes take; step times are wall "
        "time",
    )


def broken(comparison: Comparison, thresholds: Mapping[str, float]) -> list[str]:
    """Return a sentence for each cell of B that breaks one of the thresholds (name -> fraction).

    Memory is exact: any peak beyond the threshold breaks it. Time breaks it when the centre lies beyond it and the
    interval excludes no difference. A cell that fails only in B breaks every threshold.
    """
    sentences = []
    for change in comparison.changes if thresholds else ():
        where = f"{change.strategy} at {change.cell}"
        if change.memory_verdict == "newly failing":
            sentences.append(f"{where}: passed in A and fails in B ({_status(change.status_b)})")
            continue
        for name, limit in thresholds.items():
            frac, text = _growth(change, name)
            if frac is not None and frac > limit:
                sentences.append(f"{where}: {text}, and {100 * limit:g} % is allowed")
    return sentences


def _growth(change: Change, name: str) -> tuple[float | None, str]:
    """Return by how much B is worse in memory or time, and that in words; None where it is not shown to be worse."""
    a, b = change.peak_allocated_a_bytes, change.peak_allocated_b_bytes
    if name == "memory" and change.memory_verdict in ("worse", "above") and a is not None and b is not None:
        percent = _percent(change.memory_change_frac)
        return change.memory_change_frac, f"peak memory grew by {format_bytes(b - a)} ({percent})"
    if name == "time" and change.time_verdict == "worse":
        limits = words.interval(change.time_change_low_frac, change.time_change_high_frac)
        return (
            change.time_change_frac,
            f"a step takes {format_percent(change.time_change_frac)} longer (95 %: {limits})",
        )
    return None, ""


def to_rows(comparison: Comparison) -> list[dict[str, object]]:
    """Return the changes for --json, in bytes, seconds and fractions; unknown is None."""
    return [asdict(change) for change in comparison.changes]


def render(comparison: Comparison) -> list[RenderableType]:
    """Return a table per workload, then notes on what else differs."""
    from rich.text import Text

    groups: dict[str, list[Change]] = {}
    for change in comparison.changes:
        groups.setdefault(change.cell, []).append(change)
    parts: list[RenderableType] = [_table(title, group) for title, group in groups.items()]
    return [*parts, *(Text(f"Note: {notice}") for notice in comparison.notices)]


def _table(title: str, group: Sequence[Change]) -> Table:
    def times(change: Change) -> str:
        limits = words.interval(change.time_change_low_frac, change.time_change_high_frac)
        return f"{_percent(change.time_change_frac)} ({limits})" if limits else _percent(change.time_change_frac)

    unequal = [c for c in group if {c.status_a, c.status_b} - {"ok", None}]
    return Table(
        title=title,
        columns=(
            Column(header="strategy", cells=tuple(c.strategy for c in group), right=False),
            Column(header="peak A", cells=tuple(format_bytes(c.peak_allocated_a_bytes) for c in group), drop=2),
            Column(header="peak B", cells=tuple(format_bytes(c.peak_allocated_b_bytes) for c in group), drop=2),
            Column(header="Δ memory", cells=tuple(_memory(c) for c in group)),
            Column(header="memory", cells=tuple(c.memory_verdict for c in group), right=False),
            Column(header="step A", cells=tuple(format_seconds(c.step_time_a_s) for c in group), drop=1),
            Column(header="step B", cells=tuple(format_seconds(c.step_time_b_s) for c in group), drop=1),
            Column(
                header="Δ time (95 %)" if any(c.time_change_low_frac is not None for c in group) else "Δ time",
                cells=tuple(times(c) for c in group),
                short_header="Δ time",
                short=tuple(_percent(c.time_change_frac) for c in group),
                shorten=3,
            ),
            Column(header="time", cells=tuple(c.time_verdict for c in group), right=False),
        ),
        notes=tuple(f"{c.strategy}: A {_status(c.status_a)}, B {_status(c.status_b)}" for c in unequal),
    )


def _memory(change: Change) -> str:
    frac = change.memory_change_frac
    if change.memory_verdict in ("above", "below") and frac is not None:
        return f"{100 * frac:+.3f} %".replace("-", "−")  # the error of a prediction
    return "same" if change.memory_verdict == "same" else _percent(frac)


def _percent(frac: float | None) -> str:
    return UNKNOWN if frac is None else format_percent(frac, sign=True)


def _status(status: str | None) -> str:
    return "has no such cell" if status is None else words.FAILURES.get(status, status)


def _cells(report: Report, ignored: Collection[str]) -> dict[Cell, _Side]:
    """Return the cells of a run that have a result, by a key without what is not compared."""
    cells = {}
    for row, outcome in zip(rows(report), report.outcomes, strict=True):
        if outcome.rounds or outcome.failure or outcome.prediction:
            w = outcome.cell.workload
            w = replace(w, device=_ANY if "device" in ignored else words.device_type(w.device))
            w = replace(w, precision=_ANY) if "precision" in ignored else w
            w = replace(w, model_changes=None)  # different changes may build the same model
            cells[replace(outcome.cell, workload=w)] = _Side(row=row, outcome=outcome)
    return cells


def _change(cell: Cell, a: _Side | None, b: _Side | None) -> Change:
    a, b = _as_far_as_known(a, b), _as_far_as_known(b, a)
    state = _state(a, b)
    peak_a, peak_b = (side.row.peak_allocated_bytes if side else None for side in (a, b))
    paid = stats.change(a.outcome.rounds, b.outcome.rounds) if a and b and state is None else None
    return Change(
        model=cell.workload.model,
        strategy=cell.strategy,
        device=cell.workload.device or None,
        batch_size=cell.workload.batch_size,
        seq_len=cell.workload.seq_len,
        precision=cell.workload.precision or None,
        optim=cell.workload.optim,
        attn_implementation=cell.workload.attn_implementation,
        status_a=a.status if a else None,
        status_b=b.status if b else None,
        memory_verdict=state
        or _memory_verdict(peak_a, peak_b, is_mixed=bool(a and b and a.row.source != b.row.source)),
        time_verdict=state or _time_verdict(paid),
        peak_allocated_a_bytes=peak_a,
        peak_allocated_b_bytes=peak_b,
        memory_change_frac=(peak_b - peak_a) / peak_a if peak_a and peak_b and state is None else None,
        step_time_a_s=a.row.step_time_s if a else None,
        step_time_b_s=b.row.step_time_s if b else None,
        time_change_frac=paid.centre if paid else None,
        time_change_low_frac=paid.low if paid else None,
        time_change_high_frac=paid.high if paid else None,
        time_change_basis=stats.change_basis(a.outcome.rounds, b.outcome.rounds) if a and b and paid else None,
        lora_r=cell.workload.lora_r,
        model_changes_a=a.row.model_changes if a else None,
        model_changes_b=b.row.model_changes if b else None,
    )


def _as_far_as_known(side: _Side | None, other: _Side | None) -> _Side | None:
    """Return `side`; a prediction beside a measurement without its time, and as passed if it only does not fit."""
    if side is None or other is None or side.row.source == other.row.source or side.row.source != "predicted":
        return side
    row = replace(side.row, step_time_s=None)
    if other.status == "ok" and row.status == "oom" and row.peak_allocated_bytes is not None:
        row = replace(row, status="ok")
    return replace(side, row=row)


def _state(a: _Side | None, b: _Side | None) -> Verdict | None:
    """Return the verdict on a cell that did not pass in both runs; None if it did."""
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    passed = (a.status == "ok", b.status == "ok")
    states: dict[tuple[bool, bool], Verdict] = {
        (False, False): "both fail",
        (True, False): "newly failing",
        (False, True): "newly passing",
    }
    return states.get(passed)


def _memory_verdict(a: int | None, b: int | None, *, is_mixed: bool) -> Verdict:
    if a is None or b is None:
        return "not measured"
    if is_mixed and a != b:
        return "above" if b > a else "below"
    return "same" if a == b else "worse" if b > a else "better"


def _time_verdict(paid: stats.Estimate | None) -> Verdict:
    if paid is None:
        return "not measured"
    if paid.interval is None:
        return "too few rounds"
    if paid.interval[0] <= 0 <= paid.interval[1]:
        return "no difference shown"
    return "worse" if paid.centre > 0 else "better"


def _clashes(a: Report, b: Report) -> dict[str, str]:
    """Return what makes figures incomparable: name -> sentence; `device` and `precision` are fields of the key."""
    devices = [f"{report.machine.device_name} ({words.device_type(report.machine.device)})" for report in (a, b)]
    precisions = [
        ", ".join(dict.fromkeys(outcome.cell.workload.precision for outcome in report.outcomes)) for report in (a, b)
    ]
    pairs = {"device": devices, "precision": precisions}
    if a.source != b.source and a.machine.device_name == b.machine.device_name:
        del pairs["device"]  # named in a prediction, numbered in a run
    if a.model.model == b.model.model:  # the same name, changed by --layers or --set
        pairs["number of parameters"] = [f"{report.model.num_params:,}" for report in (a, b)]
    return {name: _differ(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1] and all(pair)}


def _differences(a: Report, b: Report) -> list[str]:
    """Return what else differs between the runs, which may explain a change."""
    facts_a, facts_b = _facts(a), _facts(b)
    names = dict.fromkeys((*facts_a, *facts_b))
    return [
        _differ(name, facts_a.get(name, UNKNOWN), facts_b.get(name, UNKNOWN))
        for name in names
        if facts_a.get(name) != facts_b.get(name)
        # A prediction and a measurement have settings of their own.
        and (a.source == b.source or (name in facts_a and name in facts_b and name not in _OF_MEASURING))
    ]


def _about_models(a: Report, b: Report) -> list[str]:
    """Return how the models differ from their configs, and in which run."""
    notices = dict.fromkeys((*a.model_notices, *b.model_notices))
    both = {text: [name for name, report in (("A", a), ("B", b)) if text in report.model_notices] for text in notices}
    return [f"{' and '.join(names)}: {text}" for text, names in both.items()]


def _facts(report: Report) -> dict[str, str]:
    settings = {name: value for name, value in report.settings.items() if name not in _IN_THE_KEY}
    return {
        "gcbench": report.gcbench_version,
        "platform": report.machine.platform,
        **report.machine.versions,
        **report.machine.settings,
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
    }


def _differ(name: str, a: str, b: str) -> str:
    return f"different {name} (A: {a}, B: {b})"


def _extent(report: Report) -> str:
    """Return the cells of a run in words, for a message."""
    strategies: dict[str, list[str]] = {}
    for outcome in report.outcomes:
        if outcome.rounds or outcome.failure or outcome.prediction:
            strategies.setdefault(words.title(outcome.cell.workload), []).append(outcome.cell.strategy)
    shown = [f"{title} ({', '.join(names)})" for title, names in strategies.items()]
    more = f" and {len(shown) - 2} more workloads" if len(shown) > 2 else ""
    return ", ".join(shown[:2]) + more if shown else "none that was measured"
