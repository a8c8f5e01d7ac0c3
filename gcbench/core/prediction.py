"""Records of a prediction: the memory of a cell, what it consists of, and what would change it."""

from __future__ import annotations

from dataclasses import dataclass

from gcbench.core import headroom
from gcbench.core.memory_peaks import MemoryPeaks, Phase
from gcbench.core.step_time import StepTime


@dataclass(frozen=True, kw_only=True)
class Term:
    """Memory that is not in the trace of the training step's operators, such as the CUDA context.

    Attributes:
        in_allocator: whether it counts as allocated and reserved memory, or only as memory of the process.
        source: where its size was published or read.
    """

    name: str
    nbytes: int
    in_allocator: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of one kind of memory at the peak."""

    kind: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """Consecutive layers, each with the same number of bytes saved for the backward pass at the peak."""

    first: int
    last: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A change of settings, and the allocated peak with it, from the same step replayed with that change."""

    name: str
    peak_bytes: int


ACCUMULATION = "gradient accumulation"
KEPT_OUTPUTS = "a loop that keeps `outputs`"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Something that a real run may do and the predicted step does not, from the same step replayed with it.

    Attributes:
        nbytes: bytes that it adds to the allocated peak.
        peak_bytes: bytes that count against the device's memory with it.
    """

    name: str
    nbytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """Memory of PyTorch code that was traced where packages, when installed, run fused kernels on the device.

    Attributes:
        packages: names of the packages to install.
        nbytes: bytes of the allocated peak that this code accounts for: the kernels save at most that much.
    """

    packages: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bytes alive over one step, by kind.

    Attributes:
        kinds: names, in stacking order.
        nbytes: per kind, bytes at each point; a point is the maximum over an interval of the step.
        phases: (phase, index of its first point).
    """

    kinds: tuple[str, ...]
    nbytes: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[Phase, int], ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the peak is and which memory is allocated there.

    Attributes:
        op: the operator whose allocation reaches the peak; None when a phase begins at the peak.
        layer: 0-based number of its layer; None outside the layers.
        part: its place in the step, in words.
        shares: bytes by kind, largest first; they add up to the allocated peak.
        kept: bytes saved for the backward pass, by layers in order; empty when there are none.
        levers: changes that would reduce the peak.
    """

    op: str | None
    layer: int | None
    part: str
    shares: tuple[Share, ...]
    kept: tuple[LayerShare, ...]
    levers: tuple[Lever, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted memory and time of one cell on the target device.

    Attributes:
        memory: the peaks that a measurement would report.
        limit_bytes: memory of the device; None without a limit.
        spare_bytes: headroom on the device; negative when the cell does not fit.
        reserve_frac: the fraction of the device's memory that is held back.
        num_alloc_retries: times the allocator would have to flush its cache and retry; None on the CPU.
        attention: kernel -> number of calls in a forward and backward pass of the traced layers.
        layers_traced: number of layers traced, from which the others are composed.
        why_in_full: why every layer was traced; None when only some were.
        additions: what a real run may add; small ones are left out.
        fallback: None when no PyTorch code was traced in place of a kernel, and on the CPU, which has no such kernels.
        time: the time of a step; None where nothing is known of the device's times, and in reports of before December
            2026.
        why_no_time: why it is None, with a remedy where there is one.
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
    time: StepTime | None = None
    why_no_time: str | None = None

    @property
    def needed_bytes(self) -> int:
        """Bytes that count against the device's memory: of the whole process on CUDA, of tensors on a CPU."""
        return self.memory.allocated_bytes if self.memory.process_bytes is None else self.memory.process_bytes

    @property
    def usable_bytes(self) -> int | None:
        """The device's memory less the reserve; None without a limit."""
        return None if self.limit_bytes is None else headroom.usable_bytes(self.limit_bytes, self.reserve_frac)

    @property
    def fit(self) -> headroom.Fit | None:
        """Whether the cell fits; None without a limit."""
        if self.limit_bytes is None:
            return None
        return headroom.classify_fit(
            self.needed_bytes,
            limit_bytes=self.limit_bytes,
            reserve_frac=self.reserve_frac,
            reserved_bytes=self.memory.reserved_bytes,
        )
