"""What a step takes and gives back, as plain numbers: blocks, events, phases, and the peaks they make. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcbench.records import PHASES, MemoryPeaks, Phase


@dataclass(frozen=True, slots=True)
class Block:
    """One allocation.

    Attributes:
        nbytes: its size.
        op: the operator that made it; None for what was there before the step.
        shape: of the tensor it was made for.
        recomputed: made a second time, by the recomputation of a checkpointed layer.
    """

    nbytes: int
    op: str | None
    shape: tuple[int, ...] = ()
    recomputed: bool = False


@dataclass(kw_only=True)
class Trace:
    """Blocks taken and given back, in order.

    Attributes:
        blocks: every allocation, in order.
        events: `n` for the allocation of `blocks[n]`, `~n` for its release.
        marks: (number of events before it, phase), for each phase of the measured step.
    """

    blocks: list[Block] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, Phase]] = field(default_factory=list)

    def peaks(self) -> MemoryPeaks:
        """The most bytes alive at one time in each phase of the measured step."""
        live = 0
        phase: Phase | None = None
        highest = dict.fromkeys(PHASES, 0)
        marks = iter([*self.marks, (len(self.events) + 1, None)])
        due, following = next(marks)
        for place, event in enumerate(self.events):
            while place >= due:
                phase = following
                if phase is not None:
                    highest[phase] = live
                due, following = next(marks)
            live += self.blocks[event].nbytes if event >= 0 else -self.blocks[~event].nbytes
            if phase is not None and live > highest[phase]:
                highest[phase] = live
        return of_phases(highest)


def of_phases(
    highest: dict[Phase, int], *, reserved_bytes: int | None = None, process_bytes: int | None = None
) -> MemoryPeaks:
    """The peaks of a step from those of its phases, in bytes."""
    return MemoryPeaks(
        allocated_bytes=max(highest.values()),
        reserved_bytes=reserved_bytes,
        process_bytes=process_bytes,
        forward_bytes=highest["forward"],
        backward_bytes=highest["backward"],
        optimizer_bytes=highest["optimizer"],
    )
