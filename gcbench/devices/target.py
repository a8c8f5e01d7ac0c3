"""Resolve the name of a device into the target of a prediction. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gcbench.core.records import Json, Machine
from gcbench.devices import cards
from gcbench.devices.cards import Card

HERE = ("auto", "cuda")
"""Names that mean a device of this machine, as does `cuda:1`."""
CPU = "cpu"
_UNNAMED = "cuda"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that a step is predicted for: it determines the kernels and the memory limit.

    Attributes:
        kind: "cpu" or "cuda" (torch calls AMD's cards "cuda" too).
        name: the name that tables show.
        memory_bytes: memory of the device, or the size that the user set; None without a limit.
        card: its entry in the catalogue; None for the CPU and for a card of which only the memory is known.
        expandable_segments: whether PYTORCH_ALLOC_CONF has `expandable_segments:True`.
        settled_when_built: whether the allocator's cache is emptied once the model is built, which no training loop
            does, but gcbench's own measurements did until November 2026.
    """

    kind: str
    name: str
    memory_bytes: int | None = None
    card: Card | None = None
    expandable_segments: bool = False
    settled_when_built: bool = False

    @property
    def capability(self) -> tuple[int, int] | None:
        """NVIDIA's compute capability, (9, 0) for an H100; None for other devices and when it is unknown."""
        text = self.card.compute_capability if self.card else None
        if text is None or text.startswith("gfx"):
            return None
        major, _, minor = text.partition(".")
        return int(major), int(minor)


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options of `predict` besides the settings of a run.

    Attributes:
        device: a name from the catalogue, `cpu`, or a device of this machine; None for a card of `device_memory` bytes
            or, when that is None too, for the device of this machine.
        device_file: a TOML file with the user's own cards.
        reserve_frac: the fraction of the device's memory that is held back; None for the default of its kind.
    """

    device: str | None = None
    device_memory: int | None = None
    device_file: Path | None = None
    expandable_segments: bool = False
    explain: bool = False
    exact: bool = False
    reserve_frac: float | None = None

    def as_json(self) -> dict[str, Json]:
        """Return the options as a report stores them, beside the settings."""
        return {
            "device_memory": self.device_memory,
            "device_file": str(self.device_file) if self.device_file else None,
            "expandable_segments": self.expandable_segments,
            "explain": self.explain,
            "exact": self.exact,
            "reserve_frac": self.reserve_frac,
        }


def resolve_target(options: TargetOptions, machine: Machine | None) -> Target | None:
    """Return the device to predict for; None when it depends on this machine and `machine` is None.

    Raises UnavailableError for a name that is not in the catalogue, UsageError for a device file that cannot be read.
    """
    name = (options.device or "").lower()
    segments = options.expandable_segments
    if name == CPU:
        return Target(kind=CPU, name=CPU, memory_bytes=options.device_memory)
    if not name and options.device_memory is not None:
        return Target(kind="cuda", name=_UNNAMED, memory_bytes=options.device_memory, expandable_segments=segments)
    if name and name not in HERE and not name.startswith("cuda:"):
        card = cards.find(options.device or "", options.device_file)
        return Target(
            kind="cuda",
            name=card.name,
            memory_bytes=options.device_memory or card.memory_bytes,
            card=card,
            expandable_segments=segments,
        )
    if machine is None:
        return None
    if machine.device == CPU:
        return Target(kind=CPU, name=CPU, memory_bytes=options.device_memory)
    if machine.emulated is not None and (options.device_file or cards.known(machine.emulated)):
        # Not a device of this machine: its operators cannot be timed, so its card's rates count.
        return resolve_target(replace(options, device=machine.emulated), None)
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
        memory_bytes=options.device_memory or card.memory_bytes,
        card=card,
        expandable_segments=segments,
    )
