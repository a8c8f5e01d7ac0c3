"""Shows progress on stderr while cells are measured: a live display, plain lines, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from gcbench.core.records import Cell, Outcome
from gcbench.core.units import counted, format_bytes, format_percent, format_seconds
from gcbench.processes.messages import Event
from gcbench.processes.progress import Heartbeat, TwoLines
from gcbench.report import stats
from gcbench.report.sentences import interval
from gcbench.strategies import OFF


def label(cell: Cell) -> str:
    """Name a cell: `per-layer, batch 8 × 1024`."""
    return f"{cell.strategy}, batch {cell.workload.batch_size} × {cell.workload.seq_len}"


def figures(outcome: Outcome) -> str:
    """Show the latest figures of a cell, or why there are none."""
    if outcome.failure is not None:
        return f"{outcome.failure.kind}: {outcome.failure.message}"
    parts = []
    memory = next((r.memory for r in outcome.rounds if r.memory is not None), None)
    if memory is not None:
        parts.append(f"peak {format_bytes(memory.allocated_bytes)} ({memory.peak_phase})")
    if outcome.rounds and outcome.rounds[-1].step_times_s:
        parts.append(f"step {format_seconds(median(outcome.rounds[-1].step_times_s))}")
    return ", ".join(parts)


def intervals(outcomes: Sequence[Outcome]) -> str:
    """Show how well the overheads are known: `per-layer +27 % (24 to 30), every:2 +13 % (11 to 16)`."""
    off = next((outcome for outcome in outcomes if outcome.cell.strategy == OFF), None)
    parts = []
    for outcome in outcomes:
        if outcome is off or off is None:
            continue
        overhead = stats.overhead(outcome.rounds, off.rounds)
        if overhead is not None:
            within = interval(overhead.low, overhead.high)
            size = format_percent(overhead.centre, sign=True)
            parts.append(f"{outcome.cell.strategy} {size}" + (f" (95 %: {within})" if within else ""))
    return ", ".join(parts)


class Progress(Protocol):
    """Shows the progress of a run."""

    def begin(self, *, num_rounds: int | None, limit_s: float | None = None) -> None:
        """Begin a workload: with a number of rounds, or until its intervals are narrow, at most `limit_s` seconds."""

    def enter(self, cell: Cell, *, doing: str) -> None:
        """Begin something with one cell, such as `warming up` or `round 3`."""

    def step(self, event: Event) -> None:
        """A training step of that cell is done."""

    def leave(self, outcome: Outcome) -> None:
        """A cell has its memory peaks, or a failure."""

    def end_round(self, outcomes: Sequence[Outcome]) -> None:
        """All cells that took part in a round have taken their turn."""


class QuietProgress:
    """Shows nothing."""

    def __enter__(self) -> QuietProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        return None

    def begin(self, *, num_rounds: int | None, limit_s: float | None = None) -> None:
        return None

    def enter(self, cell: Cell, *, doing: str) -> None:
        return None

    def step(self, event: Event) -> None:
        return None

    def leave(self, outcome: Outcome) -> None:
        return None

    def end_round(self, outcomes: Sequence[Outcome]) -> None:
        return None


_PAUSE_S = 5.0
"""Least time between two plain lines about rounds."""


class PlainProgress(QuietProgress):
    """One line per cell and one per round, for logs and pipes, and more lines at intervals during a long step."""

    def __init__(self, console: Console, *, verb: str = "measuring") -> None:
        self._console = console
        self._verb = verb
        self._start = time.monotonic()
        self._last_round_s: float | None = None
        self._where, self._last_step, self._num_ended = "", "", 0
        self._heartbeat = Heartbeat(self._print_last_step)

    def __enter__(self) -> PlainProgress:
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._heartbeat.stop()

    def begin(self, *, num_rounds: int | None, limit_s: float | None = None) -> None:
        self._num_rounds, self._num_ended = num_rounds, 0
        self._say(f"{self._verb}: {_plan(num_rounds, limit_s)}")

    def enter(self, cell: Cell, *, doing: str) -> None:
        self._where = f"{label(cell)}, {doing}"
        self._last_step = "building the model" if doing == WARMING_UP else "under way"

    def step(self, event: Event) -> None:
        self._last_step = f"{event.kind} step {event.step}"

    def leave(self, outcome: Outcome) -> None:
        self._say(f"{label(outcome.cell)}: {figures(outcome)} [{self._elapsed()} elapsed]")

    def end_round(self, outcomes: Sequence[Outcome]) -> None:
        self._num_ended += 1
        now = time.monotonic()
        if self._last_round_s is not None and now - self._last_round_s < _PAUSE_S:
            return
        self._last_round_s = now
        known = intervals(outcomes) or "timed"
        self._say(f"round {_of(self._num_ended, self._num_rounds)}: {known} [{self._elapsed()} elapsed]")

    def _print_last_step(self) -> None:
        where = f"{self._where}: {self._last_step}" if self._where else "importing torch, reading the model"
        self._print(f"{where} … [{self._elapsed()} elapsed]")

    def _say(self, text: str) -> None:
        self._heartbeat.restart()
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _elapsed(self) -> str:
        return format_seconds(time.monotonic() - self._start)


class LiveProgress(QuietProgress):
    """One Rich display: cell, round, step, elapsed time, and above it the figures of each cell."""

    def __init__(self, console: Console) -> None:
        self._display = TwoLines(
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("elapsed{task.fields[limit]}"),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._console = console
        self._known, self._where = "", ""
        self._num_ended = 0
        self._limit_s: float | None = None

    def __enter__(self) -> LiveProgress:
        self._display.start()
        self._task = self._display.add_task("importing torch, reading the model", total=None, limit="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._display.stop()

    def begin(self, *, num_rounds: int | None, limit_s: float | None = None) -> None:
        self._num_rounds, self._limit_s, self._num_ended, self._known = num_rounds, limit_s, 0, ""
        self._start = time.monotonic()
        limit = "" if limit_s is None else f", {format_seconds(limit_s)} at most"
        self._display.update(self._task, total=num_rounds or limit_s, completed=0, limit=limit)

    def enter(self, cell: Cell, *, doing: str) -> None:
        self._where = f"{label(cell)} · {doing}"
        self._show("building the model" if doing == WARMING_UP else "")

    def step(self, event: Event) -> None:
        took = "" if event.seconds is None else f" {format_seconds(event.seconds)}"
        self._show(f"{event.kind} step{took}")

    def leave(self, outcome: Outcome) -> None:
        text = f"{label(outcome.cell)}: {figures(outcome)}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end_round(self, outcomes: Sequence[Outcome]) -> None:
        self._num_ended += 1
        self._known = intervals(outcomes)
        self._show("")

    def _show(self, doing: str) -> None:
        done = self._num_ended if self._num_rounds else time.monotonic() - self._start
        parts = [part for part in (self._known, self._where, doing) if part]
        self._display.update(self._task, completed=done, description=" · ".join(parts))


WARMING_UP = "warming up"
"""What is done with a cell before its first turn."""


def _plan(num_rounds: int | None, limit_s: float | None) -> str:
    if num_rounds is not None:
        return counted(num_rounds, "round")
    return "until the intervals are narrow" + ("" if limit_s is None else f", at most {format_seconds(limit_s)}")


def _of(number: int, total: int | None) -> str:
    return str(number) if total is None else f"{number}/{total}"


def choose(console: Console, *, quiet: bool, verb: str = "measuring") -> QuietProgress:
    """Choose the live display for a terminal, plain lines otherwise, none where `quiet`."""
    if quiet:
        return QuietProgress()
    return LiveProgress(console) if console.is_terminal else PlainProgress(console, verb=verb)
