"""Lets autograd's threads come to rest before the interpreter ends."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

_THREADS = "pt_autograd"
_PAUSE_S = 0.02
_MOST_S = 2.0
_SWITCHES = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")


def wait_for_autograd(threads: Path = Path("/proc/self/task")) -> None:
    """Wait, for two seconds at most, until no thread of autograd has anything left to do.

    Such a thread releases the graph after `backward()` has returned, for which it needs the interpreter. One that asks
    for an interpreter that ends is ended by it, and the process with it: "terminate called without an active
    exception". On a card the kernels take time enough for that; on an emulated one a script may end at once.

    Args:
        threads: folder of Linux with one folder for each thread of this process.
    """
    ends_at = time.monotonic() + _MOST_S
    before = _at_work(threads)
    while before and time.monotonic() < ends_at:
        time.sleep(_PAUSE_S)  # gives the interpreter to whoever asks for it
        now = _at_work(threads)
        if now == before and not any(state == "R" for state, _ in now.values()):
            return
        before = now


def _at_work(threads: Path) -> dict[str, tuple[str, int]]:
    """Autograd's threads: state, and how often they began or ended to wait.

    One that waits for the interpreter looks for it every few milliseconds; one without work waits once.
    """
    found: dict[str, tuple[str, int]] = {}
    for folder in threads.glob("*"):
        with suppress(OSError, ValueError, KeyError):
            lines = (folder / "status").read_text().splitlines()
            values = dict(line.split(":", 1) for line in lines)
            if values["Name"].strip().startswith(_THREADS):
                switches = sum(int(values[name]) for name in _SWITCHES)
                found[folder.name] = (values["State"].split()[0], switches)
    return found
