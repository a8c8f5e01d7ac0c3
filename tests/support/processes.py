"""What tests know of other processes, and how they wait for them; by /proc, so on Linux only."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

PROCESS_TIMEOUT_S = 120
"""For a subprocess of a test that hangs; never waited for otherwise."""


def session_members(session: int) -> list[int]:
    """The processes of a session that still run, zombies left out."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(sid) == session and state != "Z":
            members.append(int(stat.parent.name))
    return sorted(members)


def await_line(process: subprocess.Popen[str], start: str) -> list[str]:
    """The lines on standard error up to the first that begins with `start`; the rest is left for `communicate`."""
    lines, line = [], b""
    watchdog = threading.Timer(PROCESS_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        while byte := os.read(process.stderr.fileno(), 1):  # no more at a time: what a buffer took would be lost
            line += byte
            if byte == b"\n":
                lines.append(line.decode())
                line = b""
                if lines[-1].startswith(start):
                    return lines
    finally:
        watchdog.cancel()
    raise AssertionError(f"{start!r} was never said: {''.join(lines)}")


def is_server(pid: int) -> bool:
    """Whether a process is the one that children are forked from, and not one of them, which have its command line."""
    parent = int(_read(pid, "stat").rpartition(b")")[2].split()[1])
    return b"forkserver" in _read(pid, "cmdline") and b"forkserver" not in _read(parent, "cmdline")


def _read(pid: int, name: str) -> bytes:
    """A file of /proc; empty when the process has ended."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def await_members(process: subprocess.Popen[str], *, at_least: int) -> list[int]:
    """The processes of the run's session once there are so many: the parent, its two helpers, then a child."""
    return _await(lambda: session_members(process.pid), lambda members: len(members) >= at_least)


def await_import(process: subprocess.Popen[str]) -> int:
    """The server, once it is in the middle of importing torch: its library is mapped, its Python half is not read."""

    def importing() -> list[int]:
        return [pid for pid in session_members(process.pid) if b"libtorch_cpu" in _read(pid, "maps")]

    return _await(importing, bool)[0]


def await_nobody(process: subprocess.Popen[str]) -> None:
    """The server may be in the middle of importing torch, and looks up after that."""
    _await(lambda: session_members(process.pid), lambda members: not members, seconds=15)


def _await(look, holds, *, seconds: float = 60):
    """Polls, because the end of somebody else's process is no event that can be waited for."""
    deadline = time.monotonic() + seconds
    while not holds(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)
    return seen
