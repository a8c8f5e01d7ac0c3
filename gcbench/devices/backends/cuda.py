"""Measure on CUDA devices: peaks from the caching allocator, times from CUDA events."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from gcbench.core import snapshot_files
from gcbench.core.errors import UnavailableError
from gcbench.core.files import write_bytes
from gcbench.core.records import PHASES, Machine, MemoryPeaks, Phase
from gcbench.core.units import GIB, MIB
from gcbench.devices import conditions
from gcbench.devices.backends import _machine
from gcbench.devices.backends._base import TurnReading

_CONTEXT_BYTES = GIB
"""At most, of a process's memory outside the caching allocator: 767 MiB on an H100."""

TYPE = "cuda"
PREFERENCE = 1


def available() -> bool:
    """Return whether torch can use a card."""
    return torch.cuda.is_available()


def why_missing() -> str | None:
    """Return why no CUDA device can be used; None when one can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None if available() else "torch finds no CUDA device or driver"


def choose(index: int | None) -> str:
    """Return `cuda:index`, or the first device; raises UnavailableError beyond the last one."""
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise UnavailableError(
            f"device 'cuda:{index}' is not available: this machine has {count}; use --device cuda:0"
            + (f" to cuda:{count - 1}" if count > 1 else "")
        )
    return f"{TYPE}:{0 if index is None else index}"


def open(name: str) -> CudaDevice:
    """Open the card as a `Device`."""
    return CudaDevice(name)


class CudaDevice:
    """One card, through torch's caching allocator."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.index = int(name.partition(":")[2])
        self.used_by_others_bytes = self._used_bytes()
        torch.cuda.set_device(self.index)

    def limit_memory(self, limit_bytes: int | None) -> None:
        """Limit the memory that the caching allocator reserves to `limit_bytes`."""
        if limit_bytes is not None:
            total = torch.cuda.get_device_properties(self.index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), self.index)

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.index)
        torch.cuda.empty_cache()

    @contextmanager
    def probe_memory(self) -> Iterator[CudaMemoryProbe]:
        probe = CudaMemoryProbe(self.index)
        yield probe
        probe.close()

    def record_memory(self) -> None:
        # With the stacks of frees too, torch 2.11 raises a SystemError where checkpointing stops a recomputation early.
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", clear_history=True)

    def write_memory_snapshot(self, file: Path) -> None:
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        write_bytes(file, pickle.dumps(snapshot, protocol=snapshot_files.PROTOCOL))

    def keep_memory(self) -> None:
        """Do nothing: the caching allocator keeps what is freed."""

    def start_timing(self) -> None:
        torch.cuda.synchronize(self.index)

    def time(self, step: Callable[[], None]) -> float:
        torch.cuda.synchronize(self.index)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def begin_turn(self) -> None:
        # In the background: it reads the card while the steps run, and takes some tens of milliseconds.
        self._smi = _start_nvidia_smi(self.index, "clocks.sm,temperature.gpu,clocks_throttle_reasons.active")
        self._reading = conditions.read()

    def end_turn(self) -> TurnReading:
        host = conditions.between(self._reading, conditions.read())
        clock, temperature, reasons = _state_of_card(self._smi)
        return TurnReading(
            user_s=None,
            system_s=None,
            page_faults=None,
            conditions=replace(
                host, frequency_mhz=clock, temperature_c=temperature, throttle_reasons=reasons, throttled_frac=None
            ),
        )

    def held_bytes(self) -> int | None:
        known = self.process_bytes()
        return torch.cuda.memory_reserved(self.index) + _CONTEXT_BYTES if known is None else known

    def free_bytes(self) -> int | None:
        return int(torch.cuda.mem_get_info(self.index)[0])

    def process_bytes(self) -> int | None:
        """Return the growth of the card's used memory since before this process used it: context and reserved."""
        torch.cuda.synchronize(self.index)
        used = self._used_bytes()
        if used is None or self.used_by_others_bytes is None:
            return None
        return used - self.used_by_others_bytes

    def num_alloc_retries(self) -> int | None:
        return int(torch.cuda.memory_stats(self.index).get("num_alloc_retries", 0))

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        # Libraries with allocations of their own report it with other messages.
        text = str(error)
        return isinstance(error, RuntimeError) and (
            "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text or "CUDNN_STATUS_ALLOC_FAILED" in text
        )

    def describe(self) -> Machine:
        properties = torch.cuda.get_device_properties(self.index)
        driver = {"cuda": str(torch.version.cuda or torch.version.hip)}
        if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
            driver["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        reported = _nvidia_smi(self.index, "driver_version")
        if reported is not None:
            driver["driver"] = reported
        return _machine.machine(
            device=self.name,
            device_name=properties.name,
            device_memory_bytes=properties.total_memory,
            driver=driver,
            settings={
                "compute_capability": f"{properties.major}.{properties.minor}",
                "num_sms": str(properties.multi_processor_count),
                "allocator_backend": torch.cuda.get_allocator_backend(),
                "tf32_matmul": str(torch.backends.cuda.matmul.allow_tf32),
                "device_count": str(torch.cuda.device_count()),
            },
        )

    def _used_bytes(self) -> int | None:
        """Return the card's memory used by all processes, in bytes; None when neither tool reports it.

        Both nvidia-smi and nvidia-ml-py ask the driver's management library, which creates no context on the card.
        """
        reported = _nvidia_smi(self.index, "memory.used")
        if reported is not None and reported.isdecimal():
            return int(reported) * MIB
        try:
            return int(torch.cuda.device_memory_used(self.index))
        except Exception:  # without nvidia-ml-py, the library itself or a permission, each has an error of its own
            return None


class CudaMemoryProbe:
    """Resets the allocator's peaks as each phase begins and reads them as it ends."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._phase: Phase | None = None
        self._allocated: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._reserved = 0

    def on_phase(self, phase: Phase) -> None:
        self.close()
        self._phase = phase
        torch.cuda.reset_peak_memory_stats(self.index)

    def close(self) -> None:
        """Read the peaks of the phase that ends here; the allocator counts on the host, without synchronising."""
        if self._phase is not None:
            self._allocated[self._phase] = torch.cuda.max_memory_allocated(self.index)
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self.index))

    def peaks(self) -> MemoryPeaks:
        return MemoryPeaks(
            allocated_bytes=max(self._allocated.values()),
            reserved_bytes=self._reserved,
            process_bytes=None,
            forward_bytes=self._allocated["forward"],
            backward_bytes=self._allocated["backward"],
            optimizer_bytes=self._allocated["optimizer"],
        )


def _nvidia_smi(index: int, field: str) -> str | None:
    """Return one value from nvidia-smi, without creating a context; None when tool or value is missing."""
    return _read_nvidia_smi(_start_nvidia_smi(index, field))


def _start_nvidia_smi(index: int, fields: str) -> subprocess.Popen[str] | None:
    """Start nvidia-smi for one card; None when there is no such tool."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    identity = visible[index] if index < len(visible) else str(index)
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={identity}"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _read_nvidia_smi(started: subprocess.Popen[str] | None) -> str | None:
    """Return what nvidia-smi printed; None when it failed."""
    if started is None:
        return None
    try:
        output, _ = started.communicate(timeout=10)
    except subprocess.SubprocessError:
        started.kill()
        return None
    return output.strip() or None if started.returncode == 0 else None


_THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of nvmlClocksEventReasons (nvml.h) that lower the clocks of a busy card; others are settings, or idleness."""


def _state_of_card(started: subprocess.Popen[str] | None) -> tuple[float | None, float | None, tuple[str, ...]]:
    """(MHz of the multiprocessors, degrees Celsius, reasons for lower clocks); None and empty where unknown."""
    values = [value.strip() for value in (_read_nvidia_smi(started) or "").split(",")]
    if len(values) != 3:
        return None, None, ()
    clock, temperature = (float(value) if value.isdecimal() else None for value in values[:2])
    try:
        bits = int(values[2], 16)
    except ValueError:
        return clock, temperature, ()
    return clock, temperature, tuple(name for bit, name in _THROTTLE_REASONS.items() if bits & bit)
