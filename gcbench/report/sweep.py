"""Finds the series of a report over batch sizes or lengths, and the largest size at which each strategy fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from gcbench.core import headroom
from gcbench.core.records import Report, Row, Workload
from gcbench.report import sentences
from gcbench.report.rows import NO_REFERENCE, by_workload, failed_proof, rows
from gcbench.report.sentences import how_it_ended

Dimension = Literal["batch_size", "seq_len"]
DIMENSIONS: tuple[Dimension, ...] = ("batch_size", "seq_len")

Verdict = Literal["fits", "too close to tell", "does not fit", "unusable"]
FITS: Verdict = "fits"
CLOSE: Verdict = "too close to tell"
TOO_LARGE: Verdict = "does not fit"
UNUSABLE: Verdict = "unusable"
"""The cell crashed, was not reached or failed its proof, so its figures say nothing about the strategy."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The cells of workloads that differ in one dimension only.

    Attributes:
        label: what the workloads have in common, as far as it differs between the series of a report.
        sizes: batch sizes or lengths, ascending.
        cells: strategy -> size -> row.
    """

    dimension: Dimension
    label: str
    workload: Workload
    sizes: tuple[int, ...]
    cells: dict[str, dict[int, Row]]

    def of(self, strategy: str) -> tuple[tuple[int, Row], ...]:
        """Return (size, row) of the strategy's cells, by size."""
        return tuple(sorted(self.cells[strategy].items()))

    def timed(self, strategy: str) -> tuple[tuple[int, Row], ...]:
        """Return (size, row) of the strategy's cells that fit and have a step time, by size."""
        return tuple((size, row) for size, row in self.of(strategy) if is_timed(row))

    def has_fit(self) -> bool:
        """Return whether any cell has figures to show."""
        return any(verdict(row) in (FITS, CLOSE) for cells in self.cells.values() for row in cells.values())

    def has_times(self) -> bool:
        """Return whether any cell that fits has a step time."""
        return any(self.timed(strategy) for strategy in self.cells)


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest size of a series at which a strategy fits.

    Attributes:
        size, row: of that cell; None when the strategy fits at no size.
        is_bound: whether the next larger size was tried and does not fit; if not, the strategy may fit at more.
        beyond: how the next larger size ended, such as `8: out of memory`, or `largest tried`.
    """

    strategy: str
    size: int | None
    row: Row | None
    is_bound: bool
    beyond: str


def series(report: Report, dimension: Dimension) -> tuple[Series, ...]:
    """Return the series over `dimension` with at least two sizes, one for each rest of the workload."""
    groups: dict[Workload, dict[int, tuple[Row, ...]]] = {}
    for workload, group in by_workload(rows(report)).items():
        groups.setdefault(_without(workload, dimension), {})[getattr(workload, dimension)] = group
    groups = {rest: by_size for rest, by_size in groups.items() if len(by_size) > 1}
    labels = _labels(list(groups), dimension)
    return tuple(
        _series(dimension, label, rest, by_size) for label, (rest, by_size) in zip(labels, groups.items(), strict=True)
    )


def words(dimension: Dimension, size: int) -> str:
    """Return `batch 4` or `512 tokens`."""
    return f"batch {size}" if dimension == "batch_size" else f"{size} tokens"


def verdict(row: Row) -> Verdict:
    """Return whether the cell fits on the device; a cell in the reserve does not."""
    if row.source == "predicted":
        if row.peak_allocated_bytes is None:
            return UNUSABLE
        if row.spare_bytes is None or row.device_memory_bytes is None:
            return FITS
        needed, usable = row.device_memory_bytes - row.spare_bytes, row.usable_bytes
        if needed > (row.device_memory_bytes if usable is None else usable):
            return TOO_LARGE
        return CLOSE if row.fits == headroom.CLOSE else FITS
    if row.status == "oom":
        return TOO_LARGE
    return UNUSABLE if row.status != "ok" or row.peak_allocated_bytes is None or failed_proof(row) else FITS


def is_timed(row: Row) -> bool:
    """Return whether the cell fits and has a step time."""
    return verdict(row) in (FITS, CLOSE) and row.step_time_s is not None and row.tokens_per_s is not None


def ending(row: Row) -> str:
    """Return why a cell is not the largest that fits, in words."""
    if row.source == "predicted" and row.fits == headroom.RESERVED:
        return "fits only in the reserve"
    kind = verdict(row)
    if kind in (CLOSE, TOO_LARGE):
        return sentences.FAILURES["oom"] if kind == TOO_LARGE and row.source != "predicted" else kind
    if row.status != "ok":
        return how_it_ended(row)
    return "failed the proof" if failed_proof(row) else f"not {row.source}"


def largest(each: Series) -> tuple[Largest, ...]:
    """Return the largest size that fits for every strategy, in the order of the report."""
    return tuple(_largest(each, strategy) for strategy in each.cells)


def tokens_per_s_interval(row: Row) -> tuple[float, float] | None:
    """Return (low, high) of the tokens per second, from the interval of the step time; None without one."""
    if not row.step_time_low_s or row.step_time_high_s is None:
        return None
    tokens = row.batch_size * row.seq_len
    return tokens / row.step_time_high_s, tokens / row.step_time_low_s


@dataclass(frozen=True, kw_only=True)
class CountedMemory:
    """The memory that counts against a device's limit.

    Attributes:
        name: `process`, `reserved` or `allocated`.
        limit_bytes: memory of the device; None where it has no limit.
        usable_bytes: that memory less the reserve of a prediction, where there is one.
        limit_name: what the limit is, in words.
    """

    name: Literal["process", "reserved", "allocated"]
    limit_bytes: int | None
    usable_bytes: int | None
    limit_name: str

    def of(self, row: Row) -> int | None:
        """Return the bytes of a cell; None where they are unknown."""
        return {
            "process": row.peak_process_bytes,
            "reserved": row.peak_reserved_bytes,
            "allocated": row.peak_allocated_bytes,
        }[self.name]


def counted_memory(report: Report) -> CountedMemory:
    """Return which memory of the report's cells counts against the limit, and the limit.

    A prediction compares the process with the card, `run --memory-limit` what the caching allocator reserves with the
    limit. On a CPU, which has no such allocator, tensors alone are counted.
    """
    table = [row for row in rows(report) if verdict(row) in (FITS, CLOSE)]
    on_cpu = sentences.device_type(report.machine.device) == "cpu"
    if report.source == "predicted":
        row = next((row for row in table if row.device_memory_bytes is not None), None)
        usable = row.usable_bytes if row and row.usable_bytes != row.device_memory_bytes else None
        limit = row.device_memory_bytes if row else None
        name = "device memory"
        candidates: tuple[Literal["process", "reserved"], ...] = ("process",) if limit is not None else ()
    else:
        stated = report.settings.get("memory_limit")
        usable, limit = None, stated if isinstance(stated, int) else report.machine.device_memory_bytes
        name = "memory limit" if isinstance(stated, int) else "memory of the machine" if on_cpu else "device memory"
        candidates = ("reserved",) if isinstance(stated, int) else ("process", "reserved")
    for counted in () if on_cpu else candidates:
        memory = CountedMemory(name=counted, limit_bytes=limit, usable_bytes=usable, limit_name=name)
        if table and all(memory.of(row) is not None for row in table):
            return memory
    return CountedMemory(name="allocated", limit_bytes=limit, usable_bytes=usable, limit_name=name)


def _without(workload: Workload, dimension: Dimension) -> Workload:
    return replace(workload, batch_size=0) if dimension == "batch_size" else replace(workload, seq_len=0)


def _labels(rests: Sequence[Workload], dimension: Dimension) -> tuple[str, ...]:
    """Return a label of each rest of a workload: its other dimension, and whatever else differs."""
    differing = [
        f.name
        for f in fields(Workload)
        if f.name not in DIMENSIONS and len({getattr(rest, f.name) for rest in rests}) > 1
    ]
    other: Dimension = "seq_len" if dimension == "batch_size" else "batch_size"
    return tuple(
        " · ".join([words(other, getattr(rest, other)), *(str(getattr(rest, name) or "–") for name in differing)])
        for rest in rests
    )


def _series(dimension: Dimension, label: str, rest: Workload, by_size: dict[int, tuple[Row, ...]]) -> Series:
    names = dict.fromkeys(row.strategy for group in by_size.values() for row in group)
    cells: dict[str, dict[int, Row]] = {name: {} for name in names}
    for size, group in by_size.items():
        for row in group:
            cells[row.strategy][size] = row
    return Series(dimension=dimension, label=label, workload=rest, sizes=tuple(sorted(by_size)), cells=cells)


def _largest(each: Series, strategy: str) -> Largest:
    cells = each.cells[strategy]
    fitting = [size for size, row in cells.items() if verdict(row) == FITS and not _is_doubtful(row, cells)]
    size = max(fitting, default=None)
    larger = [other for other in each.sizes if size is None or other > size]
    if not larger:
        beyond, is_bound = "largest tried", False
    else:
        after = cells.get(larger[0])
        why = "not among the cells" if after is None else NO_REFERENCE if _is_doubtful(after, cells) else ending(after)
        beyond = f"{larger[0]}: {why}"
        is_bound = after is not None and verdict(after) == TOO_LARGE
    return Largest(
        strategy=strategy,
        size=size,
        row=None if size is None else cells[size],
        is_bound=is_bound,
        beyond=beyond,
    )


def _is_doubtful(row: Row, cells: Mapping[int, Row]) -> bool:
    """Return whether gradients were not compared, as `off` has none there, and were wrong at another size."""
    return row.proof == NO_REFERENCE and any(map(failed_proof, cells.values()))
