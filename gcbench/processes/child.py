"""The entry point of a child process, which the parent imports too: it imports nothing heavy."""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from gcbench.core.files import write_text
from gcbench.core.json_codec import encode
from gcbench.processes.messages import Answer, Paused, Refusal, Task, handler_of


def main(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    """Handle the task and write the answer to a file; the server process has done the heavy imports already."""
    _redirect_output(log_path)
    write_text(Path(answer_path), json.dumps(encode(run_task(task, connection))))


def run_task(task: Task, connection: Connection) -> Answer:
    """Call the task's handler, send its events through the connection, and return its answer."""
    try:
        handle = handler_of(task)
    except ImportError as err:
        return Answer(refusal=Refusal.of_broken_library(err))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a child ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the server imported is never garbage, and a pass over it would take longer than a small step
    gc.enable()
    _be_killed_first()
    return handle(task, _PipeLine(connection))


class _PipeLine:
    """The line to the parent, through a pipe; ends this process when the parent has ended."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._said: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __call__(self, event: object) -> None:
        with suppress(OSError):
            self._connection.send(event)

    def pause(self, event: object) -> object:
        self(Paused(event=event))
        return self._said.get()

    def _listen(self) -> None:
        try:
            while True:
                self._said.put(self._connection.recv())
        except (EOFError, OSError):  # a reset, where the parent ended before it read all that was sent
            os._exit(1)


def _redirect_output(log_path: str) -> None:
    """Redirect what libraries print to the log, which is read only when the child fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def _be_killed_first() -> None:
    """Make the kernel kill this process when memory runs out, and not the parent, which has the results."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
