"""The records of a decision: candidates with peaks and speeds, the choice, and how it is made. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gcbench.core.memory_peaks import Phase
from gcbench.core.prediction import Addition, Fallback
from gcbench.core.units import counted, format_bytes
from gcbench.export._handover import SEARCHED
from gcbench.strategies import OFF, Plan

AS_FAST_FRAC = 0.005
"""Of two settings whose tokens per second differ by less, the simpler one is chosen."""
_SIMPLEST = (OFF, "per-layer", "every:", "first:", "last:", "segment:", "selective:", "offload")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One strategy at one batch size.

    Attributes:
        strategy: its spec; `SEARCHED` for a plan that the search put together.
        peak_bytes: what counts against the device's memory: on CUDA all memory of the process, on a CPU that of
            tensors.
        allocated_bytes: memory of tensors at the peak.
        fits: whether the peak is within the usable memory.
        step_time_s: an estimate, or the median of measurements.
        tokens_per_s_low, tokens_per_s_high: the 95 % interval; None where not measured.
        source: `predicted` from a trace of this very step, `estimated` where its memory too is composed from traces of
            other steps, `measured`.
        is_lower_bound: whether the step needs more than `peak_bytes`, which counts its tensors and the process outside
            the allocator only: that alone exceeds the device.
        emulated_bytes: `peak_bytes` as found on an emulated card, with the same part outside the allocator; None where
            it was not run there.
        frac_low, frac_high: the 95 % interval of its tokens per second over those of the choice, both measured; None
            where there is none.
    """

    strategy: str
    plan: Plan
    batch_size: int
    peak_bytes: int
    allocated_bytes: int
    peak_phase: Phase | None
    fits: bool
    step_time_s: float
    tokens_per_s: float
    source: Literal["predicted", "estimated", "measured"] = "predicted"
    tokens_per_s_low: float | None = None
    tokens_per_s_high: float | None = None
    is_lower_bound: bool = False
    frac_low: float | None = None
    frac_high: float | None = None
    emulated_bytes: int | None = None

    @property
    def peak_text(self) -> str:
        """`16.99 GiB`; `≥ 41.20 GiB` for a lower bound."""
        return f"{'≥ ' if self.is_lower_bound else ''}{format_bytes(self.peak_bytes)}"

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sort key, lower is simpler: kinds that every trainer has, fewer layers recomputed, smaller batches."""
        kinds = [place for place, name in enumerate(_SIMPLEST) if self.strategy.startswith(name)]
        joined = "+" in self.strategy
        return (len(_SIMPLEST) if not kinds or joined else kinds[0], self.plan.layers_checkpointed, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class MemoryLever:
    """A change outside of checkpointing that reduces the peak: the same step replayed or traced with it.

    Attributes:
        name: what to change, in words.
        flag: the flag of gcbench for it; None where there is none.
        peak_bytes: as in `Candidate`, with the change.
        fits: whether that is within the usable memory.
    """

    name: str
    flag: str | None
    peak_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest batch that a strategy allows; None where not even one sequence fits."""

    strategy: str
    batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class CandidateDetails:
    """What a decision reports about one candidate; fields as in `Decision`."""

    FORMERLY: ClassVar = {"gains": "levers"}

    of: Candidate
    peak_words: str
    levers: tuple[MemoryLever, ...]
    additions: tuple[Addition, ...] = ()
    fallback: Fallback | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The choice, and all candidates that it was chosen from.

    Attributes:
        limit_bytes: the device's memory; None where it is not limited.
        usable_bytes: `limit_bytes` less the reserve.
        reserve_frac: the reserve, as a fraction of `limit_bytes`.
        choice: None where nothing fits.
        smallest: the candidate with the lowest peak, where nothing fits.
        candidates: all of them, those that fit first, the fastest first.
        largest: the largest batch of each strategy.
        levers: what would reduce the peak of the choice (of the smallest where nothing fits).
        longest_seq_len: where nothing fits, the longest of the halved lengths at which something does; None if none.
        peak_words: what is allocated at the peak of the choice, in words.
        binding: why nothing faster was chosen: sentences.
        additions: what a real run of the choice (of the smallest) may allocate beyond the prediction.
        fallback: the part of its peak that PyTorch code allocates where fused kernels would not.
        details: of the candidates that a measurement may find to be faster than the choice.
        times_from: where the times come from, in words.
        notices: what else the user should know.
        outside_bytes: the part of a predicted peak outside the allocator; 0 on a CPU.
    """

    FORMERLY: ClassVar = {"gains": "levers", "told": "details"}

    limit_bytes: int | None
    usable_bytes: int | None
    reserve_frac: float
    choice: Candidate | None
    smallest: Candidate | None
    candidates: tuple[Candidate, ...]
    largest: tuple[Largest, ...]
    levers: tuple[MemoryLever, ...] = ()
    longest_seq_len: int | None = None
    peak_words: str | None = None
    binding: str | None = None
    details: tuple[CandidateDetails, ...] = ()
    additions: tuple[Addition, ...] = ()
    fallback: Fallback | None = None
    times_from: str
    notices: tuple[str, ...] = ()
    outside_bytes: int = 0


def described(candidate: Candidate) -> str:
    """A strategy in words: `per-layer`, or `searched plan: 2 layers save 11 op outputs, 17 are not checkpointed`."""
    plan = candidate.plan
    if candidate.strategy != SEARCHED:
        return candidate.strategy
    layers_by_saved: Counter[int] = Counter()
    for group, policy in plan.treated():
        layers_by_saved[len(policy.keep)] += len(group)
    groups: list[tuple[int, str]] = []
    unit = " op outputs"  # said once
    for saved, count in layers_by_saved.items():
        verb = "saves" if count == 1 else "save"
        number = counted(saved, "op output") if saved == 1 and unit else f"{saved}{unit}"
        groups.append((count, f"{verb} {number if saved else 'only the layer input'}"))
        unit = "" if saved else unit
    if rest := plan.num_layers - plan.layers_checkpointed:
        groups.append((rest, "is not checkpointed" if rest == 1 else "are not checkpointed"))
    (first, what), *others = groups
    parts = [f"{counted(first, 'layer')} {what}", *(f"{count} {text}" for count, text in others)]
    return f"searched plan: {', '.join(parts)}"


def nearest_faster(candidates: Sequence[Candidate], choice: Candidate) -> Candidate | None:
    """The candidate with the lowest peak of those of `off` that are faster than the choice; None where none is."""
    off = [candidate for candidate in candidates if candidate.strategy == OFF]
    faster = [each for each in off if each.tokens_per_s > (1 + AS_FAST_FRAC) * choice.tokens_per_s]
    return min(faster, key=lambda each: each.peak_bytes, default=None)


def why_not_faster(candidates: Sequence[Candidate], choice: Candidate) -> str:
    """Whether memory limits the speed of the choice, in a sentence."""
    nearest = nearest_faster(candidates, choice)
    if nearest is None:
        margin = f"{100 * AS_FAST_FRAC:g} %"
        return f"Memory does not limit the speed: without recomputation no batch is more than {margin} faster."
    more = nearest.tokens_per_s / choice.tokens_per_s - 1
    return (
        f"Memory limits the speed: off at batch {nearest.batch_size} would be {100 * more:.1f} % faster and need "
        f"{nearest.peak_text}."
    )


def best_of_each(candidates: Sequence[Candidate], choice: Candidate | None) -> list[Candidate]:
    """The choice, and the fastest fitting candidate of each other strategy, else its smallest; measured ones first."""
    best: dict[str, Candidate] = {} if choice is None else {choice.strategy: choice}
    for candidate in ranked(candidates):
        known = best.get(candidate.strategy)
        if known is None or (not known.fits and candidate.peak_bytes < known.peak_bytes):
            best[candidate.strategy] = candidate
    return sorted(
        best.values(),
        key=lambda each: (each != choice, not each.fits, each.source != "measured", -each.tokens_per_s),
    )


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The simplest candidate of those within `AS_FAST_FRAC` of the fastest that fits; None when none fits."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return None
    best = max(candidate.tokens_per_s for candidate in fitting)
    as_fast = [candidate for candidate in fitting if candidate.tokens_per_s >= best * (1 - AS_FAST_FRAC)]
    return min(as_fast, key=lambda candidate: (candidate.rank, -candidate.tokens_per_s))


def ranked(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, those that fit first, the fastest first."""
    return tuple(sorted(candidates, key=lambda candidate: (not candidate.fits, -candidate.tokens_per_s)))
