"""Parses the thresholds of `compare --fail-on`. No torch."""

from __future__ import annotations

import difflib

from gcbench.core.units import parse_fraction

THRESHOLDS = ("memory", "time")


def parse_threshold(text: str) -> tuple[str, float]:
    """Parse `"memory:1%"` as `("memory", 0.01)`; raises ValueError that shows the legal form."""
    name, colon, share = (part.strip() for part in text.partition(":"))
    example = "write it like memory:1% or time:5%"
    if name not in THRESHOLDS:
        near = difflib.get_close_matches(name, THRESHOLDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no threshold {name!r}; {hint}legal are {' and '.join(THRESHOLDS)}; {example}")
    if not colon or not share:
        raise ValueError(f"{text!r} has no limit; {example}")
    return name, parse_fraction(share)
