"""Times calls of operators on a device of this machine: what a plan's estimates of time are made of.

Calls are made as the step makes them: with its sizes and strides, results in memory newly taken, arguments out of the
caches where the step finds them there no more. What a call takes in a step beyond that is measured on a small model
(`calibration_host`).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from torch.utils._pytree import tree_leaves

from gcbench.calibration.op_times import Point
from gcbench.core.units import GIB, MIB
from gcbench.devices.backends import Device, cpu
from gcbench.operators.replay import BoundCall, NotReplayable, Replayer
from gcbench.simulate.costs import Work
from gcbench.simulate.op_work import CACHED_BYTES, of_call

_LEAST_SAMPLES, _MOST_SAMPLES = 3, 15
"""Times that a call is made; one more comes first and does not count."""
_ENOUGH_S = 0.05
"""Spent on one call: with the least samples taken, there are no more."""
_WITH_ALL = 2.0
"""What a sample takes in all, against the call alone: its arguments are found, made cold or hot, results let go."""
_HEADROOM = 2
"""A call is begun if what is left of the time is this many times what it is expected to take."""
_COLD_BYTES = 64 * MIB
"""More than the caches of most devices hold: an EPYC's 32 MiB a core complex, an H100's 50 MB."""
_HELD_BYTES = 16 * MIB
"""Of results kept alive, as those of a step are, so that the next results lie elsewhere."""
_MOST_BYTES = 2 * GIB
_MEMORY_SHARE = 4
"""One call, and all arguments together, may take this part of the memory that is free."""
_QUEUE = 8
"""Calls that a card is given at a time, so that what is timed is not how fast one alone is handed over."""
_PREPARED, _PREPARED_BYTES = 32, 256 * MIB
"""Calls, and bytes that they touch, after which those that are ready are made."""
_SHORT_BYTES = 8 * MIB
"""Of traffic: below it, what precedes a call tells on it."""


class Timer:
    """Makes calls on one device, over and over, and looks at the clock."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.is_cpu = device.name == cpu.TYPE
        self._free_bytes = _free_bytes(device)
        most_bytes = min(_MOST_BYTES, self._free_bytes // _MEMORY_SHARE)
        self._replayer = Replayer(torch.device(device.name), cold_bytes=_COLD_BYTES, most_bytes=most_bytes)
        self._held: deque[tuple[object, int]] = deque()
        self._held_bytes = 0

    def points(self, works: Sequence[Work], *, expected: Callable[[Work], float], until: float) -> tuple[Point, ...]:
        """As many of the works, from the first on, as can be timed up to the moment `until` of the monotonic clock."""
        left = deque(works)
        found: list[Point] = []
        while left:
            batch: list[Work] = []
            room = until - time.monotonic()
            while left:
                takes = expected(left[0]) * _WITH_ALL * (_LEAST_SAMPLES + 1)
                if takes > room and (batch or takes > until - time.monotonic()):
                    break
                room -= takes
                batch.append(left.popleft())
            if not batch:
                left.popleft()  # too long for what is left of the time; shorter ones may not be
                continue
            random.Random(0).shuffle(batch)  # calls of one size beside each other would find their like in the caches
            found += self._batch(batch, expected, until)
            if time.monotonic() >= until:
                break
        return tuple(found)

    def _batch(self, works: list[Work], expected: Callable[[Work], float], until: float) -> Iterator[Point]:
        """All in turn, again and again, so that a slow moment spoils one sample of each."""
        samples: dict[Work, list[float]] = {work: [] for work in works}
        did: dict[Work, Work] = {}
        for turn in range(_MOST_SAMPLES + 1):
            for ready in self._prepared(self._wanting(samples, turn, expected, until)):
                for work, call, before in ready:
                    try:
                        with torch.no_grad():
                            seconds, result = self._time(call, before)
                    except Exception:  # an operator may raise anything at arguments that are not those of a real step
                        del samples[work]
                        continue
                    samples[work].append(seconds)
                    if not turn:
                        did[work] = of_call(call.func, call.args, call.kwargs, result)
                    self._hold(result)
        for work, taken in samples.items():
            if len(taken) > 1:
                yield _point(did[work], work, typical(taken[1:]))

    def _wanting(
        self, samples: dict[Work, list[float]], turn: int, expected: Callable[[Work], float], until: float
    ) -> Iterator[Work]:
        """Those of which one more sample is to be had, and time is left to take it."""
        for work in list(samples):
            taken = samples[work]
            if turn > _LEAST_SAMPLES and sum(taken) > _ENOUGH_S:
                continue
            if time.monotonic() + _HEADROOM * (taken[-1] if taken else expected(work)) < until:
                yield work

    def _prepared(self, works: Iterator[Work]) -> Iterator[list[tuple[Work, BoundCall, BoundCall | None]]]:
        """Calls ready to be made, some at a time, each with another of its kind to make just before.

        Python that prepares a call, and other operators, push the code of its kernel out of the caches; in a step the
        same few operators come again and again. Calls that take long do not feel it.
        """
        ready: list[tuple[Work, BoundCall, BoundCall | None]] = []
        nbytes = 0
        for work in works:
            if work.nbytes > self._free_bytes // _MEMORY_SHARE:
                continue
            try:
                before = self._replayer.make(work.call, work.cold) if work.nbytes < _SHORT_BYTES else None
                ready.append((work, self._replayer.make(work.call, work.cold), before))
            except NotReplayable:
                continue
            nbytes += work.nbytes
            if len(ready) == _PREPARED or nbytes > _PREPARED_BYTES:
                yield ready
                ready, nbytes = [], 0
        yield ready

    def _time(self, call: BoundCall, before: BoundCall | None) -> tuple[float, object]:
        """Seconds of one call, and what it returned."""
        if not self.is_cpu:
            return self._time_on_card(call)
        if before is not None:
            before()
        for memory in call.hot:  # also what pushes code out of the caches, as the operators before it do
            if memory.nbytes <= CACHED_BYTES:
                memory.sum()
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    def _time_on_card(self, call: BoundCall) -> tuple[float, object]:
        """Between two events, as many times as fill the queue."""
        results: list[object] = []

        def run() -> None:
            for _ in range(_QUEUE):
                results[:] = [call()]

        return self.device.time(run) / _QUEUE, results[0]

    def _hold(self, result: object) -> None:
        nbytes = sum(value.nbytes for value in tree_leaves(result) if isinstance(value, torch.Tensor))
        self._held.append((result, nbytes))
        self._held_bytes += nbytes
        while self._held_bytes > _HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= self._held.popleft()[1]


def typical(samples: Sequence[float]) -> float:
    """The median of the lower half: what a call takes where nothing else runs."""
    return median(sorted(samples)[: (len(samples) + 1) // 2])


def _point(did: Work, asked: Work, seconds: float) -> Point:
    return Point(
        op=did.op,
        kind=did.kind,
        dtype=did.dtype,
        nbytes=did.nbytes,
        flops=did.flops,
        dims=did.dims,
        is_causal=did.is_causal,
        call=asked.call,
        cold=asked.cold,
        seconds=max(seconds, 1e-9),  # below what the clock tells apart
    )


def _free_bytes(device: Device) -> int:
    if device.name == cpu.TYPE:
        return cpu.available_bytes() or _MOST_BYTES
    return int(torch.cuda.mem_get_info(device.name)[0])
