"""How much of a device may be used, and how sure it is that what is predicted fits there: one place for these figures.

`run` measures and holds nothing back; `predict` and `plan` hold back the same reserve.
"""

from __future__ import annotations

from typing import Literal

from gcbench.core.errors import UsageError
from gcbench.core.units import MIB, format_bytes, format_percent, parse_fraction

RESERVE_FRAC = {"cpu": 0.0, "cuda": 0.05}
"""Of the device's memory. On a CPU what is limited is what is predicted, to the byte; a card also serves others, and
what its libraries take has not been measured on every one."""
CONTEXT_UNCERTAIN_BYTES = 267 * MIB
"""By how much the context, kernels and handles of a process may exceed what is predicted: the spread of what was seen
of one kind of card, 676 MiB in a message from an H100 NVL and at most 943 in 71 cells on an H100 with torch 2.11 (767
in the median), from results/reference/truth-nvidia-h100-80gb-hbm3.json. Messages from other cards differ among each
other by up to 0.3 GiB (simulate/cuda/workspaces.toml)."""
RESERVED_UNCERTAIN_FRAC = 0.022
"""Of the allocator's memory: the most by which a reserved peak was above its prediction in the same cells, 1.9 % with
the order of allocations as it is now and 2.2 % before (median error 0.03 %)."""
SMALL_RESERVES = (0.02, 0.01, 0.0)
"""What is suggested where only the reserve stands in the way, the first that is enough."""

Fit = Literal["yes", "too close to tell", "in the reserve", "no"]
YES: Fit = "yes"
CLOSE: Fit = "too close to tell"
RESERVED: Fit = "in the reserve"
NO: Fit = "no"


def usable_bytes(limit_bytes: int, reserve_frac: float) -> int:
    """What of a device's memory may be used."""
    return int(limit_bytes * (1 - reserve_frac))


def uncertain_bytes(reserved_bytes: int | None) -> int:
    """By how much a predicted process may be too small; 0 without a caching allocator, on a CPU."""
    return 0 if reserved_bytes is None else CONTEXT_UNCERTAIN_BYTES + int(RESERVED_UNCERTAIN_FRAC * reserved_bytes)


def judged(needed_bytes: int, *, limit_bytes: int, reserve_frac: float, reserved_bytes: int | None) -> Fit:
    """Whether a predicted step fits; `reserved_bytes` is what of it the caching allocator holds."""
    spare = limit_bytes - needed_bytes
    if spare < 0:
        return NO
    if spare < uncertain_bytes(reserved_bytes):
        return CLOSE
    return YES if needed_bytes <= usable_bytes(limit_bytes, reserve_frac) else RESERVED


def smaller_reserve(needed_bytes: int, *, limit_bytes: int, reserve_frac: float) -> float | None:
    """A reserve with which it would fit; None where it fits already, or needs more than the device has."""
    if needed_bytes <= usable_bytes(limit_bytes, reserve_frac):
        return None
    return next((frac for frac in SMALL_RESERVES if needed_bytes <= usable_bytes(limit_bytes, frac)), None)


def reserve_flag(reserve_frac: float) -> str:
    """`--reserve 2%`."""
    return f"--reserve {100 * reserve_frac:g}%"


def held_back(limit_bytes: int, reserve_frac: float) -> str:
    """`37.42 GiB (5.0 % of 39.39 GiB held back)`, or the memory alone where nothing is."""
    if not reserve_frac:
        return format_bytes(limit_bytes)
    usable = format_bytes(usable_bytes(limit_bytes, reserve_frac))
    return f"{usable} ({format_percent(reserve_frac)} of {format_bytes(limit_bytes)} held back)"


def parse_reserve(raw: object) -> float | None:
    """The share that `--reserve` names; None where it is not given; raises UsageError."""
    if raw is None:
        return None
    try:
        share = parse_fraction(str(raw))
    except ValueError as err:
        raise UsageError(f"--reserve: {err}") from None
    if not 0 <= share < 1:
        raise UsageError(f"--reserve: {raw!r} leaves no memory; write a share below 100%, like 5%")
    return share
