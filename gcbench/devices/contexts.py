"""Estimates the memory that a process holds on a card outside torch's caching allocator. No torch."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from gcbench.core.units import parse_bytes


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """Return the entries of `contexts.toml`, in its order."""
    text = resources.files("gcbench.devices").joinpath("contexts.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["context"])


def context_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of CUDA's context, kernels and libraries' handles on a card of this compute capability."""
    major, minor = capability
    names = {f"{major}", f"{major}.{minor}"}
    entry = next(entry for entry in entries() if names & set(entry.get("capabilities", names)))
    return parse_bytes(str(entry["nbytes"]))
