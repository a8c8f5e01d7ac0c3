"""What the user sees on stderr while many small things are done in a child: how many are, and that it is alive."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gcbench.progress import Heartbeat, TwoLines
from gcbench.units import format_seconds

_PAUSE_S = 5.0
"""Between lines, but for the first and the last."""


class Counter:
    """Says nothing. A context manager."""

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        return None

    def count(self, done: int, total: int, doing: str | None = None) -> None:
        """`done` of `total` things are done, and `doing` is what is done now, where there are words for it."""


class PlainCounter(Counter):
    """Lines for logs and pipes: `predicting: 3 of 12 cells (25 %) [41.2 s elapsed]`."""

    def __init__(self, console: Console, *, verb: str, noun: str) -> None:
        self._console, self._verb, self._noun = console, verb, noun
        self._start = time.monotonic()
        self._last: float | None = None
        self._text = "importing torch, reading the model"
        self._heartbeat = Heartbeat(self._say)

    def __enter__(self) -> PlainCounter:
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._heartbeat.stop()

    def count(self, done: int, total: int, doing: str | None = None) -> None:
        self._text = said(self._verb, self._noun, done, total, doing)
        now = time.monotonic()
        if self._last is None or done == total or now - self._last >= _PAUSE_S:
            self._last = now
            self._heartbeat.spoken()
            self._say()

    def _say(self) -> None:
        elapsed = format_seconds(time.monotonic() - self._start)
        self._console.print(f"{self._text} [{elapsed} elapsed]", markup=False, highlight=False, soft_wrap=True)


class LiveCounter(Counter):
    """One Rich display: what is done, a bar, percent, elapsed."""

    def __init__(self, console: Console, *, verb: str, noun: str) -> None:
        self._verb, self._noun = verb, noun
        self._display = TwoLines(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> LiveCounter:
        self._display.start()
        self._task = self._display.add_task("importing torch, reading the model", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._display.stop()

    def count(self, done: int, total: int, doing: str | None = None) -> None:
        text = said(self._verb, self._noun, done, total, doing)
        self._display.update(self._task, completed=done, total=total, description=text)


def said(verb: str, noun: str, done: int, total: int, doing: str | None) -> str:
    """`predicting: 3 of 12 cells (25 %)`."""
    percent = 100 * done // max(total, 1)
    return f"{verb}: {done} of {total} {noun} ({percent} %)" + (f", {doing}" if doing else "")


def choose(console: Console, *, verb: str, noun: str, quiet: bool) -> Counter:
    """The display that suits where stderr goes."""
    if quiet:
        return Counter()
    kind = LiveCounter if console.is_terminal else PlainCounter
    return kind(console, verb=verb, noun=noun)
