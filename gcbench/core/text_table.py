"""A table that a screen of any width can show: columns that shorten or go, a title, notes and a paragraph."""

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
"""Characters that the first column keeps where it folds; where there is less room, rows are stacked."""


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
        return max(len(part) for part in (*self.header.split(), *self.cells, ""))

    def shortened(self) -> Column:
        """The shorter form, where there is one."""
        return replace(self, header=self.short_header or self.header, cells=self.short or self.cells)

    def spelled(self, encoding: str) -> Column:
        """The same in characters that an encoding has."""
        spell = partial(spelled, encoding=encoding)
        return replace(
            self,
            header=spell(self.header),
            short_header=spell(self.short_header),
            cells=tuple(map(spell, self.cells)),
            short=None if self.short is None else tuple(map(spell, self.short)),
        )


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
        target_options = len(column.header) - column.width
        granted = target_options if 0 < target_options <= spare else 0
        widths.append(column.width + granted)
        spare -= granted
    if spare < 0:
        widths[0] += spare
    return widths


def _folded(name: str, width: int) -> str:
    """A name in lines of at most `width`, broken behind its joints where it has any."""
    lines = [""]
    for part in re.findall(r"[^+:/,\s-]*[+:/,\s-]*", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A rich renderable: titles, the columns that fit, notes on single rows and a paragraph.

    Where not even the columns that never go have room, each row is stacked: its name, and below it all its cells with
    their headers. `bold` holds (row, header) of the cells to stress.
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
        for column, granted in zip(columns, widths, strict=True):
            side: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(Text(column.header), justify=side, width=granted, overflow="fold")
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
    """As many of the (text, header) on each line as there is room for."""
    lines: list[list[tuple[str, str]]] = [[]]
    for pair in pairs:
        taken = sum(len(text) + gap for text, _ in lines[-1])
        if lines[-1] and taken + len(pair[0]) > width:
            lines.append([])
        lines[-1].append(pair)
    return [line for line in lines if line]


def unbroken(text: str) -> RenderableType:
    """A line that is to be pasted: on one line however narrow the screen is, if it is printed by `show` or `plain`."""
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ignore")


def show(renderables: Iterable[RenderableType], console: Console | None = None) -> None:
    """Print on standard output or the console, as wide as the screen is; lines that are `unbroken` go beyond it."""
    from rich.console import Console as RichConsole

    console = RichConsole() if console is None else console
    for renderable in renderables:
        # Said again here, because a text that is printed by itself is made anew.
        as_it_is = bool(getattr(renderable, "no_wrap", False))
        console.print(renderable, crop=False, no_wrap=as_it_is or None, overflow="ignore" if as_it_is else None)


def plain(renderables: Sequence[RenderableType], *, width: int) -> str:
    """Renderables as text without styles or trailing blanks."""
    import io

    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    show(renderables, console)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()) + "\n"
