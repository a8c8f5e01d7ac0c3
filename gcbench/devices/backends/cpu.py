"""The CPU: exact allocator peaks from torch's own memory events, resident set as a cross-check."""

from __future__ import annotations

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

from gcbench.core.records import PHASES, Machine, MemoryPeaks, Phase
from gcbench.core.units import GIB
from gcbench.devices.backends import _machine

TYPE = "cpu"
PREFERENCE = 0

_MARK = "gcbench.phase."
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation", "cannot allocate memory")
_HEADROOM = GIB
"""Address space a process takes beyond its tensors: thread stacks, allocator arenas, libraries."""


def available() -> bool:
    """Always."""
    return True


def why_missing() -> str | None:
    """Never."""
    return None


def choose(index: int | None) -> str:
    """There is one, whatever the index."""
    return TYPE


def open(name: str) -> CpuDevice:
    """The CPU as a `Device`."""
    return CpuDevice()


class CpuDevice:
    """The processor and main memory."""

    name = TYPE

    def limit_memory(self, limit_bytes: int | None) -> None:
        """Bound the address space, so that running out is an exception and not the kernel's killer.

        The bound leaves headroom: that a cell's exact peak exceeds `limit_bytes` is for the worker to say.
        """
        torch.ones(2**16).add_(1)  # threads start now: under the bound they could not, and abort the process
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
        probe = CpuMemoryProbe(held_bytes=tensor_bytes())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
            yield probe
        probe.read(profiler)

    def start_timing(self) -> None:
        with suppress(OSError):  # not Linux, or not allowed: process_bytes then counts from the process's start
            Path("/proc/self/clear_refs").write_text("5")

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
    """Adds up the allocator's events, and notes the peaks of the step that calls `on_phase`.

    Events tell the size of a freed block only when they saw it allocated. So the context begins one step early:
    what the optimizer replaces in the measured step was then made under its eyes.
    """

    def __init__(self, *, held_bytes: int) -> None:
        self.held_bytes = held_bytes
        self._peaks: dict[Phase, int] = {}

    def on_phase(self, phase: Phase) -> None:
        with record_function(f"{_MARK}{phase}"):
            pass

    def read(self, profiler: Any) -> None:
        """Replay the events in the order in which they happened."""
        result = profiler.profiler.kineto_results
        live = self.held_bytes
        phase: Phase | None = None
        peaks: dict[Phase, int] = {}
        for event in sorted(result.events(), key=lambda event: event.start_ns()):
            name = event.name()
            if name == "[memory]":
                live += event.nbytes()
                if phase is not None:
                    peaks[phase] = max(peaks[phase], live)
            elif name.startswith(_MARK):
                begun = next(p for p in PHASES if name == f"{_MARK}{p}")
                peaks[begun] = live
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
    """Bytes in the storages of all live tensors of this process, each storage once."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if not issubclass(kind, torch.Tensor) or kind is FakeTensor:  # the latter says it is here and is nowhere
            continue
        if thing.device.type == TYPE and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def available_bytes() -> int | None:
    """Memory this process could still take: the system's, or its control group's if that is less."""
    meminfo = _meminfo()
    free = [meminfo["MemAvailable"]] if "MemAvailable" in meminfo else []
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free.append(limit - used)
    return min(free) if free else None


def total_bytes() -> int | None:
    """Memory of the machine, or of this process's control group if that is less."""
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
