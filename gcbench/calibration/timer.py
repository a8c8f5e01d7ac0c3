"""Times operator calls on a device of this machine; estimates of step times are sums of these.

Calls are made as in the step: same sizes and strides, results in newly allocated memory, arguments cold (not in a
cache) where they are cold in the step. The overhead of a call in a step is measured separately (`overheads`).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
"""Timed repetitions of a call, after one warm-up."""
_ENOUGH_S = 0.05
"""Seconds per call after which no more than the least samples are taken."""
_WITH_ALL = 2.0
"""Time of a sample over that of the call: its arguments are made, cold or hot, and results are freed."""
_HEADROOM = 2
"""A call is started if the remaining time is this many times its expected time."""
_COLD_BYTES = 64 * MIB
"""More than most caches: 32 MiB per core complex of an EPYC, 50 MB on an H100."""
_HELD_BYTES = 16 * MIB
"""Bytes of results that stay allocated, as in a step, so that new results get other memory."""
_MOST_BYTES = 2 * GIB
_MEMORY_SHARE = 4
"""One call, and all arguments together, may use one part in this many of the free memory."""
_QUEUE = 8
"""Calls submitted to a GPU at a time, so that launch latency is not what is timed."""
_PREPARED, _PREPARED_BYTES = 32, 256 * MIB
"""Numbers of prepared calls, and of bytes they touch, at which they are made."""
_SHORT_BYTES = 8 * MIB
"""Bytes touched; for smaller calls, the call before affects the time."""
_SLOWEST = 1 / 3
"""Of wall time: a calibration takes up to three times its budget on a busy machine."""
_RESOLUTION_S = 1e-9
"""Of both clocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """Seconds of wall time, and of processor time of all threads of this process; the latter None on a GPU."""

    wall_s: float
    processor_s: float | None

    def minus(self, earlier: Took) -> Took:
        """What passed since `earlier`, which has both."""
        return Took(
            wall_s=self.wall_s - earlier.wall_s, processor_s=(self.processor_s or 0.0) - (earlier.processor_s or 0.0)
        )


def clocks() -> Took:
    """Read both clocks.

    The processor clock is that of the scheduler, to the nanosecond; its parts, user and system time, are counted in
    ticks of milliseconds (CLOCK_PROCESS_CPUTIME_ID in clock_gettime(2), getrusage(2)).
    """
    return Took(wall_s=time.perf_counter(), processor_s=time.process_time())


