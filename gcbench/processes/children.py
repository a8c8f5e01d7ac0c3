"""Runs one child process per task, forked from a server that has imported torch; the parent survives their crashes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import connection as mp_connection
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from gcbench.core.files import temporary_folder
from gcbench.core.json_codec import decode
from gcbench.core.records import Failure
from gcbench.core.units import format_seconds
from gcbench.processes import child
from gcbench.processes.messages import Answer, Paused, Refusal, Task
from gcbench.processes.relay import Relay

_LOG_TAIL = 4000
_ENDED = (EOFError, ConnectionError)
_SERVER_END_S = 0.2
_UNKNOWN_EXITCODE = 255
"""What multiprocessing reports of a child where the server ended, which would know its exit code."""
_SERVER_LOG = "server.txt"
_RELAY_LOG = "relay.txt"


HEAVY = ("gcbench.training.step", "gcbench.models.build", "gcbench.checkpointing.apply", "gcbench.devices.backends")
"""Modules that every task needs, with torch and transformers. By name, as the parent does not import torch."""


class Child(Protocol):
    """One child process, which may pause in its task and live beside others."""

    def proceed(
        self, word: object = None, *, on_event: Callable[[Any], None], timeout_s: float | None
    ) -> Answer | Paused:
        """Have the child go on until it pauses or ends; a crash or timeout is an answer with a failure.

        Args:
            word: what the child gets where it paused.
            on_event: gets each event that the child sends meanwhile.
            timeout_s: seconds until it is killed; None for no limit.
        """

    def close(self) -> None:
        """Kill the child, if it has not ended."""


class Children(Protocol):
    """Runs tasks in child processes; tests of the scheduling replace it."""

    def run(self, task: Task, *, on_event: Callable[[Any], None], timeout_s: float | None) -> Answer:
        """Run `task` in a process of its own and return its answer; a crash or timeout is an answer with a failure.

        `on_event` gets each event that the child sends meanwhile, such as an `Event` for every training step.
        """

    def open(self, task: Task) -> Child:
        """Return a child for `task`, which starts when it is first told to proceed."""

    def halt(self) -> None:
        """Kill all children at once, and every later one; may be called from another thread."""


class ForkedChildren:
    """Child processes forked from a server process that has imported torch and the model's module once.

    A context manager: no child outlives it, however it ends.

    Args:
        preload: modules that the server imports besides `HEAVY`, for the handlers of the tasks.
        environment: variables to add to the children's environment, which nothing else gets; None for this process's.
            Then children run one at a time and do not pause.
        defaults: variables that the children have where this process's environment lacks them.
    """

    def __init__(
        self,
        *,
        preload: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        defaults: Mapping[str, str] | None = None,
    ) -> None:
        self._environment, self._modules = environment, preload
        self._defaults = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **(defaults or {})}
        self._relay: Relay | None = None
        self._context = multiprocessing.get_context("forkserver")
        self._preload = ["gcbench.processes.preload", *HEAVY, *preload]
        self._open: list[_ForkedChild] = []
        self._count = itertools.count()
        self.is_halted = False

    def __enter__(self) -> ForkedChildren:
        self._folder = temporary_folder()
        if self._environment is not None:
            self._relay = Relay(
                preload=self._modules, environment=self._environment, log_path=self._folder / _RELAY_LOG
            )
            return self
        self._context.set_forkserver_preload(self._preload)
        self._start_server()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for child_ in tuple(self._open):
            child_.close()
        if self._relay is not None:
            self._relay.close()
        elif kind is not None and not issubclass(kind, Exception):
            kill_server()  # after an interruption: by itself it would end only after all of its imports
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, task: Task, *, on_event: Callable[[Any], None], timeout_s: float | None) -> Answer:
        if self._relay is not None:
            return self._relay.run(task, on_event=on_event, timeout_s=timeout_s)
        opened = self.open(task)
        try:
            answer = opened.proceed(on_event=on_event, timeout_s=timeout_s)
            assert isinstance(answer, Answer), "a task that pauses is opened, not run"
            return answer
        finally:
            opened.close()

    def open(self, task: Task) -> Child:
        assert self._relay is None, "the relay runs one child at a time"
        opened = _ForkedChild(task, self, self._folder / str(next(self._count)))
        self._open.append(opened)
        return opened

    def halt(self) -> None:
        if self._relay is not None:
            self._relay.halt()
        self.is_halted = True
        for child_ in tuple(self._open):
            child_.kill_now()

    def start(self, args: tuple[object, ...]) -> ForkServerProcess:
        """Start a child process; raises one of `_ENDED` when the server ends instead."""
        process = self._context.Process(target=child.main, args=args, daemon=True)
        process.start()
        return process

    def restart_server(self) -> None:
        """Start another server once the last one, which may still seem to run, has ended."""
        time.sleep(_SERVER_END_S)
        self._start_server()

    def pipe(self) -> tuple[mp_connection.Connection, mp_connection.Connection]:
        """Return both ends of a pipe."""
        return self._context.Pipe()

    def server_log(self) -> str:
        """Return what the server printed."""
        return (self._folder / _SERVER_LOG).read_text(encoding="utf-8", errors="replace")

    def forget(self, closed: _ForkedChild) -> None:
        """Drop a child that was closed."""
        if closed in self._open:
            self._open.remove(closed)

    def _start_server(self) -> None:
        missing = {name: value for name, value in self._defaults.items() if name not in os.environ}
        os.environ.update(missing)
        try:
            _start_server(self._folder / _SERVER_LOG)
        finally:
            for name in missing:
                del os.environ[name]


class _ForkedChild:
    """One child of `ForkedChildren`, with a folder of its own for its answer and its output."""

    def __init__(self, task: Task, children: ForkedChildren, folder: Path) -> None:
        self._task, self._children, self._folder = task, children, folder
        self._answer_path, self._log_path = folder / "answer.json", folder / "log.txt"
        self._process: ForkServerProcess | None = None
        self._ours: mp_connection.Connection | None = None
        self._exitcode: int | None = None
        self._kills_before = 0

    def proceed(
        self, word: object = None, *, on_event: Callable[[Any], None], timeout_s: float | None
    ) -> Answer | Paused:
        try:
            if self._process is None:
                self._kills_before = _kernel_kills()
                self._start()
            else:
                self._say(word)
        except _ENDED:
            # The server ended before it could start a child: an import raised an error other than ImportError.
            return Answer(refusal=Refusal.of_broken_library(_last_line(self._children.server_log())))
        paused, in_time = self._follow(on_event, timeout_s)
        if paused is not None:
            self._kills_before = _kernel_kills()  # it may be killed while it waits
            return paused
        self._kill()
        if self._answer_path.exists():
            return decode(Answer, json.loads(self._answer_path.read_text(encoding="utf-8")))
        log = self._log()
        if not in_time:
            return Answer(failure=_timed_out(timeout_s or 0.0, log))
        return Answer(failure=_died(self._exitcode, log, by_kernel=_kernel_kills() > self._kills_before))

    def close(self) -> None:
        self._kill()
        if self._ours is not None:
            self._ours.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._children.forget(self)

    def kill_now(self) -> None:
        """Kill the child without waiting for its end; may be called from another thread."""
        process = self._process
        if process is not None and process.pid is not None:
            process.kill()

    def _start(self) -> None:
        self._folder.mkdir()
        try:
            self._fork()
        except _ENDED:
            if self._children.is_halted:
                raise
            self._children.restart_server()  # it was killed a moment ago, so a new one is tried once
            self._fork()

    def _fork(self) -> None:
        if self._ours is not None:
            self._ours.close()  # a child that the last server forked and did not report ends of it
        self._ours, theirs = self._children.pipe()
        with theirs:
            self._process = self._children.start((self._task, theirs, str(self._answer_path), str(self._log_path)))

    def _say(self, word: object) -> None:
        assert self._ours is not None
        with suppress(OSError):  # it has ended, which `_follow` finds out
            self._ours.send(word)

    def _log(self) -> str:
        if not self._log_path.exists():
            return ""
        return self._log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]

    def _follow(self, on_event: Callable[[Any], None], timeout_s: float | None) -> tuple[Paused | None, bool]:
        """Pass events on until the child pauses or ends: (its pause, if it did; whether that was in time)."""
        process, ours = self._process, self._ours
        assert process is not None and ours is not None
        if self._children.is_halted:
            return None, True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waiting: list[object] = [ours, process.sentinel]
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = mp_connection.wait(waiting, timeout=left)  # type: ignore[arg-type]
            if ours in ready:
                try:
                    event = ours.recv()
                except (EOFError, OSError):
                    waiting.remove(ours)
                    if not waiting:
                        return None, True
                    continue
                if isinstance(event, Paused):
                    return event, True
                on_event(event)
            elif process.sentinel in ready:
                if not self._outlives_server() or ours not in waiting:
                    return None, True
                waiting.remove(process.sentinel)  # by its line alone: it ends with the child
            elif not ready:
                return None, False

    def _outlives_server(self) -> bool:
        """Whether the server has ended and this child has not: its sentinel reports the end of either."""
        process = self._process
        if process is None or process.pid is None or process.exitcode != _UNKNOWN_EXITCODE:
            return False
        with suppress(OSError):
            os.kill(process.pid, 0)
            return True
        return False

    def _kill(self) -> None:
        process = self._process  # another thread may kill it as well, after an interruption
        if process is None:
            return
        if process.pid is not None:
            if self._outlives_server():
                with suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            self._exitcode = process.exitcode
        self._process = None


def _start_server(log_path: Path) -> None:
    """Start the server with its output in a log, and with Ctrl-C blocked.

    What libraries print on import must not appear in the parent's output. A terminal sends Ctrl-C to all processes, and
    only the parent may handle it; it is blocked, not ignored, so that the parent still gets one that comes meanwhile.
    """
    resource_tracker.ensure_running()  # first, because it unblocks the signal once it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    originals = {stream: os.dup(stream) for stream in (1, 2)}
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for stream in originals:
            os.dup2(log, stream)
        forkserver.ensure_running()
    finally:
        os.close(log)
        for stream, original in originals.items():
            os.dup2(original, stream)
            os.close(original)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_server() -> None:
    """Kill the server of this process, and so every later child, at once."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:  # a private attribute; without it the server runs for a few seconds more
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _timed_out(timeout_s: float, log: str) -> Failure:
    return Failure(
        kind="timeout",
        message=f"still running after {format_seconds(timeout_s)} and stopped; raise --timeout or shrink the cell",
        detail=log,
    )


def _died(exitcode: int | None, log: str, *, by_kernel: bool) -> Failure:
    """Classify the end of a child that wrote no answer."""
    if exitcode == -signal.SIGKILL and by_kernel:
        return Failure(
            kind="oom",
            message="memory ran out and the kernel killed the process; try a smaller --batch or --seq-len",
            detail=log,
        )
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return Failure(
            kind="killed" if name in ("SIGKILL", "SIGTERM") else "crash",
            message=f"the process was ended by {name}; run again, with a smaller cell if memory was low",
            detail=log,
        )
    return Failure(
        kind="crash",
        message=f"the process ended with code {exitcode} and no result ({_last_line(log)}); "
        "see its output in report.json",
        detail=log,
    )


def _last_line(log: str) -> str:
    return next((line.strip()[:200] for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")


def _kernel_kills() -> int:
    """Count the processes that the kernel of this machine has killed for lack of memory; 0 where that is unknown."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
