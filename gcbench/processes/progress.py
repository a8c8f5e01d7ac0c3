"""Shows progress on stderr while a child works on many small items: how many are done, and that it is alive."""

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
"""Least time between two plain lines, except for the first and the last."""


class QuietCounter:
    """Shows nothing. A context manager."""

    def __enter__(self) -> QuietCounter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        return None

    def count(self, done: int, total: int, doing: str | None = None) -> None:
        """Show that `done` of `total` items are done, and what is being done now, if named."""


class PlainCounter(QuietCounter):
    """Plain lines for logs and pipes: `predicting: 3 of 12 cells (25 %) [41.2 s elapsed]`."""

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
        self._text = line(self._verb, self._noun, done, total, doing)
        now = time.monotonic()
        if self._last is None or done == total or now - self._last >= _PAUSE_S:
            self._last = now
            self._heartbeat.restart()
            self._say()

    def _say(self) -> None:
        elapsed = format_seconds(time.monotonic() - self._start)
        self._console.print(f"{self._text} [{elapsed} elapsed]", markup=False, highlight=False, soft_wrap=True)


class LiveCounter(QuietCounter):
    """One Rich display: items done, a bar, percent, elapsed time."""

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
        text = line(self._verb, self._noun, done, total, doing)
        self._display.update(self._task, completed=done, total=total, description=text)


def line(verb: str, noun: str, done: int, total: int, doing: str | None) -> str:
    """Format the progress: `predicting: 3 of 12 cells (25 %)`."""
    percent = 100 * done // max(total, 1)
    return f"{verb}: {done} of {total} {noun} ({percent} %)" + (f", {doing}" if doing else "")


def choose(console: Console, *, verb: str, noun: str, quiet: bool) -> QuietCounter:
    """Choose the live display for a terminal, plain lines otherwise, none where `quiet`."""
    if quiet:
        return QuietCounter()
    kind = LiveCounter if console.is_terminal else PlainCounter
    return kind(console, verb=verb, noun=noun)


_SILENCES_S = (10.0, 20.0, 30.0, 60.0)
"""Times without output after which a plain line is repeated; the last one repeats."""


class Heartbeat:
    """Calls `say` on a thread of its own whenever nothing was printed for a while, to show that the work goes on."""

    def __init__(self, say: Callable[[], None], *, silences_s: tuple[float, ...] = _SILENCES_S) -> None:
        self._say = say
        self._silences_s = silences_s
        self._restarted, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def restart(self) -> None:
        """Restart the silence, as something else was printed."""
        self._restarted.set()

    def stop(self) -> None:
        self._ended.set()
        self._restarted.set()
        self._thread.join()

    def _watch(self) -> None:
        turn = 0
        while not self._ended.is_set():
            if self._restarted.wait(self._silences_s[min(turn, len(self._silences_s) - 1)]):
                self._restarted.clear()
                turn = 0
                continue
            turn += 1
            with suppress(OSError, GcbenchError):  # stderr is closed, which the main thread will find out
                self._say()


class TwoLines(Progress):
    """A progress display with the description on its own line, as beside the bar it would not fit a narrow screen."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield Text(task.description, no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)
