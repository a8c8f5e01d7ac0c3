"""Keeps the report of a run while it is measured, and saves it after each result: nothing measured is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from gcbench.core.gradient_fingerprint import Fingerprint, difference
from gcbench.core.json_codec import decode, encode
from gcbench.core.records import Cell, Failure, Outcome, Report, RoundResult, Workload
from gcbench.measure.task import TurnTaken
from gcbench.report import stats
from gcbench.report.run_folder import Store
from gcbench.strategies import OFF


class Recorder:
    """The report so far, and the folder in which it is saved.

    Attributes:
        report: with everything that was measured so far.
    """

    def __init__(self, report: Report, store: Store) -> None:
        self.report = report
        self._store = store
        store.save(report)

    def outcome(self, cell: Cell) -> Outcome:
        """Return the result of a cell so far."""
        return next(outcome for outcome in self.report.outcomes if outcome.cell == cell)

    def outcomes(self, cells: Sequence[Cell]) -> tuple[Outcome, ...]:
        """Return the results of some cells so far, in their order."""
        return tuple(self.outcome(cell) for cell in cells)

    def next_round(self, cell: Cell) -> int:
        """Return the number of the cell's next process."""
        return max((result.round for result in self.outcome(cell).rounds), default=-1) + 1

    def next_turn(self, cells: Sequence[Cell]) -> int:
        """Return the number of the next turn of these cells."""
        numbers = [turn.number for outcome in self.outcomes(cells) for turn in stats.turns(outcome.rounds)]
        return max(numbers, default=-1) + 1

    def has_memory(self, cell: Cell) -> bool:
        """Return whether the cell's memory was measured."""
        return any(result.memory is not None for result in self.outcome(cell).rounds)

    def add(self, cell: Cell, result: RoundResult, fingerprint: Fingerprint | None) -> None:
        """Add what a process measured first, with the difference of its gradients from those of `off`."""
        if fingerprint is not None:
            self._store.save_gradients(cell, result.round, json.dumps(encode(fingerprint)))
            result = self.compared(result, fingerprint, cell)
        outcome = self.outcome(cell)
        self.put(replace(outcome, rounds=(*outcome.rounds, result)))

    def add_turn(self, cell: Cell, round: int, taken: TurnTaken, *, wall_s: float) -> None:
        """Add a turn to what the cell's process of this number measured; `wall_s` is how long the process has run."""
        outcome = self.outcome(cell)
        self.put(
            replace(
                outcome,
                rounds=tuple(
                    _with_turn(result, taken, wall_s) if result.round == round else result for result in outcome.rounds
                ),
            )
        )

    def fail(self, cell: Cell, failure: Failure) -> None:
        """Note why the cell has no more results."""
        self.put(replace(self.outcome(cell), failure=failure))

    def put(self, outcome: Outcome) -> None:
        """Replace the outcome of its cell, and save the report."""
        outcomes = tuple(outcome if each.cell == outcome.cell else each for each in self.report.outcomes)
        self.report = replace(self.report, outcomes=outcomes)
        self._store.save(self.report)

    def add_notice(self, notice: str) -> None:
        """Add a sentence about the run to the report, once."""
        if notice not in self.report.notices:
            self.report = replace(self.report, notices=(*self.report.notices, notice))
            self._store.save(self.report)

    def compared(self, result: RoundResult, fingerprint: Fingerprint, cell: Cell) -> RoundResult:
        """Return the result with the difference of its gradients from those of `off` in its first process."""
        stored = self._store.load_gradients(reference_cell(cell.workload), 0)
        if stored is None or result.draws_other_dropout:
            return result
        found = difference(fingerprint, decode(Fingerprint, json.loads(stored)))
        return replace(result, grad_rel_diff=found.relative, grad_worst_param=found.worst)


def reference_cell(workload: Workload) -> Cell:
    """Return the cell of `off` in this workload."""
    return Cell(workload=workload, strategy=OFF)


def _with_turn(result: RoundResult, taken: TurnTaken, wall_s: float) -> RoundResult:
    memory = result.memory
    if memory is not None and taken.process_bytes is not None:
        memory = replace(memory, process_bytes=taken.process_bytes)
    return replace(
        result,
        memory=memory,
        step_times_s=(*result.step_times_s, *taken.turn.step_times_s),
        turns=(*result.turns, taken.turn),
        num_alloc_retries=taken.num_alloc_retries,
        num_steps=taken.num_steps,
        steps_s=taken.steps_s,
        wall_s=wall_s,
    )
