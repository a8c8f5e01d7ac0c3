"""Uses a second core for work on a model that is already built, in a forked copy of the process."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """Runs `work` on each item in a forked copy of this process, at once; a context manager, which ends the copy.

    Results must be picklable. There are none where there is only one core, or where the copy fails.
    """

    def __init__(self, work: Callable[[T], R], items: Sequence[T]) -> None:
        self._pid: int | None = None
        if not items or not _can_be_shared():
            return
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _end_with(parent)
                os.close(reading)
                with os.fdopen(writing, "wb") as pipe:
                    pickle.dump([work(item) for item in items], pipe, protocol=pickle.HIGHEST_PROTOCOL)
                code = 0
            finally:
                os._exit(code)  # without a second cleanup of what belongs to this process
        os.close(writing)
        self._pid = pid
        self._pipe = os.fdopen(reading, "rb")

    def __enter__(self) -> Ahead[T, R]:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)  # it may be blocked on a full pipe
            self._end()

    def results(self) -> list[R] | None:
        """Wait for the results, one per item; None where there are none."""
        if self._pid is None:
            return None
        content = self._pipe.read()
        if self._end() != 0:
            return None
        results: list[R] = pickle.loads(content)
        return results

    def _end(self) -> int:
        assert self._pid is not None
        self._pipe.close()
        _, status = os.waitpid(self._pid, 0)
        self._pid = None
        return status


def on_two_cores(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each item, in order; this process and a copy of it share the items.

    Results must be picklable. Items that the copy fails on are done here.
    """
    numbers = _Numbers(len(items))
    found: dict[int, R] = {}
    with numbers, Ahead(lambda _: [(number, work(items[number])) for number in numbers], items[:1]) as there:
        found.update((number, work(items[number])) for number in numbers)
        for results in there.results() or ():
            found.update(results)
    return [found[number] if number in found else work(item) for number, item in enumerate(items)]


class _Numbers:
    """0, 1, 2, …, each handed out once among this process and its copies; a context manager."""

    _WIDTH = 4
    _MOST = 2**16 // _WIDTH
    """Capacity of a pipe; later numbers are not handed out."""

    def __init__(self, count: int) -> None:
        self._reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(b"".join(number.to_bytes(self._WIDTH, "big") for number in range(min(count, self._MOST))))

    def __enter__(self) -> _Numbers:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._reading)

    def __iter__(self) -> Iterator[int]:
        while number := os.read(self._reading, self._WIDTH):
            yield int.from_bytes(number, "big")


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, which then cannot do it (prctl(2))."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


def _can_be_shared() -> bool:
    """Whether a copy of this process can trace, and there is a core for it.

    autograd has a thread for each accelerator that torch sees: after a backward pass, a copy cannot run another.
    """
    if sys.platform != "linux" or torch.cuda.device_count() > 0:
        return False
    return len(os.sched_getaffinity(0)) > 1
