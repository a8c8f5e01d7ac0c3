"""Decides how long cells go on taking turns: until their overheads are known well enough, or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gcbench.core.records import Cell, Outcome
from gcbench.measure.recorder import Recorder
from gcbench.report import stats
from gcbench.strategies import OFF

_LEAST_UNITS = 4
"""Pairs of turns before an interval is taken to be narrow: three can agree by chance."""


@dataclass(kw_only=True)
class Goal:
    """What a workload is measured to: a number of turns, or an interval within a time.

    Attributes:
        rounds: turns of each cell; None to go on until the intervals are narrow.
        target_frac: half-width of the 95 % interval of each overhead, as a fraction of the time of `off`; None to use
            all of the time.
        deadline_s: on `clock`, when the last turn should have ended; None for no limit. Each cell still gets
            `stats.MIN_ROUNDS` turns, fewer of which give no interval.
        num_cells: cells of the workload, which share the time where they do not all live side by side.
    """

    recorder: Recorder
    rounds: int | None
    target_frac: float | None
    deadline_s: float | None
    num_cells: int
    clock: Callable[[], float] = time.monotonic
    _deadlines: dict[frozenset[Cell], float] = field(default_factory=dict)
    _num_begun: int = 0

    def choose(self, cells: Sequence[Cell], took_s: Mapping[Cell, float]) -> Sequence[Cell]:
        """Return those of `cells` that take the next turn; none when enough is known or the time is up.

        `took_s` has the seconds that the last turn of each took.
        """
        wanted = self.wanted(cells)
        if not wanted:
            return []
        chosen = [cell for cell in cells if cell in wanted or cell.strategy == OFF]
        deadline = self._deadline(frozenset(cells))
        if self.rounds is None and deadline is not None and self._has_least(wanted, self._off(cells)):
            expected_s = sum(took_s.get(cell, 0.0) for cell in chosen)
            if self.clock() + expected_s > deadline:
                return []
        return chosen

    def wanted(self, cells: Sequence[Cell]) -> Sequence[Cell]:
        """Return those of `cells` that need another turn, whatever the time; each takes it beside `off`."""
        off = self._off(cells)
        known = {cell: self.recorder.outcome(cell) for cell in cells}
        if self.rounds is not None:
            return [cell for cell in cells if _num_pairs(known[cell], off) < self.rounds]
        return [cell for cell in cells if not self._is_known(known[cell], off, is_alone=len(cells) == 1)]

    def _off(self, cells: Sequence[Cell]) -> Outcome | None:
        return next((self.recorder.outcome(cell) for cell in cells if cell.strategy == OFF), None)

    def _has_least(self, cells: Sequence[Cell], off: Outcome | None) -> bool:
        return all(_num_pairs(self.recorder.outcome(cell), off) >= stats.MIN_ROUNDS for cell in cells)

    def _is_known(self, outcome: Outcome, off: Outcome | None, *, is_alone: bool) -> bool:
        """Whether a cell needs no more turns: its overhead, or without `off` its step time, is known well enough."""
        if outcome.cell.strategy == OFF and not is_alone:
            return num_turns(outcome) > 0
        if self.target_frac is None:
            return False
        if off is None or outcome.cell.strategy == OFF:
            step = stats.step_time(outcome.rounds)
            return step is not None and step.half_width / step.centre <= self.target_frac
        overhead = stats.overhead(outcome.rounds, off.rounds)
        return overhead is not None and overhead.num_units >= _LEAST_UNITS and overhead.half_width <= self.target_frac

    def _deadline(self, cells: frozenset[Cell]) -> float | None:
        """When these cells have to be done: they get a share of the time that is left, by their number."""
        if self.deadline_s is None:
            return None
        known = next((group for group in self._deadlines if cells <= group), None)  # some of a group may have failed
        if known is None:
            begun = len([cell for cell in cells if cell.strategy != OFF]) or 1
            left = max(self.num_cells - 1 - self._num_begun, begun)
            now = self.clock()
            self._deadlines[cells] = now + (self.deadline_s - now) * min(begun / left, 1.0)
            self._num_begun += begun
            return self._deadlines[cells]
        return self._deadlines[known]


def num_turns(outcome: Outcome) -> int:
    """Return how many turns a cell has taken."""
    return len(stats.turns(outcome.rounds))


def _num_pairs(outcome: Outcome, off: Outcome | None) -> int:
    """How many turns a cell has taken beside `off`, valid or not; without `off`, how many turns."""
    numbers = {turn.number for turn in stats.turns(outcome.rounds)}
    return len(numbers if off is None else numbers & {turn.number for turn in stats.turns(off.rounds)})
