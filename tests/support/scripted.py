"""Runs with children that answer from a script, on a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from fixtures_report import peaks, round_result

from gcbench.core.gradient_fingerprint import Fingerprint, ParameterPrint, pack
from gcbench.core.records import Conditions, Failure, Machine, ModelFacts, Report, Turn
from gcbench.job.describe import DescribeTask
from gcbench.job.settings import Settings
from gcbench.measure import runner
from gcbench.measure.progress import QuietProgress
from gcbench.measure.task import MeasureTask, Ready, TakeTurn, TurnTaken
from gcbench.models.sources import ModelSource
from gcbench.processes import children as real
from gcbench.processes.messages import Answer, Event, Paused, Task
from gcbench.report import stats
from gcbench.report.run_folder import Store

SOURCE = ModelSource(name="m", origin="a test", config={"model_type": "llama"}, location="m")
FACTS = ModelFacts(
    model="m",
    model_type="llama",
    num_params=10,
    num_layers=4,
    max_seq_len=128,
    attn_implementation="sdpa",
    checkpointing_refusal=None,
)
MACHINE = Machine(device="cpu", device_name="A CPU", device_memory_bytes=None, platform="Test", versions={"torch": "2"})
SETTINGS = Settings(
    model="m", batch_size=(1,), seq_len=(8,), strategies=("per-layer", "off", "every:2"), rounds=3, warmup=1, steps=2
)
FOUR = replace(SETTINGS, strategies=("off", "per-layer", "every:2", "every:4"))

WARM = "warming up"
Call = tuple[str, int, int | str]
"""Strategy, batch size, and the number of the turn or `WARM`. A process that takes one turn and ends has that turn."""


class Clock:
    """Time that passes only where a child takes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, kw_only=True)
class Hangs:
    """The fate of a child that never comes back: it is stopped at its timeout."""


class Silent(Exception):
    """A child hangs and nobody would stop it."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory that the children share.

    Attributes:
        bytes: in all.
        needs: what a process holds, by strategy; 100 where it is not listed.
        extra: what it takes besides while it warms up or takes a turn, by call.
    """

    bytes: int
    needs: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[Call, int] = field(default_factory=dict)

    def of(self, strategy: str) -> int:
        return self.needs.get(strategy, 100)


PLENTY = Room(bytes=10**6)
OUT_OF_MEMORY = Answer(failure=Failure(kind="oom", message="memory ran out; try a smaller --batch"))


def gradients(value: float) -> Fingerprint:
    print_ = ParameterPrint(name="w", checksum=f"{int(value * 1000):x}", sketch=pack([value, 0.0]))
    return Fingerprint(step=0, parameters=(print_,), missing=())


def crash(kind: str = "crash") -> Answer:
    return Answer(failure=Failure(kind=kind, message="it fell over"))


class ScriptedChildren:
    """Answers every task well, unless `fates` has something else for it; calls `watch` before each measurement.

    Args:
        step_s: seconds of one step in a turn, and of warming up.
        conditions: those of a turn.
        room: None for a device that does not know its memory.
        process_bytes: what a device reports for the memory of the process.

    Attributes:
        calls: what was measured, in order.
        begun: the processes that were started, by strategy and number; `running` are those that were not closed.
    """

    def __init__(
        self,
        *,
        fates: Mapping[Call, Answer | Hangs] | None = None,
        facts: ModelFacts = FACTS,
        machine: Machine = MACHINE,
        watch: Callable[[Call], None] = lambda call: None,
        step_s: Callable[[Call], float] = lambda call: 0.1,
        conditions: Callable[[Call], Conditions] = lambda call: Conditions(),
        room: Room | None = PLENTY,
        process_bytes: int | None = 3000,
        clock: Clock | None = None,
    ) -> None:
        self.fates, self.facts, self.machine, self.watch = fates or {}, facts, machine, watch
        self.step_s, self.conditions, self.room, self.process_bytes = step_s, conditions, room, process_bytes
        self.clock = clock or Clock()
        self.calls: list[Call] = []
        self.tasks: list[MeasureTask] = []
        self.running: list[ScriptedChild] = []
        self.most_running = 0
        self.num_opened = self.num_closed = 0

    def run(self, task: Task, *, on_event: Callable[[Event], None], timeout_s: float | None) -> Answer:
        if isinstance(task, DescribeTask):
            return Answer(machine=self.machine, facts=self.facts)
        assert task.turn is not None, "a task that pauses is opened, not run"
        child = self.open(task)
        try:
            return child.all_at_once(on_event, timeout_s)
        finally:
            child.close()

    def open(self, task: MeasureTask) -> ScriptedChild:
        self.num_opened += 1
        child = ScriptedChild(task, self)
        self.running.append(child)
        self.most_running = max(self.most_running, len(self.running))
        return child

    def free_bytes(self) -> int | None:
        """What is left beside the processes that have warmed up."""
        if self.room is None:
            return None
        return self.room.bytes - sum(self.room.of(child.strategy) for child in self.running if child.is_warm)

    def turn(self, call: Call, num_steps: int) -> Turn:
        step_s = self.step_s(call)
        is_cpu = self.machine.device == "cpu"
        assert isinstance(call[2], int)
        return Turn(
            number=call[2],
            step_times_s=(step_s,) * num_steps,
            user_s=step_s * num_steps if is_cpu else None,
            system_s=0.0 if is_cpu else None,
            page_faults=0 if is_cpu else None,
            conditions=self.conditions(call),
        )


