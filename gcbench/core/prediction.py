"""The vocabulary of a prediction: what a cell would take, why, and what would change it."""

from __future__ import annotations

from dataclasses import dataclass

from gcbench.core import headroom
from gcbench.core.memory_peaks import MemoryPeaks, Phase


@dataclass(frozen=True, kw_only=True)
class Term:
    """Memory that the training step's own operators do not show.

    Attributes:
        in_allocator: whether it is part of the allocated and reserved bytes, or only of the process's.
        source: where its size was published or read.
    """

    name: str
    nbytes: int
    in_allocator: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one kind of memory holds at the peak."""

    kind: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """Consecutive layers that hold the same number of bytes each at the peak, kept for the backward pass."""

    first: int
    last: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A change, and the allocated peak with it, from the same step replayed with that change."""

    name: str
    peak_bytes: int


ACCUMULATION = "gradient accumulation"
KEPT_OUTPUTS = "a loop that keeps `outputs`"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Something that a real run may have and the predicted step has not, from the same step replayed with it.

    Attributes:
        nbytes: what it adds to what tensors take at the peak.
        peak_bytes: the bytes that count against the device's memory with it.
    """

    name: str
    nbytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What PyTorch code took in the trace where the device, with packages installed, would run fused kernels.

    Attributes:
        packages: names to install.
        nbytes: what of the allocated peak it made: at most that much less is needed with the kernels.
    """

    packages: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bytes alive over one step, by kind.

    Attributes:
        kinds: names, in stacking order.
        nbytes: for each kind, bytes at each of the points in turn; a point is the highest of a stretch of the step.
        phases: (phase, first point).
    """

    kinds: tuple[str, ...]
    nbytes: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[Phase, int], ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the peak is and what is alive there.

    Attributes:
        op: the operator whose memory made the peak; None where the peak is what a phase began with.
        layer: number of the layer in which it happened; None outside the layers.
        part: where in the step, in words.
        shares: by kind, largest first; they add up to the allocated peak.
        kept: by layers, in order; empty where nothing kept is alive.
        levers: what would move the peak.
    """

    op: str | None
    layer: int | None
    part: str
    shares: tuple[Share, ...]
    kept: tuple[LayerShare, ...]
    levers: tuple[Lever, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one cell would take on the target device.

    Attributes:
        memory: as a measurement of it would report.
        limit_bytes: memory of the device; None where there is no bound.
        spare_bytes: what would be left of it; negative where the cell does not fit.
        reserve_frac: the part of the device's memory that is held back.
        num_alloc_retries: times the allocator would have to flush its cache to go on; None on the CPU.
        attention: kernel -> number of calls in a forward and backward pass of the traced layers.
        layers_traced: layers that stood for all.
        why_in_full: why every layer was traced; None where a few were.
        additions: what a real run may add; small ones are left out.
        fallback: None where no kernel was stood in for, and on the CPU, where there is none.
    """

    memory: MemoryPeaks
    limit_bytes: int | None
    spare_bytes: int | None
    num_alloc_retries: int | None
    terms: tuple[Term, ...]
    attention: dict[str, int]
    layers_traced: int
    why_in_full: str | None
    explanation: Explanation | None = None
    curve: Curve | None = None
    additions: tuple[Addition, ...] = ()
    fallback: Fallback | None = None
    reserve_frac: float = 0.0

    @property
    def needed_bytes(self) -> int:
        """What counts against the device's memory: on CUDA all that the process holds, on a CPU what tensors hold."""
        return self.memory.allocated_bytes if self.memory.process_bytes is None else self.memory.process_bytes

    @property
    def usable_bytes(self) -> int | None:
        """The device's memory less the reserve; None where there is no bound."""
        return None if self.limit_bytes is None else headroom.usable_bytes(self.limit_bytes, self.reserve_frac)

    @property
    def fit(self) -> headroom.Fit | None:
        """Whether the cell fits; None where there is no bound."""
        if self.limit_bytes is None:
            return None
        return headroom.judged(
            self.needed_bytes,
            limit_bytes=self.limit_bytes,
            reserve_frac=self.reserve_frac,
            reserved_bytes=self.memory.reserved_bytes,
        )
