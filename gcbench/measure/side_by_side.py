"""Has the processes of cells live side by side and take turns step by step; in rounds where memory is too small."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gcbench.core.records import Cell, Failure
from gcbench.core.units import format_seconds
from gcbench.measure.progress import WARMING_UP, Progress
from gcbench.measure.recorder import Recorder
from gcbench.measure.task import MeasureTask, Ready, TakeTurn, TurnTaken
from gcbench.processes.children import Child, Children
from gcbench.processes.messages import Answer, Paused
from gcbench.strategies import OFF

_ROOM = 1.25
"""A further process is started where this many times the memory of the largest so far is free: what it holds while it
waits is less than its peak."""
_HANGS_AFTER_S, _HANGS_AFTER = 60.0, 20
"""A turn that takes longer than this, and than so many times the longest so far, is taken to hang."""

IN_ROUNDS = (
    "The processes of a batch size did not fit into memory side by side, so cells ran one after another, in rounds: "
    "their steps were further apart, and their intervals are wider."
)

MakeTask = Callable[[Cell, int, int | None], MeasureTask]
"""(cell, number of its process, number of its one turn or None) -> the task that measures it."""
Choose = Callable[[Sequence[Cell], Mapping[Cell, float]], Sequence[Cell]]
"""(cells that can take a turn, seconds that the last turn of each took) -> those that take the next one."""


@dataclass(kw_only=True)
class _Live:
    """A process that waits for its turn."""

    child: Child
    round: int
    started_s: float
    held_bytes: int = 0
    worked_s: float = 0.0
    turn_s: float = 0.0


@dataclass(kw_only=True)
class TurnTaking:
    """Measures the cells of one workload.

    Attributes:
        make_task: makes the task of a process.
        choose: decides which cells take the next turn; none when enough is known.
        timeout_s: seconds that one process may work; None for no limit.
    """

    recorder: Recorder
    children: Children
    progress: Progress
    make_task: MakeTask
    choose: Choose
    timeout_s: float | None
    clock: Callable[[], float] = time.monotonic
    _live: dict[Cell, _Live] = field(default_factory=dict)
    _crowded_out: list[Cell] = field(default_factory=list)
    _held_bytes: int | None = None
    _free_bytes: int | None = None
    _longest_turn_s: float = 0.0

    def measure(self, cells: Sequence[Cell]) -> None:
        """Measure the cells, each in a process that lives beside the others, or in rounds where memory is too small.

        As many live at a time as there is room for, `off` always among them. A cell that fails leaves the others going.
        """
        waiting = list(cells)
        try:
            while waiting:
                waiting = self._open_some(waiting)
                if waiting and len(self._live) < 2:
                    return self._in_rounds(cells)
                self._until_known()
                if any(cell.strategy == OFF for cell in self._crowded_out):
                    return self._in_rounds(cells)
                self._close_all(but_off=bool(waiting))
            if self._crowded_out:
                self._in_rounds([cell for cell in cells if cell.strategy == OFF or cell in self._crowded_out])
        finally:
            self._close_all()

    # Processes side by side

    def _open_some(self, waiting: list[Cell]) -> list[Cell]:
        """Start processes while there is room, and return the cells that are left."""
        left = list(waiting)
        while left and self._has_room():
            cell = left.pop(0)
            failure = self._open(cell)
            if failure is None:
                continue
            if failure.kind == "oom" and self._live:  # alone it may fit
                return [cell, *left]
            self.recorder.fail(cell, failure)
            self.progress.leave(self.recorder.outcome(cell))
        return left

    def _has_room(self) -> bool:
        if not self._live:
            return True
        if self._held_bytes is None or self._free_bytes is None:
            return False
        return self._free_bytes >= _ROOM * self._held_bytes

    def _open(self, cell: Cell) -> Failure | None:
        """Start the cell's process and have it warm up; its failure is returned, not recorded."""
        number = self.recorder.next_round(cell)
        self.progress.enter(cell, doing=WARMING_UP)
        child = self.children.open(self.make_task(cell, number, None))
        live = _Live(child=child, round=number, started_s=self.clock())
        try:
            reply = self._proceed(live, None, timeout_s=self.timeout_s)
        except BaseException:
            child.close()
            raise
        if isinstance(reply, Answer):
            child.close()
            return _failure_of(reply)
        ready = reply.event
        assert isinstance(ready, Ready)
        self._live[cell] = live
        self._free_bytes = ready.free_bytes
        if ready.held_bytes is not None:
            live.held_bytes = ready.held_bytes
            self._held_bytes = max(self._held_bytes or 0, ready.held_bytes)
        self.recorder.add(cell, ready.result, ready.fingerprint)
        self.progress.leave(self.recorder.outcome(cell))
        return None

    def _until_known(self) -> None:
        """Have the processes take turns until enough is known, or `off` has no room beside the others."""
        while chosen := self.choose(tuple(self._live), {cell: each.turn_s for cell, each in self._live.items()}):
            number = self.recorder.next_turn(tuple(self._live))
            for cell in chosen if number % 2 == 0 else reversed(chosen):
                self._turn(cell, number)
            self.progress.end_round(self.recorder.outcomes(tuple(self._live)))
            if any(cell.strategy == OFF for cell in self._crowded_out):
                return

    def _turn(self, cell: Cell, number: int) -> None:
        live = self._live[cell]
        self.progress.enter(cell, doing=f"round {number + 1}")
        left = None if self.timeout_s is None else max(self.timeout_s - live.worked_s, 0.0)
        hangs_after = max(_HANGS_AFTER_S, _HANGS_AFTER * self._longest_turn_s) if self._longest_turn_s else None
        timeout = min((limit for limit in (left, hangs_after) if limit is not None), default=None)
        before = live.worked_s
        reply = self._proceed(live, TakeTurn(number=number), timeout_s=timeout)
        if isinstance(reply, Answer):
            failure = _failure_of(reply)
            if failure.kind == "timeout":
                failure = _too_long(self.timeout_s, failure) if timeout == left else _hung(timeout, failure)
            self._close(cell)
            if failure.kind == "oom" and self._live:  # alone it may fit
                self._crowded_out.append(cell)
                return
            self.recorder.fail(cell, failure)
            self.progress.leave(self.recorder.outcome(cell))
            return
        taken = reply.event
        assert isinstance(taken, TurnTaken)
        live.turn_s = live.worked_s - before
        self._longest_turn_s = max(self._longest_turn_s, live.turn_s)
        self.recorder.add_turn(cell, live.round, taken, wall_s=self.clock() - live.started_s)

    def _proceed(self, live: _Live, word: object, *, timeout_s: float | None) -> Answer | Paused:
        start = self.clock()
        try:
            return live.child.proceed(word, on_event=self.progress.step, timeout_s=timeout_s)
        finally:
            live.worked_s += self.clock() - start

    def _close_all(self, *, but_off: bool = False) -> None:
        for cell in tuple(self._live):
            if not (but_off and cell.strategy == OFF):
                self._close(cell)

    def _close(self, cell: Cell) -> None:
        closed = self._live.pop(cell)
        closed.child.close()
        if self._free_bytes is not None:
            self._free_bytes += closed.held_bytes

    # In rounds: one process at a time, each with one turn

    def _in_rounds(self, cells: Sequence[Cell]) -> None:
        self._close_all()
        self.recorder.add_notice(IN_ROUNDS)
        took_s: dict[Cell, float] = {}
        while True:
            able = [cell for cell in cells if self.recorder.outcome(cell).failure is None]
            chosen = self.choose(able, took_s)
            if not chosen:
                return
            number = self.recorder.next_turn(cells)
            for cell in chosen if number % 2 == 0 else reversed(chosen):
                start = self.clock()
                self.round_alone(cell, number)
                took_s[cell] = self.clock() - start
            self.progress.end_round(self.recorder.outcomes(tuple(chosen)))

    def round_alone(self, cell: Cell, number: int | None) -> None:
        """Measure the cell in a process of its own, which takes turn `number` and ends."""
        start = self.clock()
        task = self.make_task(cell, self.recorder.next_round(cell), number or 0)
        self.progress.enter(cell, doing=f"round {task.turn + 1}" if task.turn is not None else "")
        answer = self.children.run(task, on_event=self.progress.step, timeout_s=self.timeout_s)
        if answer.result is None or (answer.fingerprint is None and self.recorder.report.source == "measured"):
            self.recorder.fail(cell, _failure_of(answer))
        else:
            result = replace(answer.result, wall_s=self.clock() - start)
            self.recorder.add(cell, result, answer.fingerprint)
        self.progress.leave(self.recorder.outcome(cell))


def _failure_of(answer: Answer) -> Failure:
    why = answer.refusal.message if answer.refusal else "the child gave no result"
    return answer.failure or Failure(kind="crash", message=why)


def _too_long(after_s: float | None, failure: Failure) -> Failure:
    return Failure(
        kind="timeout",
        message=f"still running after {format_seconds(after_s or 0.0)}, all its turns together, and stopped; raise "
        "--timeout or shrink the cell",
        detail=failure.detail,
    )


def _hung(after_s: float | None, failure: Failure) -> Failure:
    took = format_seconds(after_s or 0.0)
    return Failure(
        kind="timeout",
        message=f"a step was still running after {took}, {_HANGS_AFTER} times the longest turn so far or more, and was "
        "stopped; run the cell again by itself",
        detail=failure.detail,
    )
