"""Runs with children that answer from a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fixtures_report import peaks, round_result

from gcbench.core.gradient_fingerprint import Fingerprint, ParameterPrint, pack
from gcbench.core.records import Machine, ModelFacts, Report
from gcbench.job.describe import DescribeTask
from gcbench.job.settings import Settings
from gcbench.measure import runner
from gcbench.measure.progress import QuietProgress
from gcbench.measure.task import MeasureTask
from gcbench.models.sources import ModelSource
from gcbench.processes.messages import Answer, Event, Task
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

Call = tuple[str, int, int]
"""Strategy, batch size, round."""


def gradients(value: float) -> Fingerprint:
    print_ = ParameterPrint(name="w", checksum=f"{int(value * 1000):x}", sketch=pack([value, 0.0]))
    return Fingerprint(step=0, parameters=(print_,), missing=())


class ScriptedChildren:
    """Answers every task well, unless `fates` has something else for it; calls `watch` before each measurement."""

    def __init__(
        self,
        *,
        fates: dict[Call, Answer] | None = None,
        facts: ModelFacts = FACTS,
        machine: Machine = MACHINE,
        watch: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self.fates, self.facts, self.machine, self.watch = fates or {}, facts, machine, watch
        self.calls: list[Call] = []
        self.tasks: list[MeasureTask] = []

    def run(self, task: Task, *, on_event: Callable[[Event], None], timeout_s: float | None) -> Answer:
        if isinstance(task, DescribeTask):
            return Answer(machine=self.machine, facts=self.facts)
        call = (task.cell.strategy, task.cell.workload.batch_size, task.round)
        self.watch(call)
        self.calls.append(call)
        self.tasks.append(task)
        on_event(Event(kind="timed", step=0, seconds=0.1))
        if call in self.fates:
            return self.fates[call]
        memory = peaks(1, 2, 3) if task.with_memory else None
        return Answer(result=round_result(task.round, [0.1, 0.2], memory=memory, diff=None), fingerprint=gradients(1.0))


class Ticker(QuietProgress):
    """Notes its calls."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def begin(self, *, num_steps, num_rounds):
        self.shown.append(f"begin {num_steps} {num_rounds}")

    def enter(self, cell, *, round, num_steps):
        self.shown.append(f"enter {cell.strategy} {round} {num_steps}")

    def leave(self, outcome):
        self.shown.append(f"leave {outcome.cell.strategy}")

    def skip(self, *, num_steps):
        self.shown.append(f"skip {num_steps}")


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
    )
