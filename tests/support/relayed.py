"""Tasks whose handlers tell what environment their child process has, hang, or end the relay."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from typing import ClassVar

from gcbench.core.records import Machine
from gcbench.processes.messages import Answer, Event


@dataclass(frozen=True, kw_only=True)
class Look:
    """Report the variables of the child as a machine's settings."""

    handler: ClassVar[str] = "relayed:look"


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Send an event, and never end."""

    handler: ClassVar[str] = "relayed:hang"


@dataclass(frozen=True, kw_only=True)
class KillRelay:
    """Kill the process whose server the child was forked from."""

    handler: ClassVar[str] = "relayed:kill_relay"

    pid: int


def look(task, send):
    send(Event(kind="looking", step=os.getpid(), seconds=None))
    return Answer(
        machine=Machine(device="cpu", device_name="", device_memory_bytes=None, platform="", settings=dict(os.environ))
    )


def hang(task, send):
    send(Event(kind="hanging", step=os.getpid(), seconds=None))
    threading.Event().wait()


def kill_relay(task, send):
    os.kill(task.pid, signal.SIGKILL)
    threading.Event().wait()
