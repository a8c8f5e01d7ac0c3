"""What a step allocates and frees, as plain numbers: blocks, events, phases, and the peaks they make. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from gcbench.core.records import MemoryPeaks, Phase


@dataclass(frozen=True, slots=True)
class Block:
    """One allocation.

    Attributes:
        nbytes: its size.
        op: the operator that allocated it; None for what existed before the step.
        shape: of the tensor that it was allocated for.
        recomputed: allocated by the recomputation of a checkpointed layer.
        fallback: allocated by PyTorch code in place of a package's fused kernel.
    """

    nbytes: int
    op: str | None
    shape: tuple[int, ...] = ()
    recomputed: bool = False
    fallback: bool = False


@dataclass(frozen=True, kw_only=True)
class KernelBuffer:
    """A buffer inside an operator.

    Attributes:
        name: what it holds.
        nbytes: its size.
        source: of the size, or that it is assumed.
        after_results: how many of the operator's results are allocated before it; None for all.
        outlives: how many of the buffers after it are allocated before it is freed; None if it lives until the
            operator returns.
    """

    name: str
    nbytes: int
    source: str = ""
    after_results: int | None = None
    outlives: int | None = None


@dataclass(kw_only=True)
class Trace:
    """Blocks allocated and freed, in order.

    Attributes:
        blocks: every allocation, in order.
        events: `n` for the allocation of `blocks[n]`, `~n` for its release.
        marks: (number of events before it, phase), for each phase of the measured step.
        settled_at: numbers of events after which the allocator's cache is emptied.
        forward_at, backward_at: numbers of events before the passes of the first step; None if it has none.
    """

    blocks: list[Block] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, Phase]] = field(default_factory=list)
    settled_at: list[int] = field(default_factory=list)
    forward_at: int | None = None
    backward_at: int | None = None

    def first(self, ops: Collection[str], *, backward: bool) -> int | None:
        """Number of events up to and with the first result of one of `ops` in a pass of the first step, if any."""
        begin, end = self.forward_at, self.backward_at
        if backward:
            begin, end = self.backward_at, self.marks[0][0] if self.marks else None
        for place, event in enumerate(self.events[begin:end], start=begin or 0):
            if event >= 0 and self.blocks[event].op in ops:
                return place + 1
        return None


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
