"""Peak memory of a training step: the figures that measurements and predictions share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class MemoryPeaks:
    """Peak memory of one training step, in bytes. The step is not the first, so optimizer states already exist.

    Attributes:
        allocated_bytes: peak memory allocated to tensors.
        reserved_bytes: peak memory that the caching allocator reserved on the device; None on the CPU.
        process_bytes: peak memory of the process (resident set on the CPU); None when it cannot be read.
        forward_bytes, backward_bytes, optimizer_bytes: peak allocated memory within each phase.
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
        """The phase with the highest peak; the earliest of them on a tie."""
        return max(PHASES, key=self.of_phase)
