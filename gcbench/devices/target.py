"""The device that a step is simulated for, from what the user calls it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gcbench.core.records import Json, Machine
from gcbench.devices import cards
from gcbench.devices.cards import Card

HERE = ("auto", "cuda")
"""Devices that mean what this machine has; `cuda:1` too."""
CPU = "cpu"
_UNNAMED = "cuda"


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


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What `predict` takes besides the settings of a run.

    Attributes:
        device: a name from the catalogue, `cpu`, or what this machine has; None for a card of `device_memory` bytes, or
            where that is None too, for what this machine has.
        device_file: a TOML file with cards of the user's own.
        reserve_frac: the part of the device's memory that is held back; None for the default of its kind.
    """

    device: str | None = None
    device_memory: int | None = None
    device_file: Path | None = None
    expandable_segments: bool = False
    explain: bool = False
    exact: bool = False
    reserve_frac: float | None = None

    def as_json(self) -> dict[str, Json]:
        """As a report stores it, beside the settings."""
        return {
            "device_memory": self.device_memory,
            "device_file": str(self.device_file) if self.device_file else None,
            "expandable_segments": self.expandable_segments,
            "explain": self.explain,
            "exact": self.exact,
            "reserve_frac": self.reserve_frac,
        }


def resolve_target(target_options: TargetOptions, machine: Machine | None) -> Target | None:
    """The device to predict for; None when only a look at this machine (`machine`) can tell.

    Raises UnavailableError for a name that is not in the catalogue, UsageError for a device file that cannot be read.
    """
    name = (target_options.device or "").lower()
    segments = target_options.expandable_segments
    if name == CPU:
        return Target(kind=CPU, name=CPU, memory_bytes=target_options.device_memory)
    if not name and target_options.device_memory is not None:
        return Target(
            kind="cuda", name=_UNNAMED, memory_bytes=target_options.device_memory, expandable_segments=segments
        )
    if name and name not in HERE and not name.startswith("cuda:"):
        card = cards.find(target_options.device or "", target_options.device_file)
        return Target(
            kind="cuda",
            name=card.name,
            memory_bytes=target_options.device_memory or card.memory_bytes,
            card=card,
            expandable_segments=segments,
        )
    if machine is None:
        return None
    if machine.device == CPU:
        return Target(kind=CPU, name=CPU, memory_bytes=target_options.device_memory)
    card = Card(
        name=machine.device,
        full_name=machine.device_name,
        memory_bytes=machine.device_memory_bytes or 0,
        vendor="nvidia" if "NVIDIA" in machine.device_name else None,
        compute_capability=machine.settings.get("compute_capability"),
        num_sms=int(machine.settings["num_sms"]) if "num_sms" in machine.settings else None,
    )
    return Target(
        kind="cuda",
        name=machine.device,
        memory_bytes=target_options.device_memory or card.memory_bytes,
        card=card,
        expandable_segments=segments,
    )