class Timer:
    """Times calls on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.is_cpu = device.name == cpu.TYPE
        self._thread_s, self._begun_s = time.thread_time(), time.monotonic()
        self._free_bytes = _free_bytes(device)
        most_bytes = min(_MOST_BYTES, self._free_bytes // _MEMORY_SHARE)
        self._replayer = Replayer(torch.device(device.name), cold_bytes=_COLD_BYTES, most_bytes=most_bytes)
        self._held: deque[tuple[object, int]] = deque()
        self._held_bytes = 0

    def now(self) -> float:
        """Return the clock of time budgets, in seconds.

        On a CPU it is the processor time of this thread, so that calls are timed as often as on an idle machine where
        other processes compute, but no slower than `_SLOWEST` of wall time.
        """
        if not self.is_cpu:
            return time.monotonic()
        return max(time.thread_time() - self._thread_s, _SLOWEST * (time.monotonic() - self._begun_s))

    def points(self, works: Sequence[Work], *, expected: Callable[[Work], float], until: float) -> tuple[Point, ...]:
        """Points of as many works, from the first on, as can be timed until `until` on `now`."""
        left = deque(works)
        found: list[Point] = []
        while left:
            batch: list[Work] = []
            remaining = until - self.now()
            while left:
                takes = expected(left[0]) * _WITH_ALL * (_LEAST_SAMPLES + 1)
                if takes > remaining and (batch or takes > until - self.now()):
                    break
                remaining -= takes
                batch.append(left.popleft())
            if not batch:
                left.popleft()  # too long for the remaining time; shorter ones may fit
                continue
            random.Random(0).shuffle(batch)  # calls of one size in a row would find their code in the caches
            found += self._batch(batch, expected, until)
            if self.now() >= until:
                break
        return tuple(found)

    def _batch(self, works: list[Work], expected: Callable[[Work], float], until: float) -> Iterator[Point]:
        """Sample all works in turn, again and again, so that a slow moment affects one sample of each."""
        samples: dict[Work, list[Took]] = {work: [] for work in works}
        did: dict[Work, Work] = {}
        for turn in range(_MOST_SAMPLES + 1):
            for ready in self._prepared(self._to_sample(samples, turn, expected, until)):
                for work, call, before in ready:
                    try:
                        with torch.no_grad():
                            took, result = self._time(call, before)
                    except Exception:  # an operator may raise anything at arguments that are not those of a real step
                        del samples[work]
                        continue
                    samples[work].append(took)
                    if not turn:
                        did[work] = of_call(call.func, call.args, call.kwargs, result)
                    self._hold(result)
        for work, taken in samples.items():
            if len(taken) > 1:
                yield _point(did[work], work, taken[1:])

    def _to_sample(
        self, samples: dict[Work, list[Took]], turn: int, expected: Callable[[Work], float], until: float
    ) -> Iterator[Work]:
        """The works that need one more sample, while time is left for it."""
        for work in list(samples):
            taken = samples[work]
            if turn > _LEAST_SAMPLES and sum(took.wall_s for took in taken) > _ENOUGH_S:
                continue
            if self.now() + _HEADROOM * (taken[-1].wall_s if taken else expected(work)) < until:
                yield work

    def _prepared(self, works: Iterator[Work]) -> Iterator[list[tuple[Work, BoundCall, BoundCall | None]]]:
        """Prepared calls in batches, the short ones each with an equal call to make just before.

        Preparing a call, and other operators, evict the code of its kernel from the caches; in a step the same few
        operators recur. Long calls are not affected.
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

    def _time(self, call: BoundCall, before: BoundCall | None) -> tuple[Took, object]:
        """(what one call took, its result)."""
        if not self.is_cpu:
            return self._time_on_card(call)
        if before is not None:
            before()
        for memory in call.hot:  # also evicts code from the caches, as the operators before it do
            if memory.nbytes <= CACHED_BYTES:
                memory.sum()
        before_s = clocks()
        result = call()
        return clocks().minus(before_s), result

    def _time_on_card(self, call: BoundCall) -> tuple[Took, object]:
        """The same on a GPU: the mean of `_QUEUE` calls between two events."""
        results: list[object] = []

        def run() -> None:
            for _ in range(_QUEUE):
                results[:] = [call()]

        return Took(wall_s=self.device.time(run) / _QUEUE, processor_s=None), results[0]

    def _hold(self, result: object) -> None:
        nbytes = sum(value.nbytes for value in tree_leaves(result) if isinstance(value, torch.Tensor))
        self._held.append((result, nbytes))
        self._held_bytes += nbytes
        while self._held_bytes > _HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= self._held.popleft()[1]


def typical(samples: Sequence[float]) -> float:
    """The median of the lower half: the time on an idle machine."""
    return median(sorted(samples)[: (len(samples) + 1) // 2])


def _point(did: Work, requested: Work, taken: Sequence[Took]) -> Point:
    processor = [took.processor_s for took in taken if took.processor_s is not None]
    return Point(
        op=did.op,
        kind=did.kind,
        dtype=did.dtype,
        nbytes=did.nbytes,
        flops=did.flops,
        dims=did.dims,
        is_causal=did.is_causal,
        call=requested.call,
        cold=requested.cold,
        seconds=max(typical([took.wall_s for took in taken]), _RESOLUTION_S),
        processor_s=max(typical(processor), _RESOLUTION_S) if processor else None,
    )


def _free_bytes(device: Device) -> int:
    if device.name == cpu.TYPE:
        return cpu.available_bytes() or _MOST_BYTES
    return int(torch.cuda.mem_get_info(device.name)[0])
