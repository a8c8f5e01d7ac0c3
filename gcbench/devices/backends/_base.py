"""Interface of a device that a step is measured on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gcbench.core.records import Conditions, Machine, MemoryPeaks, Phase


@dataclass(frozen=True, kw_only=True)
class TurnReading:
    """What was observed during a turn, as in `Turn`."""

    user_s: float | None
    system_s: float | None
    page_faults: int | None
    conditions: Conditions


class MemoryProbe(Protocol):
    """Measures the memory of one training step: the one that calls `on_phase`."""

    def on_phase(self, phase: Phase) -> None:
        """Record the start of a phase; called by the step."""

    def peaks(self) -> MemoryPeaks:
        """Return the step's peaks, after the probe's context has ended."""


class Device(Protocol):
    """One device, used by one child process.

    Attributes:
        name: "cpu" or "cuda:N".
    """

    name: str

    def limit_memory(self, limit_bytes: int | None) -> None:
        """Emulate a device with `limit_bytes` of memory; called before the model is built."""

    def settle(self) -> None:
        """Free memory that warming up left cached, so that it is not measured."""

    def probe_memory(self) -> AbstractContextManager[MemoryProbe]:
        """Measure the step that calls the probe's `on_phase`; one step before it has to run in the context too."""

    def record_memory(self) -> None:
        """Begin to record every allocation, or begin again: what was recorded is dropped.

        Raises UnavailableError on a device without a recorder.
        """

    def write_memory_snapshot(self, file: Path) -> None:
        """Write what was recorded and the state of the memory, and stop recording; raises OSError."""

    def keep_memory(self) -> None:
        """Have the process keep the memory that it frees, as in the steady state of a long run; called at its start."""

    def start_timing(self) -> None:
        """Prepare timing; called once before the timed steps."""

    def begin_turn(self) -> None:
        """Begin to observe the conditions of the timed steps that follow."""

    def end_turn(self) -> TurnReading:
        """Return what was observed since `begin_turn`."""

    def held_bytes(self) -> int | None:
        """Return the memory that this process holds between steps, in bytes; None when it is not known."""

    def free_bytes(self) -> int | None:
        """Return the memory that another process could still use, in bytes; None when it is not known."""

    def time(self, step: Callable[[], None]) -> float:
        """Return the seconds that one call of `step` takes on the device."""

    def process_bytes(self) -> int | None:
        """Return the peak memory of the process since `start_timing`, in bytes; None when it cannot be read.

        On a card it cannot be told from that of processes which have begun to use the card since this one did.
        """

    def num_alloc_retries(self) -> int | None:
        """Return how often the caching allocator flushed its cache and retried; None without such an allocator."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether an exception means that the device's memory is exhausted."""

    def describe(self) -> Machine:
        """Return the device, the versions and the settings that affect figures."""
