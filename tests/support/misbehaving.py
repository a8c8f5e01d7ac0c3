"""What `child.main` is replaced by to make the children that measure `per-layer` come to grief.

Each function is found by its name in the child, which imports this module: so they are at the top, one per fate.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from gcbench.core.records import Turn
from gcbench.measure.task import MeasureTask
from gcbench.processes import child
from gcbench.processes.messages import Task

VICTIM = "per-layer"


def _is_victim(task: Task) -> bool:
    return isinstance(task, MeasureTask) and task.cell.strategy == VICTIM


def hangs(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    if _is_victim(task):
        threading.Event().wait()
    child.main(task, connection, answer_path, log_path)


def kills_itself(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    if _is_victim(task):
        os.kill(os.getpid(), signal.SIGKILL)
    child.main(task, connection, answer_path, log_path)


def is_killed_in_its_second_turn(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    _in_the_second_turn(task, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child.main(task, connection, answer_path, log_path)


def stops_in_its_second_turn(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    """As Ctrl-Z or a debugger stops a process: it is there, and does nothing."""
    _in_the_second_turn(task, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    child.main(task, connection, answer_path, log_path)


def runs_out_of_memory_in_its_second_turn(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    """Beside others, that is: a process that takes one turn by itself has the memory."""
    _in_the_second_turn(task, _raise_memory_error)
    child.main(task, connection, answer_path, log_path)


def faults(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    if _is_victim(task):
        os.kill(os.getpid(), signal.SIGSEGV)
    child.main(task, connection, answer_path, log_path)


def exits(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    if _is_victim(task):
        Path(log_path).write_text("libfoo: 1\nlibfoo: giving up\n\n")
        os._exit(3)
    child.main(task, connection, answer_path, log_path)


def describes_nothing(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    _raise_in_the_step(task, ZeroDivisionError("the learning rate\nwas divided by nothing"))
    child.main(task, connection, answer_path, log_path)


def refuses_the_precision(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    _raise_in_the_step(task, RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"))
    child.main(task, connection, answer_path, log_path)


def runs_out_of_memory(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    _raise_in_the_step(task, MemoryError())
    child.main(task, connection, answer_path, log_path)


def _raise_memory_error() -> None:
    raise MemoryError


def _in_the_second_turn(task: Task, act: Callable[[], None]) -> None:
    if not _is_victim(task):
        return
    assert isinstance(task, MeasureTask)
    if task.turn is not None:
        return
    from gcbench.measure.worker import _Measurement

    take = _Measurement._turn

    def turn(self: _Measurement, number: int) -> Turn:
        if number == 1:
            act()
        return take(self, number)

    _Measurement._turn = turn


def _raise_in_the_step(task: Task, error: BaseException) -> None:
    if not _is_victim(task):
        return
    from gcbench.training.step import TrainingStep

    def step(self: object, on_phase: object = None) -> None:
        raise error

    TrainingStep.__call__ = step
