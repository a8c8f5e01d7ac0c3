"""Define how much of a device's memory may be used, and how certain a prediction is to fit.

`run` measures without a reserve; `predict` and `plan` hold back the same reserve.
"""

from __future__ import annotations

from typing import Literal

from gcbench.core.errors import UsageError
from gcbench.core.units import MIB, format_bytes, format_percent, parse_fraction

RESERVE_FRAC = {"cpu": 0.0, "cuda": 0.05}
"""Reserve by device type, as a fraction of its memory. On a CPU the limit applies to exactly the predicted bytes; a GPU
may be shared, and the memory of its libraries has not been measured on every model of card."""
CONTEXT_UNCERTAIN_BYTES = 267 * MIB
"""By how much the context, kernels and handles of a process may exceed the prediction: the observed spread on one kind
of card, 676 MiB in a message from an H100 NVL and at most 943 in 71 cells on an H100 with torch 2.11 (767
in the median), from results/reference/truth-nvidia-h100-80gb-hbm3.json. Messages from other cards differ among each
other by up to 0.3 GiB (simulate/cuda/workspaces.toml). Of the 64 cells measured later 17 lie above: 1.1 GiB for Pythia
in fp32, 1.3 to 2.1 GiB for Qwen3 MoE, 2.7 GiB in one cell of Gemma 2. A process is looked at after the timed steps, so
part of that may be the allocator's; the two were not separated, and no prediction has it."""
RESERVED_UNCERTAIN_FRAC = 0.022
"""By how much a reserved peak may exceed its prediction, as a fraction: the largest error in the same cells, 1.9 % with
the present order of allocations and 2.2 % before (median error 0.03 %)."""
SMALL_RESERVES = (0.02, 0.01, 0.0)
"""Reserves to suggest where only the reserve prevents a fit; the first that is small enough is used."""

Fit = Literal["yes", "too close to tell", "in the reserve", "no"]
YES: Fit = "yes"
CLOSE: Fit = "too close to tell"
RESERVED: Fit = "in the reserve"
NO: Fit = "no"


def usable_bytes(limit_bytes: int, reserve_frac: float) -> int:
    """Return the device's memory less the reserve, in bytes."""
    return int(limit_bytes * (1 - reserve_frac))


def uncertain_bytes(reserved_bytes: int | None) -> int:
    """Return by how many bytes a process may exceed its prediction; 0 on a CPU, which has no caching allocator."""
    return 0 if reserved_bytes is None else CONTEXT_UNCERTAIN_BYTES + int(RESERVED_UNCERTAIN_FRAC * reserved_bytes)


def classify_fit(needed_bytes: int, *, limit_bytes: int, reserve_frac: float, reserved_bytes: int | None) -> Fit:
    """Return whether a predicted step fits; `reserved_bytes` is the part reserved by the caching allocator."""
    headroom_bytes = limit_bytes - needed_bytes
    if headroom_bytes < 0:
        return NO
    if headroom_bytes < uncertain_bytes(reserved_bytes):
        return CLOSE
    return YES if needed_bytes <= usable_bytes(limit_bytes, reserve_frac) else RESERVED


def smaller_reserve(needed_bytes: int, *, limit_bytes: int, reserve_frac: float) -> float | None:
    """Return a reserve with which the step would fit; None when it fits already or exceeds the device."""
    if needed_bytes <= usable_bytes(limit_bytes, reserve_frac):
        return None
    return next((frac for frac in SMALL_RESERVES if needed_bytes <= usable_bytes(limit_bytes, frac)), None)


def reserve_flag(reserve_frac: float) -> str:
    """Return the flag that sets a reserve: `--reserve 2%`."""
    return f"--reserve {100 * reserve_frac:g}%"


def held_back(limit_bytes: int, reserve_frac: float) -> str:
    """Return `37.42 GiB (5.0 % of 39.39 GiB held back)`, or the memory alone without a reserve."""
    if not reserve_frac:
        return format_bytes(limit_bytes)
    usable = format_bytes(usable_bytes(limit_bytes, reserve_frac))
    return f"{usable} ({format_percent(reserve_frac)} of {format_bytes(limit_bytes)} held back)"


def parse_reserve(raw: object) -> float | None:
    """Parse `--reserve` into a fraction; None when the flag is absent; raises UsageError."""
    if raw is None:
        return None
    try:
        share = parse_fraction(str(raw))
    except ValueError as err:
        raise UsageError(f"--reserve: {err}") from None
    if not 0 <= share < 1:
        raise UsageError(f"--reserve: {raw!r} leaves no memory; write a share below 100%, like 5%")
    return share
