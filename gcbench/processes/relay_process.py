"""The entry point of the relay: a process that runs tasks in child processes, on behalf of the one that started it."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from gcbench.core.errors import UnavailableError
from gcbench.processes.children import ForkedChildren, kill_server
from gcbench.processes.messages import Answer, Refusal
from gcbench.processes.relay import Event, Request


def serve(handle: int, preload: tuple[str, ...]) -> None:
    """Run every task that comes through the connection, until the parent closes it or ends."""
    # The parent decides when this ends. What is ignored is inherited, which the server needs for Ctrl-C alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    with Connection(handle) as connection:
        try:
            with ForkedChildren(preload=preload) as children:
                receiver = threading.Thread(target=_receive, args=(connection, requests, children.halt), daemon=True)
                receiver.start()
                while (request := requests.get()) is not None:
                    answer = children.run(
                        request.task,
                        on_event=lambda event: _send(connection, Event(event=event)),
                        timeout_s=request.timeout_s,
                    )
                    _send(connection, answer)
        except UnavailableError as err:
            _send(connection, Answer(refusal=Refusal(error=type(err).__name__, message=str(err))))
        finally:
            kill_server()  # of itself it would end only after its imports


def _receive(connection: Connection, requests: queue.SimpleQueue[Request | None], halt: Callable[[], None]) -> None:
    """Queue the requests; where the parent halts them or has ended, kill the running child first."""
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            halt()
            kill_server()  # it may still be importing, and the main thread be waiting for it
            requests.put(None)
            return
        if request is None:
            halt()
        else:
            requests.put(request)


def _send(connection: Connection, message: object) -> None:
    with suppress(OSError):  # the parent has ended, which the other thread finds out
        connection.send(message)
