"""Fingerprints of gradients: small enough to store, exact on equality, with an estimate of any difference.

Gradients of a large model are too large to send between processes. Per parameter there is an exact checksum (equal for
bit-identical gradients) and a seeded random projection to `SKETCH_SIZE` numbers. The projection is linear and preserves
squared norms in expectation (Johnson and Lindenstrauss 1984; the sign construction is Achlioptas 2003), so the norm
of the difference of two sketches estimates the norm of the difference of the gradients, within about 6 % for one
parameter (relative standard deviation sqrt(1 / (2 * SKETCH_SIZE))) and better over many.

This module needs no torch: the parent process compares the fingerprints that the child computed.
"""

from __future__ import annotations

import array
import base64
import math
import sys
from dataclasses import dataclass

SKETCH_SIZE = 127
"""Prime, so that no tensor dimension of a model is a multiple of it and rows of a matrix spread over all buckets."""


@dataclass(frozen=True, kw_only=True)
class ParameterPrint:
    """One parameter's gradient: its checksum, and its sketch as base64 of little-endian float64."""

    name: str
    checksum: str
    sketch: str


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All gradients of one training step.

    Attributes:
        step: the 0-based training step.
        parameters: those that have a gradient, in the model's order.
        missing: trainable parameters whose gradient was None.
    """

    step: int
    parameters: tuple[ParameterPrint, ...]
    missing: tuple[str, ...]

    @property
    def checksum(self) -> str:
        """A checksum, equal for two fingerprints if and only if every gradient is bit-identical (up to collisions)."""
        total = self.step
        for place, parameter in enumerate(self.parameters):
            total = (total * 0x100000001B3 + place + int(parameter.checksum, 16)) % 2**64
        return f"{total:016x}"

    @property
    def is_finite(self) -> bool:
        """False when a gradient contains a NaN or an infinity."""
        return all(math.isfinite(x) for p in self.parameters for x in unpack(p.sketch))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far gradients are from a reference: `relative` is the L2 norm of the difference over the reference's.

    `worst` names the parameter that contributes most; None when nothing differs. `relative` is NaN when
    either side has a NaN or infinite gradient, and infinite when the reference is zero or other parameters have
    gradients.
    """

    relative: float
    worst: str | None


def pack(values: list[float]) -> str:
    """Encode a sketch as text, without loss."""
    return base64.b64encode(_little(array.array("d", values)).tobytes()).decode("ascii")


def unpack(text: str) -> array.array[float]:
    """Decode the sketch that `pack` encoded."""
    values = array.array("d")
    values.frombytes(base64.b64decode(text))
    return _little(values)


def difference(prints: Fingerprint, reference: Fingerprint) -> Difference:
    """Return the difference between two fingerprints of the same model and step."""
    if prints.checksum == reference.checksum:
        return Difference(relative=0.0 if prints.is_finite else math.nan, worst=None)
    ours, theirs = ({p.name: p for p in f.parameters} for f in (prints, reference))
    lacking = sorted(set(ours) ^ set(theirs))
    if lacking or prints.step != reference.step:
        return Difference(relative=math.inf, worst=lacking[0] if lacking else None)
    squared: dict[str, float] = {}
    norm_squared = 0.0
    for name, parameter in theirs.items():
        expected = unpack(parameter.sketch)
        norm_squared += sum(x * x for x in expected)
        if ours[name].checksum != parameter.checksum:
            got = unpack(ours[name].sketch)
            squared[name] = sum((x - y) ** 2 for x, y in zip(got, expected, strict=True))
    total = sum(squared.values())
    worst = max(squared, key=lambda name: math.inf if math.isnan(squared[name]) else squared[name])
    if norm_squared == 0:
        return Difference(relative=math.inf, worst=worst)
    return Difference(relative=math.sqrt(total / norm_squared), worst=worst)


def _little(values: array.array[float]) -> array.array[float]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
