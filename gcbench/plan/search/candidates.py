"""What a plan takes and brings at a batch size: traced once, and computed from then on."""

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
    """One model on one device, at one length.

    Attributes:
        usable: bytes that may be used; None where there is no bound.
        is_cuda: whether the target has a caching allocator, and a process holds more than its tensors.
        all_up_to: the batch size up to which all is known of what does not fit either; None for all batch sizes.
    """

    all_up_to: int | None = None

    def __init__(self, task: PlanTask, figures: Figures) -> None:
        self.task = task
        self.figures = figures
        self.session = Session(task.as_predictions())
        self.is_cuda = task.target.kind == "cuda"
        self.usable = _usable(task)
        self.pair = traced_at(task.target, task.seq_len)
        """The batch sizes that others follow from."""
        self._scalings: dict[Plan, Scaling] = {}
        self._peaks: dict[tuple[Plan, int, bool], tuple[int, Peak]] = {}
        self._profiles: dict[tuple[Plan, int], StepProfile | None] = {}
        self._seconds: dict[tuple[Plan, int, bool], float] = {}

    def limited(self, task: PlanTask) -> CandidateEvaluator:
        """The same for a task that differs in the target's memory alone; what was traced is shared."""
        other = copy(self)
        other.task, other.usable = task, _usable(task)
        other.session = Session.on(self.session, task.target)
        other._peaks = {}  # short of memory, an allocator gives back what it caches
        return other

    def use(self, figures: Figures) -> None:
        """Other figures from now on."""
        self.figures = figures
        self._profiles, self._seconds = {}, {}

    def calls(self, plan: Plan, batch: int) -> list[Work]:
        """Every call of an operator in a step, as it is made."""
        scaling = self.scaling(plan)
        update = scaling.step(batch).update
        pairs = () if update is None else zip(update.works, update.times, strict=True)
        return [*scaling.calls(batch), *(work for work, times in pairs for _ in range(round(times)))]

    def trace(self, plans: list[Plan]) -> dict[Plan, str]:
        """Trace what these plans' steps are computed from, on two cores; those that cannot be traced, and why.

        Raises what the model's own code raises on tensors without values, with nothing recomputed.
        """
        low, high = self.pair
        # What others do at the larger batch size follows from the first two, which keep everything and nothing.
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
        """The steps of plans at batch sizes, on two cores; of those that cannot be traced, why."""
        predictor, seq_len = self.session.predictor, self.task.seq_len

        def step(pair: tuple[Plan, int]) -> Step | str:
            plan, batch = pair
            try:
                return predictor.step(plan, batch_size=batch, seq_len=seq_len)
            except Exception as err:  # a model's own code, which may not bear that some of it is not run again
                if not plan.groups:
                    raise
                return first_sentence(err)

        with timeline.without_collections():
            return dict(zip(pairs, on_two_cores(step, pairs), strict=True))

    def scaling(self, plan: Plan) -> Scaling:
        """Its steps at any batch size."""
        if plan not in self._scalings:
            self._scalings[plan] = Scaling(self.session.predictor, plan, seq_len=self.task.seq_len, pair=self.pair)
        return self._scalings[plan]

    def candidate(self, spec: str, plan: Plan, batch: int, *, traced: bool = False, in_full: bool = False) -> Candidate:
        """A plan at a batch size; with `traced` from a trace of this very step, with `in_full` also beyond `all_up_to`.

        Beyond it the peak may be a lower bound.
        """
        held, peak = self.held(plan, batch, traced=traced, in_full=in_full)
        seconds = self.seconds(plan, batch, traced=traced)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=held,
            allocated_bytes=peak.memory.allocated_bytes,
            peak_phase=peak.memory.peak_phase,
            fits=self.fits(held),
            step_time_s=seconds,
            tokens_per_s=batch * self.task.seq_len / seconds,
            source="predicted" if traced or self.scaling(plan).is_exact(batch) else "estimated",
            is_lower_bound=self.is_bound(peak),
        )

    def is_bound(self, peak: Peak) -> bool:
        """Whether the allocator was not looked at, so that the process holds more than is said."""
        return self.is_cuda and peak.memory.process_bytes is None

    def seconds(self, plan: Plan, batch: int, *, traced: bool = False) -> float:
        """How long a step takes; an estimate."""
        key = (plan, batch, traced)
        if key not in self._seconds:
            self._seconds[key] = self._step(plan, batch, traced=traced).seconds(self.figures)
        return self._seconds[key]

    def _step(self, plan: Plan, batch: int, *, traced: bool) -> Step:
        scaling = self.scaling(plan)
        return scaling.traced(batch) if traced else scaling.step(batch)

    def held(self, plan: Plan, batch: int, *, traced: bool = False, in_full: bool = False) -> tuple[int, Peak]:
        """(bytes that count against the device's memory, the peak) of a step."""
        key = (plan, batch, traced)
        if key not in self._peaks or (in_full and self.is_bound(self._peaks[key][1])):
            scaling = self.scaling(plan)
            line = scaling.traced(batch).timeline if traced else scaling.line(batch)
            self._peaks[key] = self.weighed(line, None if traced or in_full else batch)
        return self._peaks[key]

    def weighed(self, line: Timeline, batch: int | None = None) -> tuple[int, Peak]:
        """The same of any step; of batches above `all_up_to` with no look at the allocator where tensors are too much.

        What is returned then is what they take, and the process besides: less than it would hold.
        """
        limit = self.task.target.memory_bytes
        if self.all_up_to is not None and batch is not None and batch > self.all_up_to and limit is not None:
            tensors = timeline.exact(line)
            held = tensors.memory.allocated_bytes + self.outside_bytes
            if held > limit:
                return held, tensors
        peak = self.session.peak(line)
        return self._counts(peak), peak

    def counted(self, line: Timeline, session: Session) -> int:
        """Bytes that count against the device's memory, of any step in any session."""
        return self._counts(session.peak(line))

    def _counts(self, peak: Peak) -> int:
        return (peak.memory.process_bytes or 0) if self.is_cuda else peak.memory.allocated_bytes

    @property
    def outside_bytes(self) -> int:
        """What the process takes of the device outside of an allocator."""
        return self.session.device_model.outside_bytes if self.is_cuda else 0

    def fits(self, held: int) -> bool:
        """Whether so many bytes may be used."""
        return self.usable is None or held <= self.usable

    def profile(self, plan: Plan, batch: int) -> StepProfile | None:
        """The step layer by layer; None where layers cannot be told apart."""
        key = (plan, batch)
        if key not in self._profiles:
            rounding = MIN_BLOCK_BYTES if self.is_cuda else 1
            self._profiles[key] = profile(self.scaling(plan).step(batch), self.figures, rounding=rounding)
        return self._profiles[key]

    def most(self, plan: Plan) -> int | None:
        """The largest batch at which a plan fits; None where one sequence does not, or nothing is too large."""
        if self.usable is None:
            return None
        scaling = self.scaling(plan)
        if not scaling.is_affine:
            return next((batch for batch in (8, 4, 2, 1) if self.fits(self.held(plan, batch)[0])), None)
        return self.largest_of(lambda batch: self.tensors(scaling.line(batch)), lambda batch: self.held(plan, batch))

    def largest_of(self, tensors: Callable[[int], int], held: Callable[[int], tuple[int, Peak]]) -> int | None:
        """The largest batch that fits, by what its tensors take, which is quick to tell, and what it holds in all."""
        assert self.usable is not None
        room = self.usable - self.outside_bytes

        def fits(batch: int) -> bool:
            return self.fits(held(batch)[0])

        # No more fit than would with nothing lost between tensors; where the search then begins, about as much is lost.
        most = largest(lambda batch: tensors(batch) <= room)
        if most == 0 or fits(most):
            return most or None
        nbytes, peak = held(most)
        room = self.usable - (nbytes - peak.memory.allocated_bytes)
        return largest(fits, start=min(most - 1, largest(lambda batch: tensors(batch) <= room))) or None

    @staticmethod
    def tensors(line: Timeline) -> int:
        """Bytes that tensors take at a step's peak."""
        return timeline.exact(line).memory.allocated_bytes


def _usable(task: PlanTask) -> int | None:
    limit = task.target.memory_bytes
    return None if limit is None else headroom.usable_bytes(limit, task.reserve_frac)


def largest(fits: Callable[[int], bool], *, start: int = 0) -> int:
    """The largest batch that fits, where smaller ones do too; 0 for none. `start` is a guess, looked around first."""
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
