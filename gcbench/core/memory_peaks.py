"""What a training step takes at its highest: the figures that measurements and predictions share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class MemoryPeaks:
    """Peaks of one training step after the first optimizer step, in bytes.

    Attributes:
        allocated_bytes: most bytes that tensors held at one time.
        reserved_bytes: most bytes the caching allocator took from the device; None on the CPU.
        process_bytes: most bytes the process held (resident set on the CPU); None where it cannot be read.
        forward_bytes, backward_bytes, optimizer_bytes: the allocated peak within each phase.
    """

    allocated_bytes: int
    reserved_bytes: int | None
    process_bytes: int | None
    forward_bytes: int
    backward_bytes: int
    optimizer_bytes: int

    def of_phase(self, phase: Phase) -> int:
        return {
            "forward": self.forward_bytes,
            "backward": self.backward_bytes,
            "optimizer": self.optimizer_bytes,
        }[phase]

    @property
    def peak_phase(self) -> Phase:
        """The phase that sets the peak; the earliest where several reach it."""
        return max(PHASES, key=self.of_phase)
