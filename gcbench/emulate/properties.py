"""Describes a card of the catalogue to the emulation library: what PyTorch's host code looks at. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.units import parse_bytes
from gcbench.devices.cards import Card
from gcbench.devices.contexts import context_bytes

DRIVER = "580.0"
"""Version that the emulated driver reports, recent enough for every torch that is supported."""
MAX_CARDS = 16
_ASSUMED_NUM_SMS = 108


@dataclass(frozen=True, kw_only=True)
class Architectures:
    """Compute capabilities that a build of torch has kernels for, as (9, 0): compiled ones, and those of its PTX."""

    compiled: tuple[tuple[int, int], ...]
    ptx: tuple[tuple[int, int], ...]

    def best(self, capability: tuple[int, int]) -> tuple[int, int] | None:
        """Return the architecture whose kernels a card of `capability` runs; None when it can run none of them."""
        same = [arch for arch in self.compiled if arch[0] == capability[0] and arch <= capability]
        older = [arch for arch in self.ptx if arch <= capability]
        return max(same or older, default=None)


def architectures(flags: str) -> Architectures:
    """Parse torch's list of architectures, such as `sm_80 sm_90 compute_90`."""
    found: dict[str, list[tuple[int, int]]] = {"sm": [], "compute": []}
    for flag in flags.split():
        kind, _, number = flag.partition("_")
        digits = number.rstrip("af")
        if kind in found and digits.isdecimal():
            found[kind].append((int(digits[:-1]), int(digits[-1])))
    return Architectures(compiled=tuple(found["sm"]), ptx=tuple(found["compute"]))


def capability_of(card: Card) -> tuple[int, int]:
    """Return a card's compute capability; raises UnavailableError for a card that cannot be emulated."""
    text = card.compute_capability
    if card.vendor == "amd" or (text is not None and text.startswith("gfx")):
        raise UnavailableError(
            f"{card.title} is a card of AMD, and only NVIDIA's can be emulated; predict it: gcbench predict --device "
            f"{card.name}"
        )
    if text is None:
        raise UnavailableError(
            f"{card.title} has no compute_capability, which emulating needs; add it to its [[card]], like "
            'compute_capability = "8.9"'
        )
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def properties(card: Card, *, num_cards: int, built_for: Architectures, torch_version: str) -> dict[str, str]:
    """Return the properties of `num_cards` such cards, by the names that `csrc/device.c` reads.

    Raises UnavailableError when this torch has no kernels for the card, and UsageError for a wrong number of cards.
    """
    if not 1 <= num_cards <= MAX_CARDS:
        raise UsageError(f"{num_cards} cards cannot be emulated; take 1 to {MAX_CARDS}")
    major, minor = capability = capability_of(card)
    entry = _capabilities().get(f"{major}.{minor}")
    binary = built_for.best(capability)
    if entry is None or binary is None:
        raise UnavailableError(
            f"torch {torch_version} has no kernels for {card.title} (compute capability {major}.{minor}), so neither "
            f"that card nor its emulation runs it; predict it: gcbench predict --device {card.name}"
        )
    values = {
        "num_cards": num_cards,
        "name": card.title.replace("|", " "),
        "driver": DRIVER,
        "major": major,
        "minor": minor,
        "binary": 10 * binary[0] + binary[1],
        "num_sms": card.num_sms or _ASSUMED_NUM_SMS,
        "memory_bytes": card.memory_bytes,
        "context_bytes": context_bytes(capability),
        "shared_bytes_per_sm": parse_bytes(entry["shared_bytes_per_sm"]),
        "shared_bytes_per_block": parse_bytes(entry["shared_bytes_per_block"]),
        "l2_bytes": parse_bytes(entry["l2_bytes"]),
        "threads_per_sm": entry["threads_per_sm"],
        "blocks_per_sm": entry["blocks_per_sm"],
        "bus_bits": entry["bus_bits"],
        "ecc": int("GeForce" not in card.title),
    }
    return {name: str(value) for name, value in values.items()}


def joined(values: dict[str, str]) -> str:
    """Return properties as the value of GCBENCH_EMULATED_PROPERTIES."""
    return "|".join(f"{name}={value}" for name, value in values.items())


def split(text: str) -> dict[str, str]:
    """Return the properties in a value of GCBENCH_EMULATED_PROPERTIES."""
    return dict(entry.partition("=")[::2] for entry in text.split("|") if "=" in entry)


@cache
def _capabilities() -> dict[str, dict[str, Any]]:
    text = resources.files("gcbench.emulate").joinpath("capabilities.toml").read_text(encoding="utf-8")
    tables: Sequence[dict[str, Any]] = tomllib.loads(text)["capability"]
    return {table["version"]: table for table in tables}
