"""Two cores for work that takes a model already built: the process is split in two, and one half tells the other."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_halves(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each item, in order, every second one done by a forked copy of this process.

    Results must be picklable. What the copy cannot do, for whatever reason, is done here.
    """
    there = items[1::2]
    if not there or not _has_two_cores():
        return [work(item) for item in items]
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as telling:
                pickle.dump([work(item) for item in there], telling, protocol=pickle.HIGHEST_PROTOCOL)
            code = 0
        finally:
            os._exit(code)  # nothing of this process is to be cleaned up twice
    os.close(writing)
    told: list[R] | None = None
    pipe = os.fdopen(reading, "rb")
    try:
        here = [work(item) for item in items[0::2]]
        content = pipe.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # it may wait for somebody to read what it has to say
        raise
    finally:
        pipe.close()
        _, status = os.waitpid(pid, 0)
    if status == 0:
        told = pickle.loads(content)
    results: list[R] = []
    for place, item in enumerate(items):
        results.append(here[place // 2] if place % 2 == 0 else told[place // 2] if told is not None else work(item))
    return results


def _has_two_cores() -> bool:
    if sys.platform != "linux":
        return False
    return len(os.sched_getaffinity(0)) > 1
