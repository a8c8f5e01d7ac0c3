"""Summarizes a report over batch sizes or lengths: memory and tokens/s at each strategy's largest size that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gcbench.core.records import Report, Row
from gcbench.core.text_table import UNKNOWN, Column, Table
from gcbench.core.units import format_bytes, format_percent
from gcbench.report import predictions as predicted
from gcbench.report import sentences
from gcbench.report.rows import failed_proof, hides_saving
from gcbench.report.sweep import (
    TOO_LARGE,
    CountedMemory,
    Dimension,
    Largest,
    Series,
    counted_memory,
    is_timed,
    largest,
    series,
    tokens_per_s_interval,
    verdict,
    words,
)
from gcbench.strategies import OFF

NONE_SHOWN, NO_INTERVAL = "none shown", "no interval"
_TITLES: dict[Dimension, str] = {
    "batch_size": "At each strategy's largest batch",
    "seq_len": "At each strategy's longest sequence",
}
_HEADERS: dict[Dimension, str] = {"batch_size": "largest batch", "seq_len": "longest sequence"}


def summaries(report: Report) -> tuple[Table, ...]:
    """Return a table for batch sizes, or for lengths where the batch does not vary; none where nothing fits."""
    for dimension in ("batch_size", "seq_len"):
        found = series(report, dimension)
        if any(each.has_fit() for each in found):
            return (_summary(report, dimension, found),)
    return ()


def _summary(report: Report, dimension: Dimension, found: Sequence[Series]) -> Table:
    several = len(found) > 1
    return Table(
        title=_TITLES[dimension],
        subtitle=_where(report, found),
        columns=_columns(found, counted_memory(report)),
        summary="\n".join(f"At {each.label}: {sentence(each)}" if several else sentence(each) for each in found),
    )


def _where(report: Report, found: Sequence[Series]) -> str:
    """Return `512 tokens · measured on NVIDIA H100 (cuda:0)`."""
    source = {
        "measured": f"measured on {report.machine.device_name} ({report.machine.device})",
        "emulated": f"emulated on {sentences.emulated_card(report)}",
        "predicted": f"predicted for {predicted.target(report)}",
    }[report.source]
    return source if len(found) > 1 else f"{found[0].label} · {source}"


def sentence(each: Series) -> str:
    """Return where `off` and the best other strategy end, and how their tokens/s compare."""
    ends = largest(each)
    fitting = [end for end in ends if end.row is not None]
    parts = [*_whole(each, ends, fitting), *_broken(each)]
    return " ".join(parts)


def _whole(each: Series, ends: Sequence[Largest], fitting: Sequence[Largest]) -> list[str]:
    if not fitting:
        return (
            [f"No strategy fits at {words(each.dimension, each.sizes[0])} or more."]
            if _all_too_large(each)
            else ["No strategy is shown to fit."]
        )
    if len(ends) > 1 and not each.has_times() and all(end.size == each.sizes[-1] for end in ends):
        return [f"Every strategy fits {words(each.dimension, each.sizes[-1])}, the largest tried."]
    off = next((end for end in ends if end.strategy == OFF), None)
    others = [end for end in fitting if end.strategy != OFF]
    fastest = max(others, key=_rank, default=None)
    parts = [_of_off(each, off), _of(each, fastest, off) if fastest else ""]
    text = [f"{'; '.join(filter(None, parts))}."]
    longest = max(others, key=lambda end: (end.size or 0, _rank(end)), default=None)
    if fastest and longest and (longest.size or 0) > (fastest.size or 0):
        text.append(f"{_of(each, longest, off)}.")
    return text


def _all_too_large(each: Series) -> bool:
    return all(verdict(row) == TOO_LARGE for cells in each.cells.values() for row in cells.values())


def _rank(end: Largest) -> tuple[float, ...]:
    """Order by tokens/s; without times by size, then by how few layers are checkpointed and by the lowest peak."""
    row = end.row
    if row is None:
        return (-1.0,)
    return (row.tokens_per_s or 0.0, end.size or 0, -row.layers_checkpointed, -(row.peak_allocated_bytes or 0))


def _of_off(each: Series, off: Largest | None) -> str:
    if off is None:
        return "off is not among the strategies"
    if off.row is not None:
        return _of(each, off, None)
    smallest = each.cells[OFF].get(each.sizes[0])
    if smallest is not None and verdict(smallest) == TOO_LARGE:
        return f"off does not fit at {words(each.dimension, each.sizes[0])} or more"
    return f"off has no cell that is shown to fit ({off.beyond})"


def _of(each: Series, end: Largest, off: Largest | None) -> str:
    """Return `per-layer fits batch 16 at 2,870 tokens/s (24 % more)`."""
    if end.row is None or end.size is None:
        return ""
    at_least = "" if end.is_bound else "at least "
    text = f"{end.strategy} fits {at_least}{words(each.dimension, end.size)}"
    if not is_timed(end.row):
        return text
    text = f"{text} at {sentences.tokens(end.row.tokens_per_s)} tokens/s"
    difference = "" if off is None or off.row is None else _in_words(end.row, off.row)
    return f"{text} ({difference})" if difference else text


def _broken(each: Series) -> list[str]:
    """Say which cells failed their proof, as their figures are left out."""
    places = [
        f"{strategy} at {words(each.dimension, size)}"
        for strategy in each.cells
        for size, row in each.of(strategy)
        if row.status == "ok" and failed_proof(row)
    ]
    if not places:
        return []
    verb = "its figures are" if len(places) == 1 else "their figures are"
    return [f"{sentences.listed(places)} failed the proof, so {verb} left out."]


def difference_frac(row: Row, off: Row) -> float | str | None:
    """Return by which fraction the tokens/s exceed those of `off`.

    It is `none shown` where the intervals overlap, `no interval` where one is missing, and None where a time is missing
    or gradients were not proven.
    """
    if row.tokens_per_s is None or not off.tokens_per_s or hides_saving(row) or hides_saving(off):
        return None
    mine, other = tokens_per_s_interval(row), tokens_per_s_interval(off)
    if mine is None or other is None:
        return NO_INTERVAL
    if mine[0] <= other[1] and other[0] <= mine[1]:
        return NONE_SHOWN
    return row.tokens_per_s / off.tokens_per_s - 1


def _in_words(row: Row, off: Row) -> str:
    found = difference_frac(row, off)
    if found is None:
        return (
            "not compared with off, as the gradients are not proven" if hides_saving(row) or hides_saving(off) else ""
        )
    if found == NO_INTERVAL:
        return "too few rounds to compare"
    if isinstance(found, str):
        return "no difference shown"
    return f"{format_percent(abs(found))} {'more' if found > 0 else 'less'}"


def _columns(found: Sequence[Series], memory: CountedMemory) -> tuple[Column, ...]:
    lines = [(each, end) for each in found for end in largest(each)]
    offs = {each.label: next((end.row for end in largest(each) if end.strategy == OFF), None) for each in found}

    def of(text: Callable[[Row], str]) -> tuple[str, ...]:
        return tuple(UNKNOWN if end.row is None else text(end.row) for _, end in lines)

    columns = [Column(header="strategy", cells=tuple(end.strategy for _, end in lines), right=False)]
    if len(found) > 1:
        columns.append(Column(header="at", cells=tuple(each.label for each, _ in lines), right=False))
    header = _HEADERS[found[0].dimension]
    columns.append(Column(header=header, cells=tuple(map(_size, (end for _, end in lines)))))
    columns.append(
        Column(
            header="peak allocated",
            short_header="peak",
            cells=of(lambda r: format_bytes(r.peak_allocated_bytes)),
            shorten=1,
        )
    )
    if memory.name != "allocated":
        columns.append(Column(header=memory.name, cells=of(lambda r: format_bytes(memory.of(r))), drop=4))
    if any(each.has_times() for each in found):
        against = tuple(_against(end.row, offs[each.label]) for each, end in lines)
        columns += [
            Column(
                header="tokens/s",
                cells=of(_tokens),
                short=of(lambda r: sentences.tokens(r.tokens_per_s)),
                shorten=2,
            ),
            Column(header="against off", cells=against),
        ]
    columns.append(Column(header="next size", cells=tuple(end.beyond for _, end in lines), right=False, drop=5))
    return tuple(columns)


def _size(end: Largest) -> str:
    if end.size is None:
        return "none" if end.is_bound else UNKNOWN
    return f"{end.size}" if end.is_bound else f"≥ {end.size}"


def _tokens(row: Row) -> str:
    """Return `2,870 ±2 %`, with the larger half of the interval relative to the centre."""
    text, limits = sentences.tokens(row.tokens_per_s), tokens_per_s_interval(row)
    if row.tokens_per_s is None or limits is None:
        return text
    side = max(row.tokens_per_s - limits[0], limits[1] - row.tokens_per_s)
    return f"{text} ±{format_percent(side / row.tokens_per_s)}"


def _against(row: Row | None, off: Row | None) -> str:
    if row is None or off is None:
        return UNKNOWN
    if row is off:
        return "0 %" if row.tokens_per_s is not None else UNKNOWN
    found = difference_frac(row, off)
    return found if isinstance(found, str) else format_percent(found, sign=True)
