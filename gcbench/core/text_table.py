"""Render tables for a screen of any width: columns are shortened or left out, with a title, notes and a paragraph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from gcbench.core.streams import spelled

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

UNKNOWN = "–"
_GAP = 2
_LEAST_NAME = 18
"""Least width of the first column when it folds; on narrower screens rows are stacked."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of text.

    Attributes:
        short: shorter cells, under `short_header`; None without a shorter form.
        shorten, drop: rank at which it is shortened or left out on a narrow screen, lowest first; None for never.
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
        """Characters needed when the header may wrap."""
        return max(len(part) for part in (*self.header.split(), *self.cells, ""))

    def shortened(self) -> Column:
        """Return the shorter form, if there is one."""
        return replace(self, header=self.short_header or self.header, cells=self.short or self.cells)

    def spelled(self, encoding: str) -> Column:
        """Return the column with characters that an encoding lacks replaced by ASCII."""
        spell = partial(spelled, encoding=encoding)
        return replace(
            self,
            header=spell(self.header),
            short_header=spell(self.short_header),
            cells=tuple(map(spell, self.cells)),
            short=None if self.short is None else tuple(map(spell, self.short)),
        )


def fit(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """Return the columns that fit in `width` characters, shortened or left out by rank."""
    kept = list(columns)
    for turn in sorted({turn for c in columns for turn in (c.shorten, c.drop) if turn is not None}):
        if _total(kept) <= width:
            break
        kept = [c.shortened() if c.shorten == turn else c for c in kept if c.drop != turn]
    return tuple(kept)


def _total(columns: Sequence[Column]) -> int:
    return sum(c.width for c in columns) + _GAP * (len(columns) - 1)


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """Return column widths: headers stay on one line while there is room; without room the first column folds."""
    widths, room = [], width - _total(columns)
    for column in columns:
        missing = len(column.header) - column.width
        extra = missing if 0 < missing <= room else 0
        widths.append(column.width + extra)
        room -= extra
    if room < 0:
        widths[0] += room
    return widths


def _folded(name: str, width: int) -> str:
    """Wrap a name to lines of at most `width`, broken after its separators if it has any."""
    lines = [""]
    for part in re.findall(r"[^+:/,\s-]*[+:/,\s-]*", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A rich renderable: titles, the columns that fit, notes on single rows and a paragraph.

    When even the columns that are never left out do not fit, each row is stacked: its name, and below it all its cells
    with their headers. `bold` is the set of (row, header) of emphasised cells.
    """

    title: str = ""
    subtitle: str = ""
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""
    bold: frozenset[tuple[int, str]] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        for line, style in ((self.title, "bold"), (self.subtitle, "")):
            if line:
                yield Text(line, style=style)
        every = [column.spelled(options.encoding) for column in self.columns]
        columns = fit(every, options.max_width)
        room = options.max_width - (_total(columns) - columns[0].width)
        if room >= min(columns[0].width, _LEAST_NAME):
            yield self._side_by_side(columns, options.max_width)
        else:
            yield from self._stacked(every, options)
        for note in self.notes:
            yield Text(note)
        if self.summary:
            yield Text("")
            yield Text(self.summary)
        yield Text("")

    def _side_by_side(self, columns: Sequence[Column], width: int) -> RenderableType:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
        widths = _widths(columns, width)
        for column, column_width in zip(columns, widths, strict=True):
            side: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(Text(column.header), justify=side, width=column_width, overflow="fold")
        for number in range(len(columns[0].cells)):
            cells = [column.cells[number] for column in columns]
            cells[0] = _folded(cells[0], widths[0])
            table.add_row(
                *(
                    Text(cell, style=self._style(number, column.header))
                    for cell, column in zip(cells, columns, strict=True)
                )
            )
        return table

    def _stacked(self, columns: Sequence[Column], options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        first, *others = columns
        short = [column.shortened() for column in others]
        indent, dot = _GAP, spelled(" · ", options.encoding)
        for number, name in enumerate(first.cells):
            yield Text(_folded(name, options.max_width), style=self._style(number, first.header))
            pairs = [(f"{column.header} {column.cells[number]}", column.header) for column in short]
            for line in _filled(pairs, options.max_width - indent, gap=len(dot)):
                parts = [Text(text, style=self._style(number, header)) for text, header in line]
                yield Padding(Text(dot).join(parts), (0, 0, 0, indent), expand=False)

    def _style(self, number: int, header: str) -> str:
        return "bold" if (number, header) in self.bold else ""


def _filled(pairs: Iterable[tuple[str, str]], width: int, *, gap: int) -> list[list[tuple[str, str]]]:
    """Split (text, header) pairs into lines of at most `width` characters."""
    lines: list[list[tuple[str, str]]] = [[]]
    for pair in pairs:
        used = sum(len(text) + gap for text, _ in lines[-1])
        if lines[-1] and used + len(pair[0]) > width:
            lines.append([])
        lines[-1].append(pair)
    return [line for line in lines if line]


def unbroken(text: str) -> RenderableType:
    """Return a line for copying, which `show` and `plain` never wrap, however narrow the screen is."""
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ignore")


def show(renderables: Iterable[RenderableType], console: Console | None = None) -> None:
    """Print on standard output or the console at the screen's width; `unbroken` lines may exceed it."""
    from rich.console import Console as RichConsole

    console = RichConsole() if console is None else console
    for renderable in renderables:
        # Repeated here, because rich copies a text that is printed by itself.
        is_unbroken = bool(getattr(renderable, "no_wrap", False))
        console.print(renderable, crop=False, no_wrap=is_unbroken or None, overflow="ignore" if is_unbroken else None)


def plain(renderables: Sequence[RenderableType], *, width: int) -> str:
    """Render as text without styles or trailing blanks."""
    import io

    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    show(renderables, console)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()) + "\n"
