"""The vocabulary of a decision: what could be run, what each would take and bring, and what was chosen. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gcbench.core.memory_peaks import Phase
from gcbench.core.prediction import Addition, Fallback
from gcbench.core.units import counted, format_bytes
from gcbench.strategies import OFF, Plan

FOUND = "plan"
"""The strategy of a candidate whose plan was found, not named."""
AS_FAST_FRAC = 0.005
"""Of two settings whose tokens per second differ by less, the simpler one is chosen."""
_SIMPLEST = (OFF, "per-layer", "every:", "first:", "last:", "segment:", "selective:", "offload")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One strategy at one batch size.

    Attributes:
        strategy: its spec; `plan` for one that was found.
        peak_bytes: what counts against the device's memory: on CUDA all that the process holds, on a CPU what tensors
            hold.
        allocated_bytes: what tensors hold at the peak.
        fits: whether it stays within what may be used.
        step_time_s: an estimate, or the median of measurements; `low` and `high` are the ends of its 95 % interval.
        source: `predicted` from a trace of this very step, `estimated` where the memory too is put together from
            others, `measured`.
        is_lower_bound: whether the step takes more than `peak_bytes`: what its tensors and the process besides take is
            too much already.
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

    @property
    def peak_text(self) -> str:
        """`16.99 GiB`; `≥ 41.20 GiB` where no more was looked at than that it is too large."""
        return f"{'≥ ' if self.is_lower_bound else ''}{format_bytes(self.peak_bytes)}"

    @property
    def rank(self) -> tuple[int, int, int]:
        """Lower is simpler: kinds that every trainer has first, then fewer layers recomputed, then a smaller batch."""
        kinds = [place for place, name in enumerate(_SIMPLEST) if self.strategy.startswith(name)]
        joined = "+" in self.strategy
        return (len(_SIMPLEST) if not kinds or joined else kinds[0], self.plan.layers_checkpointed, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class MemoryLever:
    """Something outside of checkpointing, and the peak with it, from the same step replayed or traced anew.

    Attributes:
        name: what to change, in words.
        flag: how to say it to gcbench; None where gcbench has no flag for it.
        peak_bytes: as in `Candidate`.
        fits: whether the step then stays within what may be used.
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
    """What there is to say of a candidate; fields as in `Decision`."""

    FORMERLY: ClassVar = {"gains": "levers"}

    of: Candidate
    peak_words: str
    levers: tuple[MemoryLever, ...]
    additions: tuple[Addition, ...] = ()
    fallback: Fallback | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to run, and everything it was chosen from.

    Attributes:
        limit_bytes: the device's memory; None where there is no bound.
        usable_bytes: what of it may be used: less the reserve.
        reserve_frac: the part held back.
        choice: None where nothing fits.
        smallest: the candidate with the lowest peak, where nothing fits.
        candidates: all that were looked at, those that fit first, the fastest first.
        largest: for each strategy.
        levers: what would lower the peak of the choice (of the smallest where nothing fits).
        longest_seq_len: where nothing fits, the longest of the halved lengths at which something does; None if none.
        peak_words: what is alive at the peak of the choice, in words.
        binding: why not more: a sentence.
        additions: what a real run may add to the choice (to the smallest where nothing fits).
        fallback: what of its peak PyTorch code makes in place of fused kernels.
        details: of those that a measurement may find to be faster than the choice.
        times_from: where the times come from, in words.
        notices: what else the user should know.
        outside_bytes: what of a candidate's predicted peak lies outside the allocator; 0 on a CPU.
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
    """A strategy in words: its name, or what a found plan does."""
    plan = candidate.plan
    if candidate.strategy != FOUND:
        return candidate.strategy
    kinds = dict.fromkeys(plan.policies)
    parts = []
    for policy in kinds:
        count, kept = plan.policies.count(policy), len(policy.keep)
        verb, own = ("keeps", "its") if count == 1 else ("keep", "their")
        parts.append(
            f"{count} {verb} {counted(kept, 'output')} inside" if kept else f"{count} {verb} {own} input alone"
        )
    whole = plan.num_layers - plan.layers_checkpointed
    if whole:
        parts.append(f"{whole} {'keeps' if whole == 1 else 'keep'} everything")
    return f"a found plan: of {counted(plan.num_layers, 'layer')} {', '.join(parts)}"


def nearest_faster(candidates: Sequence[Candidate], choice: Candidate) -> Candidate | None:
    """Of `off` at batch sizes at which it is faster than the choice, the one that needs least; None where none is."""
    off = [candidate for candidate in candidates if candidate.strategy == OFF]
    faster = [each for each in off if each.tokens_per_s > (1 + AS_FAST_FRAC) * choice.tokens_per_s]
    return min(faster, key=lambda each: each.peak_bytes, default=None)


def why_not_faster(candidates: Sequence[Candidate], choice: Candidate) -> str:
    """What keeps the choice from being faster: memory or not."""
    nearest = nearest_faster(candidates, choice)
    if nearest is None:
        return f"Memory does not bind: with nothing recomputed, no batch is more than {100 * AS_FAST_FRAC:g} % faster."
    more = nearest.tokens_per_s / choice.tokens_per_s - 1
    return (
        f"Memory binds: off at batch {nearest.batch_size} would be {100 * more:.1f} % faster and need "
        f"{nearest.peak_text}."
    )


def best_of_each(candidates: Sequence[Candidate], choice: Candidate | None) -> list[Candidate]:
    """The choice, and of each other strategy the fastest that fits, else the smallest; measured ones first."""
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
    """The fastest of those that fit; of those as fast as makes no difference, the simplest; None when none fits."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return None
    best = max(candidate.tokens_per_s for candidate in fitting)
    as_fast = [candidate for candidate in fitting if candidate.tokens_per_s >= best * (1 - AS_FAST_FRAC)]
    return min(as_fast, key=lambda candidate: (candidate.rank, -candidate.tokens_per_s))


def ranked(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that fit first; the fastest first."""
    return tuple(sorted(candidates, key=lambda candidate: (not candidate.fits, -candidate.tokens_per_s)))
