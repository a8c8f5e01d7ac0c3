"""Measure on the CPU: exact allocator peaks from torch's memory events, resident set as a cross-check."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

from gcbench.core.errors import UnavailableError
from gcbench.core.records import PHASES, Machine, MemoryPeaks, Phase
from gcbench.core.units import GIB
from gcbench.devices import conditions
from gcbench.devices.backends import _machine
from gcbench.devices.backends._base import TurnReading

TYPE = "cpu"
PREFERENCE = 0

_NO_RECORDER = "a memory snapshot needs a CUDA device; a run on one writes it"
_MARK = "gcbench.phase."
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation", "cannot allocate memory")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's malloc.h."""
_HEADROOM = GIB
"""Address space that a process needs beyond its tensors: thread stacks, allocator arenas, libraries."""


def available() -> bool:
    """Return True: every machine has a CPU."""
    return True


def why_missing() -> str | None:
    """Return None: the CPU is always available."""
    return None


def choose(index: int | None) -> str:
    """Return the only device, whatever the index."""
    return TYPE


def open(name: str) -> CpuDevice:
    """Open the CPU as a `Device`."""
    return CpuDevice()


class CpuDevice:
    """The processor and main memory."""

    name = TYPE

    def limit_memory(self, limit_bytes: int | None) -> None:
        """Limit the address space, so that running out raises an exception before the OOM killer ends the process.

        The limit leaves headroom; the worker checks whether the exact peak exceeds `limit_bytes`.
        """
        torch.ones(2**16).add_(1)  # starts threads now: under the limit they could not start, and would abort
        budget = limit_bytes if limit_bytes is not None else available_bytes()
        if budget is None:
            return
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = in_use + budget + _HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    def settle(self) -> None:
        gc.collect()

    @contextmanager
    def probe_memory(self) -> Iterator[CpuMemoryProbe]:
        gc.collect()
        probe = CpuMemoryProbe(initial_bytes=tensor_bytes())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
            yield probe
        probe.read(profiler)

    def record_memory(self) -> None:
        raise UnavailableError(_NO_RECORDER)

    def write_memory_snapshot(self, file: Path) -> None:
        raise UnavailableError(_NO_RECORDER)

    def keep_memory(self) -> None:
        """Have glibc's malloc keep all freed memory; does nothing with other C libraries.

        By default it returns large blocks to the kernel, which zeroes their pages when they are allocated again: on two
        cores, 200,000 page faults and a fifth of the time of a step of gpt2 at batch 16 × 64.
        """
        with suppress(OSError, AttributeError, ValueError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

    def start_timing(self) -> None:
        with suppress(OSError):  # not Linux, or not permitted: process_bytes then counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5")

    def begin_turn(self) -> None:
        self._faults = conditions.page_faults()
        self._reading = conditions.read()

    def end_turn(self) -> TurnReading:
        reading, faults = conditions.read(), conditions.page_faults()
        return TurnReading(
            user_s=reading.user_s - self._reading.user_s,
            system_s=reading.system_s - self._reading.system_s,
            page_faults=None if faults is None or self._faults is None else faults - self._faults,
            conditions=conditions.between(self._reading, reading),
        )

    def held_bytes(self) -> int | None:
        return self.process_bytes()

    def free_bytes(self) -> int | None:
        return available_bytes()

    def time(self, step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def process_bytes(self) -> int | None:
        # VmHWM and not ru_maxrss: the latter survives fork and exec, so a child reports its parent's peak.
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
        return int(line.split()[1]) * 1024 if line else None

    def num_alloc_retries(self) -> int | None:
        return None

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, MemoryError):
            return True
        return isinstance(error, (RuntimeError, OSError)) and any(w in str(error).lower() for w in _OUT_OF_MEMORY)

    def describe(self) -> Machine:
        return _machine.machine(
            device=self.name,
            device_name=_machine.processor_name(),
            device_memory_bytes=total_bytes(),
            driver={},
            settings={"cpu_capability": torch.backends.cpu.get_cpu_capability()},
        )


class CpuMemoryProbe:
    """Adds up the allocator's events, and records the peaks of the step that calls `on_phase`.

    The profiler knows the size of a freed block only if it recorded its allocation. So the context begins one step
    early: then it has recorded the blocks that the optimizer replaces in the measured step.
    """

    def __init__(self, *, initial_bytes: int) -> None:
        self.initial_bytes = initial_bytes
        self._peaks: dict[Phase, int] = {}

    def on_phase(self, phase: Phase) -> None:
        with record_function(f"{_MARK}{phase}"):
            pass

    def read(self, profiler: Any) -> None:
        """Replay the events in chronological order."""
        result = profiler.profiler.kineto_results
        allocated = self.initial_bytes
        phase: Phase | None = None
        peaks: dict[Phase, int] = {}
        for event in sorted(result.events(), key=lambda event: event.start_ns()):
            name = event.name()
            if name == "[memory]":
                allocated += event.nbytes()
                if phase is not None:
                    peaks[phase] = max(peaks[phase], allocated)
            elif name.startswith(_MARK):
                begun = next(p for p in PHASES if name == f"{_MARK}{p}")
                peaks[begun] = allocated
                phase = begun
        self._peaks = peaks

    def peaks(self) -> MemoryPeaks:
        return MemoryPeaks(
            allocated_bytes=max(self._peaks.values()),
            reserved_bytes=None,
            process_bytes=None,
            forward_bytes=self._peaks["forward"],
            backward_bytes=self._peaks["backward"],
            optimizer_bytes=self._peaks["optimizer"],
        )


def tensor_bytes() -> int:
    """Return the bytes in the storages of all live tensors of this process, each storage counted once."""
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        kind = type(item)
        if not issubclass(kind, torch.Tensor) or kind is FakeTensor:  # a FakeTensor reports a device but has no storage
            continue
        if item.device.type == TYPE and item.layout is torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def available_bytes() -> int | None:
    """Return the memory still available to this process: the system's, or its control group's if that is less."""
    meminfo = _meminfo()
    free = [meminfo["MemAvailable"]] if "MemAvailable" in meminfo else []
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free.append(limit - used)
    return min(free) if free else None


def total_bytes() -> int | None:
    """Return the memory of the machine, or of this process's control group if that is less."""
    sizes = [size for size in (_meminfo().get("MemTotal"), _cgroup("memory.max")) if size is not None]
    return min(sizes) if sizes else None


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
