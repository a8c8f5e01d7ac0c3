"""What a child process is started with: importable by the parent, because it imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from gcbench.codec import encode
from gcbench.report import write_text
from gcbench.tasks import Answer, Refusal, Task


def main(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    """Write the answer of `worker.main`, whose imports the server process has done already."""
    _redirect_output(log_path)
    write_text(Path(answer_path), json.dumps(encode(_answer(task, connection))))


def _answer(task: Task, connection: Connection) -> Answer:
    try:
        from gcbench import worker
    except ImportError as err:
        return Answer(refusal=Refusal.of_broken_library(err))
    return worker.main(task, connection)


def _redirect_output(log_path: str) -> None:
    """Libraries print what they like; it goes to the log, which is read only when the child fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
