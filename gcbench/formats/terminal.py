"""The table on the screen: one per workload, columns by the width there is, what it says beneath it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from gcbench import words
from gcbench.records import Report, Row
from gcbench.tables import OFF, by_workload, failed_proof, rows
from gcbench.units import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

NAME = "terminal"
SUFFIX = ".txt"

UNKNOWN = "–"
_GAP = 2


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of text.

    Attributes:
        short: the same in less space, under `short_header`; None where there is no shorter form.
        shorten, drop: its turn to be shortened and to be left out when the screen is narrow, lowest first; None never.
    """

    header: str
    cells: tuple[str, ...]
    right: bool = True
    short_header: str = ""
    short: tuple[str, ...] | None = None
    shorten: int | None = None
    drop: int | None = None

    @property
    def width(self) -> int:
        """Characters needed when the header may take several lines."""
        return max(len(part) for part in (*self.header.split(), *self.cells))

    def shortened(self) -> Column:
        """The shorter form, where there is one."""
        return replace(self, header=self.short_header or self.header, cells=self.short or self.cells)


def fit(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """The columns that a screen of `width` characters has room for, shortened or left out in their order."""
    kept = list(columns)
    for turn in sorted({turn for c in columns for turn in (c.shorten, c.drop) if turn is not None}):
        if _total(kept) <= width:
            break
        kept = [c.shortened() if c.shorten == turn else c for c in kept if c.drop != turn]
    return tuple(kept)


def _total(columns: Sequence[Column]) -> int:
    return sum(c.width for c in columns) + _GAP * (len(columns) - 1)


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """What each column gets: headers on one line while there is room, and the first column folds when there is none."""
    widths, spare = [], width - _total(columns)
    for column in columns:
        wish = len(column.header) - column.width
        granted = wish if 0 < wish <= spare else 0
        widths.append(column.width + granted)
        spare -= granted
    if spare < 0:
        widths[0] = max(min(8, widths[0]), widths[0] + spare)
    return widths


@dataclass(frozen=True, kw_only=True)
class Table:
    """A rich renderable: a title, the columns that fit, notes on single rows and a paragraph.

    `bold` holds (row, header) of the cells to stress.
    """

    title: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""
    bold: frozenset[tuple[int, str]] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        yield Text(self.title, style="bold")
        columns = fit(self.columns, options.max_width)
        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
        for column, width in zip(columns, _widths(columns, options.max_width), strict=True):
            side: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(Text(column.header), justify=side, width=width, overflow="fold")
        for number in range(len(columns[0].cells)):
            table.add_row(
                *(Text(c.cells[number], style="bold" if (number, c.header) in self.bold else "") for c in columns)
            )
        yield table
        for note in self.notes:
            yield Text(note)
        if self.summary:
            yield Text("")
            yield Text(self.summary)
        yield Text("")


def tables(report: Report) -> list[RenderableType]:
    """One renderable per workload, which chooses its columns by the width it is given."""
    return [_table(group) for group in by_workload(rows(report)).values()]


def show(report: Report, *, explain: bool = False) -> None:
    """Print the tables on standard output, as wide as the screen is."""
    from rich.console import Console

    console = Console()
    for table in tables(report):
        console.print(table)


def render(report: Report, *, width: int = 120) -> str:
    """The tables as plain text, `width` characters wide."""
    return plain(tables(report), width=width)


def plain(renderables: Sequence[RenderableType], *, width: int) -> str:
    """Renderables as text without styles or trailing blanks."""
    import io

    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for renderable in renderables:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()) + "\n"


def table_columns(group: Sequence[Row]) -> tuple[Column, ...]:
    """The columns of one workload's table, as text."""

    def of(text: Callable[[Row], str]) -> tuple[str, ...]:
        return tuple(text(row) for row in group)

    return (
        Column(header="strategy", cells=of(lambda r: r.strategy), right=False),
        Column(header="layers recomputed", short_header="layers", cells=of(_recomputed), shorten=2, drop=6),
        Column(header="peak", cells=of(lambda r: format_bytes(r.peak_allocated_bytes))),
        Column(header="peak in", cells=of(lambda r: r.peak_phase or UNKNOWN), right=False, drop=3),
        Column(header="saved", cells=of(lambda r: format_percent(r.memory_saved_frac))),
        Column(header="step time", cells=of(step_time), short=of(lambda r: format_seconds(r.step_time_s)), shorten=4),
        Column(
            header="overhead (95 %)",
            cells=of(overhead),
            short_header="overhead",
            short=of(_overhead_shortly),
            shorten=1,
        ),
        Column(header="tokens/s", short_header="tok/s", cells=of(lambda r: tokens(r.tokens_per_s)), shorten=2, drop=5),
        Column(header="proof", cells=of(proof), right=False),
    )


def step_time(row: Row) -> str:
    """`84.3 ms ±2 %`: the larger side of the interval, relative to the centre."""
    text = format_seconds(row.step_time_s)
    if row.step_time_s is None or row.step_time_low_s is None or row.step_time_high_s is None:
        return text
    side = max(row.step_time_s - row.step_time_low_s, row.step_time_high_s - row.step_time_s)
    return f"{text} ±{format_percent(side / row.step_time_s)}"


def overhead(row: Row) -> str:
    """`+27 % (22 to 33 %)`."""
    limits = words.interval(row.time_overhead_low_frac, row.time_overhead_high_frac)
    return f"{_overhead_alone(row)} ({limits})" if limits and row.strategy != OFF else _overhead_alone(row)


def tokens(per_second: float | None) -> str:
    """`2,048`, with a decimal below 100."""
    return UNKNOWN if per_second is None else f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def proof(row: Row) -> str:
    """The verdict in short; for a cell that failed, how it ended."""
    if row.status != "ok":
        return words.FAILURES[row.status]
    return "FAILED" if failed_proof(row) else row.proof or UNKNOWN


def notes(group: Sequence[Row]) -> tuple[str, ...]:
    """A line for each row that has a message."""
    return tuple(
        f"{row.strategy}: {row.message if row.status == 'ok' else f'{words.FAILURES[row.status]}: {row.message}'}"
        for row in group
        if row.message
    )


def _table(group: Sequence[Row]) -> Table:
    proven = [(number, row) for number, row in enumerate(group) if row.status == "ok" and not failed_proof(row)]
    bold = set()
    if len(proven) > 1:
        peaks = [(row.peak_allocated_bytes, number) for number, row in proven if row.peak_allocated_bytes is not None]
        times = [(row.step_time_s, number) for number, row in proven if row.step_time_s is not None]
        bold |= {(min(peaks)[1], "peak")} if peaks else set()
        bold |= {(min(times)[1], "step time")} if times else set()
    return Table(
        title=words.title(next(iter(by_workload(group)))),
        columns=table_columns(group),
        notes=notes(group),
        summary=words.summary(group),
        bold=frozenset(bold),
    )


def _recomputed(row: Row) -> str:
    return UNKNOWN if row.layers_recomputed is None else f"{row.layers_recomputed}/{row.num_layers}"


def _overhead_shortly(row: Row) -> str:
    """The centre alone, unless its interval, for which there is no room, takes the difference back."""
    low, high = row.time_overhead_low_frac, row.time_overhead_high_frac
    unsure = low is not None and high is not None and low <= 0 <= high and row.strategy != OFF
    return "none shown" if unsure else _overhead_alone(row)


def _overhead_alone(row: Row) -> str:
    return format_percent(row.time_overhead_frac, sign=row.strategy != OFF)
