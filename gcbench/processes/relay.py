"""Has child processes run from a process of its own, whose environment differs from the parent's.

A server of forked children is one per process, and children have its environment. So children that need other
variables are forked from the server of another process, the relay, which gets tasks and returns events and answers:
nothing changes in the parent's environment, and plain children may run before, after and beside them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any

from gcbench.processes.messages import Answer, Refusal, Task

_END_S = 10.0
"""The relay ends within this time once its pipe is closed, or is killed."""
_MOST_LOG = 200


@dataclass(frozen=True, kw_only=True)
class Request:
    """A task for the relay."""

    task: Task
    timeout_s: float | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of the running child."""

    event: object


class Relay:
    """The relay, as the parent sees it: starts when it is made, ends with `close`."""

    def __init__(self, *, preload: tuple[str, ...], environment: Mapping[str, str], log_path: Path) -> None:
        """Start the relay; `environment` is added to the parent's own for it and its children."""
        self._log_path = log_path
        self._ours, theirs = Pipe()
        # The path as a value, so that the relay finds what this process finds, whatever made it so; and its temporary
        # files in this one's folder, which is removed even where the relay is killed.
        code = (
            f"import sys, tempfile; sys.path[:] = {sys.path!r}; tempfile.tempdir = {str(log_path.parent)!r}; "
            f"from gcbench.processes.relay_process import serve; serve({theirs.fileno()}, {preload!r})"
        )
        with theirs, log_path.open("ab") as log:
            self._process = _without_interrupt([sys.executable, "-c", code], environment, theirs.fileno(), log)

    def run(self, task: Task, *, on_event: Callable[[Any], None], timeout_s: float | None) -> Answer:
        """Have the relay run the task in a child, and return its answer; an exception here ends the relay."""
        try:
            self._ours.send(Request(task=task, timeout_s=timeout_s))
            while not isinstance(message := self._ours.recv(), Answer):
                on_event(message.event)
            return message
        except (EOFError, ConnectionError):
            log = self._log_path.read_text(encoding="utf-8", errors="replace").strip()
            said = log.splitlines()[-1][:_MOST_LOG] if log else "its process ended"
            return Answer(refusal=Refusal.of_broken_library(said))
        except BaseException:
            self.close()
            raise

    def halt(self) -> None:
        """Kill the running child at once, and every later one; may be called from another thread."""
        with suppress(OSError):
            self._ours.send(None)

    def close(self) -> None:
        """End the relay and all that it started."""
        with suppress(OSError):
            self._ours.close()
        try:
            self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _without_interrupt(
    command: list[str], environment: Mapping[str, str], handle: int, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a process with Ctrl-C blocked for good: a terminal sends it to all processes, and only the parent may act.

    Blocked, not ignored, so that the parent still gets one that comes meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=(handle,),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
