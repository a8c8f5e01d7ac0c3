"""Runs one child process per task, forked from a server that has imported torch; the parent survives their crashes."""

from __future__ import annotations

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
from gcbench.processes.messages import Answer, Refusal, Task
from gcbench.processes.relay import Relay

_LOG_TAIL = 4000
_ENDED = (EOFError, ConnectionError)
_SERVER_END_S = 0.2
_SERVER_LOG = "server.txt"
_RELAY_LOG = "relay.txt"


HEAVY = ("gcbench.training.step", "gcbench.models.build", "gcbench.checkpointing.apply", "gcbench.devices.backends")
"""Modules that every task needs, with torch and transformers. By name, as the parent does not import torch."""


class Children(Protocol):
    """Runs tasks in child processes; tests of the scheduling replace it."""

    def run(self, task: Task, *, on_event: Callable[[Any], None], timeout_s: float | None) -> Answer:
        """Run `task` in a process of its own and return its answer; a crash or timeout is an answer with a failure.

        `on_event` gets each event that the child sends meanwhile, such as an `Event` for every training step.
        """

    def halt(self) -> None:
        """Kill the running child at once, and every later one; may be called from another thread."""


class ForkedChildren:
    """Child processes forked from a server process that has imported torch and the model's module once.

    A context manager: no child outlives it, however it ends.

    Args:
        preload: modules that the server imports besides `HEAVY`, for the handlers of the tasks.
        environment: variables to add to the children's environment, which nothing else gets; None for this process's.
    """

    def __init__(self, *, preload: tuple[str, ...] = (), environment: Mapping[str, str] | None = None) -> None:
        self._environment, self._modules = environment, preload
        self._relay: Relay | None = None
        self._context = multiprocessing.get_context("forkserver")
        self._preload = ["gcbench.processes.preload", *HEAVY, *preload]
        self._process: ForkServerProcess | None = None
        self._exitcode: int | None = None
        self._is_halted = False

    def __enter__(self) -> ForkedChildren:
        self._folder = temporary_folder()
        if self._environment is not None:
            self._relay = Relay(
                preload=self._modules, environment=self._environment, log_path=self._folder / _RELAY_LOG
            )
            return self
        # Looking for a GPU through CUDA's runtime would keep every process that is forked afterwards from using it.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self._context.set_forkserver_preload(self._preload)
        _start_server(self._folder / _SERVER_LOG)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._kill()
        if self._relay is not None:
            self._relay.close()
        elif kind is not None and not issubclass(kind, Exception):
            kill_server()  # after an interruption: by itself it would end only after all of its imports
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, task: Task, *, on_event: Callable[[Any], None], timeout_s: float | None) -> Answer:
        if self._relay is not None:
            return self._relay.run(task, on_event=on_event, timeout_s=timeout_s)
        answer_path, log_path = self._folder / "answer.json", self._folder / "log.txt"
        for path in (answer_path, log_path):
            path.unlink(missing_ok=True)
        killed_before = _kernel_kills()
        ours, theirs = self._context.Pipe()
        try:
            try:
                self._start((task, theirs, str(answer_path), str(log_path)))
            except _ENDED:
                # The server ended before it could start a child: an import raised an error other than ImportError.
                log = (self._folder / _SERVER_LOG).read_text(encoding="utf-8", errors="replace")
                return Answer(refusal=Refusal.of_broken_library(_last_line(log)))
            theirs.close()
            assert self._process is not None
            in_time = self._is_halted or self._follow(self._process, ours, on_event, timeout_s)
        finally:
            self._kill()
            ours.close()
        if answer_path.exists():
            return decode(Answer, json.loads(answer_path.read_text(encoding="utf-8")))
        log = log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:] if log_path.exists() else ""
        if not in_time:
            return Answer(failure=_timed_out(timeout_s or 0.0, log))
        by_kernel = _kernel_kills() > killed_before
        return Answer(failure=_died(self._exitcode, log, by_kernel=by_kernel))

    def halt(self) -> None:
        if self._relay is not None:
            self._relay.halt()
        self._is_halted = True
        process = self._process
        if process is not None and process.pid is not None:
            process.kill()

    def _start(self, args: tuple[object, ...]) -> None:
        """Start the child; raises one of `_ENDED` when the server ends instead.

        A server that was killed a moment ago may still seem to run, so a new one is tried once.
        """
        self._process = self._context.Process(target=child.main, args=args, daemon=True)
        try:
            self._process.start()
        except _ENDED:
            if self._is_halted:
                raise
            time.sleep(_SERVER_END_S)
            _start_server(self._folder / _SERVER_LOG)
            self._process = self._context.Process(target=child.main, args=args, daemon=True)
            self._process.start()

    def _follow(
        self,
        process: ForkServerProcess,
        ours: mp_connection.Connection,
        on_event: Callable[[Any], None],
        timeout_s: float | None,
    ) -> bool:
        """Pass events on until the child ends; returns False when its time is up first."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waiting: list[object] = [ours, process.sentinel]
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = mp_connection.wait(waiting, timeout=left)  # type: ignore[arg-type]
            if ours in ready:
                try:
                    on_event(ours.recv())
                except (EOFError, OSError):
                    waiting.remove(ours)
            elif process.sentinel in ready:
                return True
            elif not ready:
                return False

    def _kill(self) -> None:
        process = self._process  # another thread may kill it as well, after an interruption
        if process is None:
            return
        if process.pid is not None:
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
