"""Reads the state of the machine before and after timed steps: what others use, throttling, clocks. No torch."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from gcbench.core.records import Conditions

SLEEPING = {"OMP_WAIT_POLICY": "passive"}
"""OpenMP's threads sleep while they wait for each other: by default they spin, so that where another process holds one
of them up, the others use processor time for nothing. A step takes up to a tenth longer. In the environment of all
processes that measure, and of those that look up a calibration of this machine, as it changes what calls take."""
_LEAST_CLOCK_STEP_S, _LEAST_SUSPENDED_S = 0.5, 0.1
"""Less is the drift by which a time service corrects the clock, and the time between reading two clocks."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Counters of the machine and of this process at one moment; None where the system does not report one.

    Attributes:
        busy_s, steal_s, all_s: seconds of all processors together since the machine started: used by any process, given
            to other virtual machines, and in total.
        user_s, system_s: processor time of this process, in its own code and in the kernel.
        throttled_s: seconds in which the control group's quota kept its processes from running, all processors added
            up.
        monotonic_s, boot_s, wall_s: clocks that stand still while the machine is suspended, that go on, and that can be
            set.
    """

    busy_s: float | None
    steal_s: float | None
    all_s: float | None
    user_s: float
    system_s: float
    throttled_s: float | None
    monotonic_s: float
    boot_s: float | None
    wall_s: float


def read() -> Reading:
    """Read the counters now."""
    ticks = _processor_ticks()
    per_s = os.sysconf("SC_CLK_TCK") if ticks else 1
    busy, steal, every = (value / per_s for value in ticks) if ticks else (None, None, None)
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    user_s, system_s = _processor_time_s()
    return Reading(
        busy_s=busy,
        steal_s=steal,
        all_s=every,
        user_s=user_s,
        system_s=system_s,
        throttled_s=_throttled_s(),
        monotonic_s=time.monotonic(),
        boot_s=None if clock is None else time.clock_gettime(clock),
        wall_s=time.time(),
    )


def between(before: Reading, after: Reading) -> Conditions:
    """Return the conditions between two readings."""
    elapsed = after.monotonic_s - before.monotonic_s
    own_s = after.user_s + after.system_s - before.user_s - before.system_s
    suspended = None
    if before.boot_s is not None and after.boot_s is not None:
        suspended = after.boot_s - before.boot_s - elapsed
    clock_step = after.wall_s - before.wall_s - elapsed - (suspended or 0.0)
    return Conditions(
        steal_frac=_share(before.steal_s, after.steal_s, before, after),
        others_frac=_share(before.busy_s, after.busy_s, before, after, less=own_s),
        throttled_frac=None
        if before.throttled_s is None or after.throttled_s is None or elapsed <= 0
        else min((after.throttled_s - before.throttled_s) / elapsed, 1.0),
        frequency_mhz=_frequency_mhz(),
        clock_step_s=clock_step if abs(clock_step) >= _LEAST_CLOCK_STEP_S else None,
        suspended_s=suspended if suspended is not None and suspended >= _LEAST_SUSPENDED_S else None,
    )


def _processor_time_s() -> tuple[float, float]:
    """(user, system) time of this process so far, in seconds."""
    try:
        import resource  # not on Windows
    except ImportError:
        own = os.times()
        return own.user, own.system
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def page_faults() -> int | None:
    """Return the pages that this process got from the system so far, without reading a disk; None if unknown."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _share(
    first: float | None, last: float | None, before: Reading, after: Reading, *, less: float = 0.0
) -> float | None:
    """The growth of a counter, as a share of the time of all processors."""
    if first is None or last is None or before.all_s is None or after.all_s is None or after.all_s <= before.all_s:
        return None
    return min(max((last - first - less) / (after.all_s - before.all_s), 0.0), 1.0)


def _processor_ticks() -> tuple[int, int, int] | None:
    """(busy, steal, all) ticks of all processors, from Linux's /proc/stat; see proc_stat(5)."""
    try:
        name, *values = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
        user, nice, system, idle, waiting, hard, soft, steal = map(int, values[:8])
    except (OSError, ValueError):  # a sandbox has none, or its own
        return None
    if name != "cpu":
        return None
    busy = user + nice + system + hard + soft
    return busy, steal, busy + steal + idle + waiting


def _throttled_s() -> float | None:
    """Seconds in which the control group's quota held it back, from cgroup v2's cpu.stat."""
    try:
        lines = Path("/sys/fs/cgroup/cpu.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("throttled_usec ")), None)
    return None if found is None else int(found.split()[1]) / 1e6


def _frequency_mhz() -> float | None:
    """The mean frequency of the processors now."""
    with suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        if found:
            return fmean(found)
    return None
