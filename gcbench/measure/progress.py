"""Shows progress on stderr while cells are measured: a live display, plain lines, or nothing."""

from __future__ import annotations

import time
from statistics import median
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gcbench.core.records import Cell, Outcome
from gcbench.core.units import counted, format_bytes, format_seconds
from gcbench.processes.messages import Event
from gcbench.processes.progress import Heartbeat, TwoLines


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


class QuietProgress:
    """Shows nothing."""

    def __enter__(self) -> QuietProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        return None

    def begin(self, *, num_steps: int, num_rounds: int) -> None:
        return None

    def enter(self, cell: Cell, *, round: int, num_steps: int) -> None:
        return None

    def step(self, event: Event) -> None:
        return None

    def leave(self, outcome: Outcome) -> None:
        return None

    def skip(self, *, num_steps: int) -> None:
        return None


class PlainProgress(QuietProgress):
    """One line per round of a cell, for logs and pipes, and more lines at intervals during a long round."""

    def __init__(self, console: Console, *, verb: str = "measuring") -> None:
        self._console = console
        self._verb = verb
        self._start = time.monotonic()
        self._where, self._last_step, self._done_steps, self._total, self._steps = "", "", 0, 0, 0
        self._heartbeat = Heartbeat(self._print_last_step)

    def __enter__(self) -> PlainProgress:
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._heartbeat.stop()

    def begin(self, *, num_steps: int, num_rounds: int) -> None:
        self._num_rounds, self._total = num_rounds, num_steps
        self._say(f"{self._verb}: {counted(num_steps, 'training step')} or more, in {counted(num_rounds, 'round')}")

    def enter(self, cell: Cell, *, round: int, num_steps: int) -> None:
        self._where = f"round {round + 1}/{self._num_rounds} {label(cell)}"
        self._last_step, self._steps = "building the model", num_steps

    def step(self, event: Event) -> None:
        self._last_step = f"{event.kind} step {event.step}"

    def leave(self, outcome: Outcome) -> None:
        self._done_steps += self._steps
        percent = 100 * self._done_steps // max(self._total, 1)
        self._say(f"{self._where}: {figures(outcome)} [{min(percent, 100)} % done, {self._elapsed()} elapsed]")

    def skip(self, *, num_steps: int) -> None:
        self._total -= num_steps

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
    """One Rich display: cell, round, step, elapsed, time left, last figures."""

    def __init__(self, console: Console) -> None:
        self._display = TwoLines(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._console = console
        self._total = 0
        self._before = 0
        self._num_steps = 0

    def __enter__(self) -> LiveProgress:
        self._display.start()
        self._task = self._display.add_task("importing torch, reading the model", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._display.stop()

    def begin(self, *, num_steps: int, num_rounds: int) -> None:
        self._num_rounds, self._total = num_rounds, num_steps
        self._display.reset(self._task, total=num_steps)

    def enter(self, cell: Cell, *, round: int, num_steps: int) -> None:
        self._where = f"round {round + 1}/{self._num_rounds} · {label(cell)}"
        self._num_steps = num_steps
        self._display.update(self._task, description=f"{self._where} · building the model")

    def step(self, event: Event) -> None:
        took = "" if event.seconds is None else f" {format_seconds(event.seconds)}"
        self._display.update(
            self._task,
            # A round may take more steps than planned; then the bar waits for the next round.
            completed=self._before + min(event.step, self._num_steps),
            description=f"{self._where} · {event.kind} step{took}",
        )

    def leave(self, outcome: Outcome) -> None:
        self._before += self._num_steps
        self._display.update(self._task, completed=self._before)
        self._console.print(f"{self._where}: {figures(outcome)}", markup=False, highlight=False, soft_wrap=True)

    def skip(self, *, num_steps: int) -> None:
        self._total -= num_steps
        self._display.update(self._task, total=self._total)


def choose(console: Console, *, quiet: bool, verb: str = "measuring") -> QuietProgress:
    """Choose the live display for a terminal, plain lines otherwise, none where `quiet`."""
    if quiet:
        return QuietProgress()
    return LiveProgress(console) if console.is_terminal else PlainProgress(console, verb=verb)