class ScriptedChild:
    """One process of `ScriptedChildren`."""

    def __init__(self, task: MeasureTask, children: ScriptedChildren) -> None:
        self.task, self.children = task, children
        self.strategy = task.cell.strategy
        self.is_warm = self.is_over = self.is_closed = False
        self._num_steps, self._steps_s = task.warmup + task.with_memory, 0.0

    def proceed(
        self, word: object = None, *, on_event: Callable[[Event], None], timeout_s: float | None
    ) -> Answer | Paused:
        assert not self.is_over and not self.is_closed, "told to go on after its end"
        if not self.is_warm:
            assert word is None and self.task.turn is None
            answer = self._work(self._call(WARM), "warm-up", on_event, timeout_s)
            if answer.result is None or answer.fingerprint is None:
                return self._end(answer)
            self.is_warm = True
            room, memory = self.children.room, answer.result.memory
            if memory is not None:
                memory = replace(memory, process_bytes=self.children.process_bytes)
            return Paused(
                event=Ready(
                    result=replace(answer.result, memory=memory),
                    fingerprint=answer.fingerprint,
                    held_bytes=None if room is None else room.of(self.strategy),
                    free_bytes=self.children.free_bytes(),
                )
            )
        assert isinstance(word, TakeTurn)
        call = self._call(word.number)
        answer = self._work(call, "timed", on_event, timeout_s)
        if answer.result is None:
            return self._end(answer)
        turn = self.children.turn(call, self.task.steps)
        self._num_steps += len(turn.step_times_s)
        self._steps_s += sum(turn.step_times_s)
        return Paused(
            event=TurnTaken(
                turn=turn,
                process_bytes=self.children.process_bytes if self.children.machine.device == "cpu" else None,
                num_alloc_retries=None,
                num_steps=self._num_steps,
                steps_s=self._steps_s,
            )
        )

    def all_at_once(self, on_event: Callable[[Event], None], timeout_s: float | None) -> Answer:
        """Warm up, take the one turn and end."""
        assert self.task.turn is not None
        call = self._call(self.task.turn)
        answer = self._work(call, "timed", on_event, timeout_s)
        if answer.result is None or call in self.children.fates:
            return answer
        turn = self.children.turn(call, self.task.steps)
        memory = answer.result.memory
        return replace(
            answer,
            result=replace(
                answer.result,
                memory=None if memory is None else replace(memory, process_bytes=self.children.process_bytes),
                step_times_s=turn.step_times_s,
                turns=(turn,),
            ),
        )

    def close(self) -> None:
        if not self.is_closed:
            self.children.num_closed += 1
            self.children.running.remove(self)
        self.is_closed = True

    def _call(self, turn: int | str) -> Call:
        return (self.strategy, self.task.cell.workload.batch_size, turn)

    def _work(self, call: Call, kind: str, on_event: Callable[[Event], None], timeout_s: float | None) -> Answer:
        children = self.children
        children.watch(call)
        children.calls.append(call)
        if call[2] == WARM or self.task.turn is not None:
            children.tasks.append(self.task)
        on_event(Event(kind=kind, step=0, seconds=0.1))
        fate = children.fates.get(call)
        took_s = children.step_s(call) * (self.task.steps or 1)
        if isinstance(fate, Hangs) or (timeout_s is not None and took_s > timeout_s):
            if timeout_s is None:
                raise Silent(call)
            children.clock.now += timeout_s
            return Answer(failure=real._timed_out(timeout_s, "its log"))
        children.clock.now += took_s
        if fate is not None:
            return fate
        if not self._fits(call):
            return OUT_OF_MEMORY
        memory = peaks(1, 2, 3) if self.task.with_memory else None
        return Answer(result=round_result(self.task.round, memory=memory, diff=None), fingerprint=gradients(1.0))

    def _fits(self, call: Call) -> bool:
        free, room = self.children.free_bytes(), self.children.room
        if free is None or room is None:
            return True
        return (0 if self.is_warm else room.of(self.strategy)) + room.extra.get(call, 0) <= free

    def _end(self, answer: Answer) -> Answer:
        self.is_over = True
        return answer


class Ticker(QuietProgress):
    """Notes its calls."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def begin(self, *, num_rounds, limit_s=None):
        self.shown.append(f"begin {num_rounds} {limit_s}")

    def enter(self, cell, *, doing):
        self.shown.append(f"enter {cell.strategy} {doing}")

    def leave(self, outcome):
        self.shown.append(f"leave {outcome.cell.strategy}")

    def end_round(self, outcomes):
        self.shown.append(f"end {' '.join(outcome.cell.strategy for outcome in outcomes)}")


def go(
    folder: Path,
    children: ScriptedChildren,
    settings: Settings = SETTINGS,
    *,
    previous: Report | None = None,
    progress: QuietProgress | None = None,
) -> Report:
    return runner.run(
        settings,
        source=SOURCE,
        children=children,
        store=Store(folder),
        progress=progress or QuietProgress(),
        command="gcbench run",
        previous=previous,
        clock=children.clock,
    )


def turns(report: Report) -> dict[str, list[list[int]]]:
    """The numbers of the turns of each process, by strategy."""
    return {
        outcome.cell.strategy: [[turn.number for turn in result.turns] for result in outcome.rounds]
        for outcome in report.outcomes
    }


def numbers(report: Report) -> dict[str, list[int]]:
    """The numbers of the turns of all processes, by strategy."""
    return {name: list(chain.from_iterable(each)) for name, each in turns(report).items()}


def num_pairs(report: Report) -> dict[str, int]:
    """How many turns each strategy has beside one of `off`."""
    rounds = {outcome.cell.strategy: outcome.rounds for outcome in report.outcomes}
    found = {name: stats.overhead(each, rounds["off"]) for name, each in rounds.items() if name != "off"}
    return {name: 0 if overhead is None else overhead.num_units for name, overhead in found.items()}


def all_ended(children: ScriptedChildren) -> bool:
    return children.running == [] and children.num_opened == children.num_closed > 0
