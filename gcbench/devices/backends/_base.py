"""What a device must be able to do for a measurement."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from gcbench.core.records import Machine, MemoryPeaks, Phase


class MemoryProbe(Protocol):
    """Watches one training step: the one whose phases it is told of."""

    def on_phase(self, phase: Phase) -> None:
        """Called by the step as each phase begins."""

    def peaks(self) -> MemoryPeaks:
        """The step's peaks, once the probe's context has ended."""


class Device(Protocol):
    """One device, used by one child process.

    Attributes:
        name: "cpu" or "cuda:N".
    """

    name: str

    def limit_memory(self, limit_bytes: int | None) -> None:
        """Make the device look like one of `limit_bytes`; called before the model is built."""

    def settle(self) -> None:
        """Give back what building the model and warming up left cached, so that it is not measured."""

    def probe_memory(self) -> AbstractContextManager[MemoryProbe]:
        """Watch the step that calls the probe's `on_phase` inside the context; one step before it runs there too."""

    def start_timing(self) -> None:
        """Called once before the timed steps."""

    def time(self, step: Callable[[], None]) -> float:
        """Seconds that one call of `step` takes on the device."""

    def process_bytes(self) -> int | None:
        """Most bytes the process held since `start_timing`; None where it cannot be read."""

    def num_alloc_retries(self) -> int | None:
        """Times the caching allocator flushed and tried again; None where there is no such thing."""

    def is_out_of_memory(self, error: BaseException) -> bool: ...

    def describe(self) -> Machine:
        """The device, the versions and the settings that move figures."""
