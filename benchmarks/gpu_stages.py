"""Runs a stage of `gpu_hour` within a limit of its own, whatever hangs in it, with its output in a log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 4 * 2**20
"""Of a log, at most; the middle of a longer one is cut out."""
SPARE_S = 8.0
"""For ending a stage that does not end by itself: a polite signal, a firm one, and the last."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing to do on a card.

    Attributes:
        limit_s: seconds that it may take before the stages after it have had their turn.
        needs_values: whether its figures are computed values or times, of which an emulated card has none.
        goes_on: whether it saves as it goes and begins where it stopped, so that it can use what time is left over.
        report: a file that it leaves and that is kept in the collection of runs.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs_values: bool = False
    goes_on: bool = False
    report: Path | None = None


def run(command: Sequence[str], log: Path, *, timeout_s: float, added: Mapping[str, str]) -> str:
    """Run a command and return how it ended: `done`, `cut off` or `exit N`. Nothing of it is left running."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **added}
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=timeout_s)
            return "done" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            return "cut off"
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all that descend from it or share its session."""
    family = _family(child.pid)
    if child.poll() is None:
        child.send_signal(signal.SIGINT)  # pytest then says why tests failed, and gcbench stores what it has
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=SPARE_S / 2)
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [pid for pid in (family | _family(child.pid)) if Path(f"/proc/{pid}").exists()]
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        if not left:
            break
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1.0)
        time.sleep(0.2)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=1.0)


def _family(pid: int) -> set[int]:
    """Return the process, its descendants, and every process in its session."""
    parents: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(path.parent.name)] = int(fields[1]), int(fields[3])
    found = {pid} | {each for each, (_, session) in parents.items() if session == pid}
    while more := {each for each, (parent, _) in parents.items() if parent in found} - found:
        found |= more
    return found


def shorten(log: Path) -> None:
    """Cut the middle out of a log that is longer than `LOG_BYTES`."""
    text = log.read_bytes()
    if len(text) > LOG_BYTES:
        half = LOG_BYTES // 2
        log.write_bytes(text[:half] + b"\n... the middle is cut out ...\n" + text[-half:])
