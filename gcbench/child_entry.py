"""What a child process is started with: importable by the parent, because it imports nothing heavy."""

from __future__ import annotations

from multiprocessing.connection import Connection

from gcbench.tasks import Task


def main(task: Task, connection: Connection, answer_path: str, log_path: str) -> None:
    """Run `worker.main`, whose imports the server process has done already."""
    from gcbench import worker

    worker.main(task, connection, answer_path, log_path)
