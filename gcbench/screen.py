"""A table that a screen of any width can show: columns that shorten or go, a title, notes and a paragraph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

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
    """A rich renderable: titles, the columns that fit, notes on single rows and a paragraph.

    `bold` holds (row, header) of the cells to stress.
    """

    title: str
    subtitle: str = ""
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""
    bold: frozenset[tuple[int, str]] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        yield Text(self.title, style="bold")
        if self.subtitle:
            yield Text(self.subtitle)
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


def plain(renderables: Sequence[RenderableType], *, width: int) -> str:
    """Renderables as text without styles or trailing blanks."""
    import io

    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for renderable in renderables:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()) + "\n"
