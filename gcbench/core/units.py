"""Parse and format bytes, seconds and fractions."""

from __future__ import annotations

import re
from collections.abc import Sequence

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_FACTORS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}

LEAST_BARE_BYTES = MIB
"""A number without a unit below this is not in bytes: no device has so little memory."""
MOST_MEMORY_BYTES = 16 * TIB
_MOST_BARE_GIB = 1024


def parse_bytes(text: str) -> int:
    """Parse `"8GiB"`, `"24 GB"`, `"512MiB"` or a plain number of bytes; raises ValueError on anything else."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 8GiB, 512MiB or 24GB")
    return int(float(match[1]) * factor)


def parse_memory(raw: object) -> int:
    """Parse the size of a device's memory, from text or from a number in a file, into bytes.

    A number without a unit is in bytes; one too small or too large for a device is refused, with the likely unit.
    Raises ValueError for anything else that is not an amount of memory.
    """
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise ValueError(f"{raw!r} is not an amount of memory; write it like 8GiB, 512MiB or 24GB")
    text = str(raw).strip()
    prefix = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])i?", text, re.IGNORECASE)
    if prefix is not None:
        number, unit = prefix[1], prefix[2].upper()
        raise ValueError(f"{raw!r} is not an amount of memory; did you mean {number}{unit}iB or {number}{unit}B?")
    if isinstance(raw, (int, float)) and raw < 0:
        raise ValueError(f"{raw!r} leaves no memory at all; write it like 8GiB")
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        number_of_bytes = float(text)
        if 0 < number_of_bytes < LEAST_BARE_BYTES:
            unit = "GiB" if number_of_bytes <= _MOST_BARE_GIB else "MiB"
            raise ValueError(f"{raw!r} is {text} bytes; did you mean {text}{unit}?")
        if number_of_bytes > MOST_MEMORY_BYTES:
            raise ValueError(f"{raw!r} is more bytes than any device has; write it like 8GiB or 80GiB")
        return _positive(raw, int(number_of_bytes))
    count = parse_bytes(text)
    if count > MOST_MEMORY_BYTES:
        raise ValueError(f"{raw!r} is more than any device has; write it like 8GiB or 80GiB")
    return _positive(raw, count)


def _positive(raw: object, count: int) -> int:
    if count <= 0:
        raise ValueError(f"{raw!r} leaves no memory at all; write it like 8GiB")
    return count


def parse_fraction(text: str) -> float:
    """Parse `"5%"` or `"0.05"` as 0.05; raises ValueError on anything else or below zero."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a share; write it like 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def format_bytes(count: int | None) -> str:
    """Format bytes in binary units with three or four significant digits: `"2.31 GiB"`; `"–"` for unknown."""
    if count is None:
        return "–"
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}" if abs(count) < 100 * factor else f"{count / factor:.0f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float | None) -> str:
    """Format as `"843 µs"`, `"84.3 ms"`, `"1.24 s"` or `"3 min 05 s"`; `"–"` for unknown."""
    if seconds is None:
        return "–"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_percent(fraction: float | None, *, sign: bool = False) -> str:
    """Format 0.413 as `"41 %"` (`"+41 %"` with sign); below 10 % with one decimal; `"–"` for unknown."""
    if fraction is None:
        return "–"
    percent = 100 * fraction
    if abs(percent) < 0.05:
        percent = 0.0  # and no "−0.0 %"
    decimals = 1 if 0 < abs(percent) < 9.95 else 0
    text = f"{percent:+.{decimals}f}" if sign else f"{percent:.{decimals}f}"
    return f"{text.replace('-', '−')} %"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `"1 layer"`, `"12 layers"`, `"1,024 tokens"`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_count(count: int | None) -> str:
    """Format 124439808 as `"124 M"`, 8030261248 as `"8.03 B"`; `"–"` for unknown."""
    if count is None:
        return "–"
    for unit, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)


def listed(names: Sequence[str]) -> str:
    """Return `off, per-layer and every:2`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
