"""What the user sees on stderr while many small things are done in a child: how many are, and that it is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from gcbench.core.errors import GcbenchError
from gcbench.core.units import format_seconds

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


_SILENCES_S = (10.0, 20.0, 30.0, 60.0)
"""After how long without a word one is said in plain lines; the last again and again."""


class Heartbeat:
    """Calls `say` where nothing was said for a while, on a thread of its own, so that a long wait is seen to be one."""

    def __init__(self, say: Callable[[], None], *, silences_s: tuple[float, ...] = _SILENCES_S) -> None:
        self._say = say
        self._silences_s = silences_s
        self._spoken, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def spoken(self) -> None:
        """Something else was said: the next silence begins now."""
        self._spoken.set()

    def stop(self) -> None:
        self._ended.set()
        self._spoken.set()
        self._thread.join()

    def _watch(self) -> None:
        turn = 0
        while not self._ended.is_set():
            if self._spoken.wait(self._silences_s[min(turn, len(self._silences_s) - 1)]):
                self._spoken.clear()
                turn = 0
                continue
            turn += 1
            with suppress(OSError, GcbenchError):  # nobody listens any more, which the main thread will find out
                self._say()


class TwoLines(Progress):
    """The description on a line of its own: beside the bar it would push the figures off a narrow screen."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield Text(task.description, no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)
