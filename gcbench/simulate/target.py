"""The device that a step is simulated for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from gcbench.cards import Card


@dataclass(frozen=True, kw_only=True)
class Target:
    """What decides which kernels run and what the allocator may take.

    Attributes:
        kind: "cpu" or "cuda" (AMD's cards are "cuda" to torch).
        name: as the user wrote it, for tables.
        memory_bytes: memory of the device, or what the user says it has; None where there is no bound.
        card: its entry in the catalogue; None for the CPU and for a card of which only the memory is known.
        expandable_segments: whether PYTORCH_ALLOC_CONF has `expandable_segments:True`.
    """

    kind: str
    name: str
    memory_bytes: int | None = None
    card: Card | None = None
    expandable_segments: bool = False

    @property
    def capability(self) -> tuple[int, int] | None:
        """NVIDIA's compute capability, (9, 0) for an H100; None for other devices and where it is unknown."""
        text = self.card.compute_capability if self.card else None
        if text is None or text.startswith("gfx"):
            return None
        major, _, minor = text.partition(".")
        return int(major), int(minor)
