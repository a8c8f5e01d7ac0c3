"""Peak memory and step time of a plan at any batch size: traced once per plan, then scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

from gcbench.core import headroom
from gcbench.core.errors import first_sentence
from gcbench.plan.decision import Candidate
from gcbench.plan.estimate.batch_scaling import Scaling, traced_at
from gcbench.plan.estimate.growth import Growth
from gcbench.plan.estimate.layer_profile import StepProfile, profile
from gcbench.plan.search.two_cores import on_two_cores
from gcbench.plan.task import PlanTask
from gcbench.predict.worker import Session
from gcbench.simulate import timeline
from gcbench.simulate.allocator.pools import MIN_BLOCK_BYTES
from gcbench.simulate.costs import Figures, Work
from gcbench.simulate.predictor import Step
from gcbench.simulate.timeline import Peak, Timeline
from gcbench.strategies import Plan

_MOST_BATCH = 2**20


class CandidateEvaluator:
    """Evaluates plans of one model on one target, at one sequence length.

    Its settings never change: `limited`, `with_figures` and `exact_up_to` each return another evaluator, which shares
    the traces and those results that stay valid.

    Attributes:
        usable: usable bytes of the device; None without a limit.
        is_cuda: whether the target has a caching allocator, so that a process takes more memory than its tensors.
        pair: the two batch sizes that are traced, from which all others follow.
    """

    def __init__(self, task: PlanTask, figures: Figures) -> None:
        self.task = task
        self.figures = figures
        self.session = Session(task.as_predictions())
        self.is_cuda = task.target.kind == "cuda"
        self.usable = _usable(task)
        self.pair = traced_at(task.target, task.seq_len)
        self._exact_up_to: int | None = None
        self._scalings: dict[Plan, Scaling] = {}
        self._peaks: dict[tuple[Plan, int, bool], tuple[int, Peak]] = {}
        self._profiles: dict[tuple[Plan, int], StepProfile | None] = {}
        self._seconds: dict[tuple[Plan, int, bool], float] = {}

    def limited(self, task: PlanTask) -> CandidateEvaluator:
        """The evaluator for a task that differs only in the memory of the target."""
        other = copy(self)
        other.task, other.usable = task, _usable(task)
        other.session = Session.on(self.session, task.target)
        other._peaks = {}  # an allocator that runs short of memory frees what it caches
        return other

    def with_figures(self, figures: Figures) -> CandidateEvaluator:
        """The evaluator with other operator times."""
        other = copy(self)
        other.figures = figures
        other._profiles, other._seconds = {}, {}
        return other

    def exact_up_to(self, batch: int) -> CandidateEvaluator:
        """The evaluator that reports a lower bound for larger batches whose tensors alone exceed the device.

        The allocator is not replayed for these, which is what takes long.
        """
        other = copy(self)
        other._exact_up_to = batch
        return other

    def calls(self, plan: Plan, batch: int) -> list[Work]:
        """All operator calls of a step, the optimizer's included."""
        scaling = self.scaling(plan)
        update = scaling.step(batch).update
        pairs = () if update is None else zip(update.works, update.times, strict=True)
        return [*scaling.calls(batch), *(work for work, times in pairs for _ in range(round(times)))]

    def trace(self, plans: list[Plan]) -> dict[Plan, str]:
        """Trace these plans on two cores; returns the reason for each that cannot be traced.

        The first two must checkpoint nothing and everything. Raises what the model's own code raises on fake tensors
        (shapes and dtypes, no data) without checkpointing.
        """
        low, high = self.pair
        # The steps of the other plans at the larger batch size follow from these two.
        found = self._traced([*((plan, high) for plan in plans[:2]), *((plan, low) for plan in plans)])
        growth = Growth(
            [
                (one, two)
                for plan in plans[:2]
                if isinstance(one := found[plan, low], Step) and isinstance(two := found[plan, high], Step)
            ]
        )
        grown = {plan: growth.grown(one) for plan in plans[2:] if isinstance(one := found[plan, low], Step)}
        found |= self._traced([(plan, high) for plan, step in grown.items() if step is None])
        refused: dict[Plan, str] = {}
        for plan in plans:
            steps = {batch: found[plan, batch] for batch in self.pair if (plan, batch) in found}
            why = next((step for step in steps.values() if isinstance(step, str)), None)
            if why is not None:
                refused[plan] = why
                continue
            self._scalings[plan] = Scaling(
                self.session.predictor,
                plan,
                seq_len=self.task.seq_len,
                pair=self.pair,
                known={batch: step for batch, step in steps.items() if isinstance(step, Step)},
                grown=grown.get(plan),
            )
        return refused

    def _traced(self, pairs: Sequence[tuple[Plan, int]]) -> dict[tuple[Plan, int], Step | str]:
        """The step of each (plan, batch size), or why it cannot be traced; on two cores."""
        predictor, seq_len = self.session.predictor, self.task.seq_len

        def step(pair: tuple[Plan, int]) -> Step | str:
            plan, batch = pair
            try:
                return predictor.step(plan, batch_size=batch, seq_len=seq_len)
            except Exception as err:  # a model's own code, which may not allow that calls are skipped
                if not plan.groups:
                    raise
                return first_sentence(err)

        with timeline.without_collections():
            return dict(zip(pairs, on_two_cores(step, pairs), strict=True))

    def scaling(self, plan: Plan) -> Scaling:
        """The plan's steps at any batch size."""
        if plan not in self._scalings:
            self._scalings[plan] = Scaling(self.session.predictor, plan, seq_len=self.task.seq_len, pair=self.pair)
        return self._scalings[plan]

    def candidate(self, spec: str, plan: Plan, batch: int, *, traced: bool = False, in_full: bool = False) -> Candidate:
        """Evaluate a plan at a batch size; with `traced` from a trace of this very step.

        With `in_full` the peak is never a lower bound (see `exact_up_to`).
        """
        nbytes, peak = self.peak(plan, batch, traced=traced, in_full=in_full)
        seconds = self.seconds(plan, batch, traced=traced)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=nbytes,
            allocated_bytes=peak.memory.allocated_bytes,
            peak_phase=peak.memory.peak_phase,
            fits=self.fits(nbytes),
            step_time_s=seconds,
            tokens_per_s=batch * self.task.seq_len / seconds,
            source="predicted" if traced or self.scaling(plan).is_exact(batch) else "estimated",
            is_lower_bound=self.is_lower_bound(peak),
        )

    def is_lower_bound(self, peak: Peak) -> bool:
        """Whether the peak was found without a replay of the allocator."""
        return self.is_cuda and peak.memory.process_bytes is None

    def seconds(self, plan: Plan, batch: int, *, traced: bool = False) -> float:
        """The estimated time of a step."""
        key = (plan, batch, traced)
        if key not in self._seconds:
            self._seconds[key] = self._step(plan, batch, traced=traced).seconds(self.figures)
        return self._seconds[key]

    def _step(self, plan: Plan, batch: int, *, traced: bool) -> Step:
        scaling = self.scaling(plan)
        return scaling.traced(batch) if traced else scaling.step(batch)

    def peak(self, plan: Plan, batch: int, *, traced: bool = False, in_full: bool = False) -> tuple[int, Peak]:
        """(bytes that count against the device's memory, the peak) of a step."""
        key = (plan, batch, traced)
        if key not in self._peaks or (in_full and self.is_lower_bound(self._peaks[key][1])):
            scaling = self.scaling(plan)
            line = scaling.traced(batch).timeline if traced else scaling.line(batch)
            self._peaks[key] = self.peak_of(line, None if traced or in_full else batch)
        return self._peaks[key]

    def peak_of(self, line: Timeline, batch: int | None = None) -> tuple[int, Peak]:
        """As `peak`, of any step; it may be a lower bound where its batch size is given (see `exact_up_to`)."""
        limit = self.task.target.memory_bytes
        if self._exact_up_to is not None and batch is not None and batch > self._exact_up_to and limit is not None:
            tensors = timeline.exact(line)
            nbytes = tensors.memory.allocated_bytes + self.outside_bytes
            if nbytes > limit:
                return nbytes, tensors
        peak = self.session.peak(line)
        return self.session.counts(peak), peak

    @property
    def outside_bytes(self) -> int:
        """Device memory of the process outside the allocator; 0 on a CPU."""
        return self.session.device_model.outside_bytes if self.is_cuda else 0

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes are usable."""
        return self.usable is None or nbytes <= self.usable

    def profile(self, plan: Plan, batch: int) -> StepProfile | None:
        """The step layer by layer; None where it was traced in full."""
        key = (plan, batch)
        if key not in self._profiles:
            rounding = MIN_BLOCK_BYTES if self.is_cuda else 1
            self._profiles[key] = profile(self.scaling(plan).step(batch), self.figures, rounding=rounding)
        return self._profiles[key]

    def largest_batch(self, plan: Plan) -> int | None:
        """The largest batch at which a plan fits; None where not even one sequence does, or memory is unlimited."""
        if self.usable is None:
            return None
        scaling = self.scaling(plan)
        if not scaling.is_affine:
            return next((batch for batch in (8, 4, 2, 1) if self.fits(self.peak(plan, batch)[0])), None)
        return self.largest_that_fits(scaling.line, lambda batch: self.peak(plan, batch))

    def largest_that_fits(self, line: Callable[[int], Timeline], peak: Callable[[int], tuple[int, Peak]]) -> int | None:
        """The largest batch that fits, by a step's timeline and peak at a batch size; None where none fits.

        The tensors alone are quick to add up, so the search narrows the range by them before it replays an allocator.
        """
        assert self.usable is not None

        def largest_by_tensors(available: int) -> int:
            return largest(lambda batch: self.tensor_bytes(line(batch)) <= available)

        def fits(batch: int) -> bool:
            return self.fits(peak(batch)[0])

        # An upper bound: no fragmentation. Then a guess: as much fragmentation as at that bound.
        most = largest_by_tensors(self.usable - self.outside_bytes)
        if most == 0 or fits(most):
            return most or None
        nbytes, at_most = peak(most)
        guess = largest_by_tensors(self.usable - (nbytes - at_most.memory.allocated_bytes))
        return largest(fits, start=min(most - 1, guess)) or None

    @staticmethod
    def tensor_bytes(line: Timeline) -> int:
        """Allocated bytes of tensors at a step's peak."""
        return timeline.exact(line).memory.allocated_bytes


def _usable(task: PlanTask) -> int | None:
    limit = task.target.memory_bytes
    return None if limit is None else headroom.usable_bytes(limit, task.reserve_frac)


def largest(fits: Callable[[int], bool], *, start: int = 0) -> int:
    """The largest batch that fits, where smaller ones do too; 0 for none. `start` is a guess, tried first."""
    low, high, step = start, start + 1, 1
    while low > 0 and not fits(low):
        low, high, step = max(low - step, 0), low, 2 * step
    if low == start:
        while high <= _MOST_BATCH and fits(high):
            low, high, step = high, high + 2 * step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
