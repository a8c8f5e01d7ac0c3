"""Searched plans: composes plans from uniform ones, solves for the fastest that fits, and verifies it by a trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property

from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import Candidate
from gcbench.plan.estimate.mixed_layers import Combiner
from gcbench.plan.layer_mix.layered import Layered
from gcbench.plan.search.candidates import CandidateEvaluator
from gcbench.plan.task import PlanTask
from gcbench.simulate.allocator.pools import MIN_BLOCK_BYTES
from gcbench.simulate.costs import Figures
from gcbench.simulate.timeline import Peak, Timeline
from gcbench.simulate.trace.fake_model import NotComposable
from gcbench.strategies import OFF, Plan, Policy, parse

_PLAIN = 2
"""The first two uniform plans: no layer checkpointed, and all fully recomputed."""
_MOST_SOLUTIONS = 12
"""Times that the problem is solved with a smaller budget, because the allocator reserves more than tensors take."""
_MOST_TRACES = 4
"""Times per batch size that a trace may show that a solution does not fit."""
_LEAST_STEP = 1 / 512
"""The least reduction of the budget, as a fraction of the usable memory."""


class Mixes:
    """Plans composed of uniform ones, which give every layer the same policy; owns the evaluator of all plans.

    Like its evaluator it never changes its settings: the methods named as the evaluator's return a pair of both.

    Attributes:
        uniform: nothing checkpointed, everything fully recomputed, then one plan per policy.
    """

    def __init__(self, evaluator: CandidateEvaluator, uniform: Sequence[Plan]) -> None:
        self.evaluator = evaluator
        self.uniform = tuple(uniform)
        self._layered: dict[int, Layered | None] = {}
        self._peaks: dict[tuple[int, tuple[int, ...]], tuple[int, Peak]] = {}

    def limited(self, task: PlanTask) -> Mixes:
        """The same plans for a task that differs only in the memory of the target."""
        other = self._on(self.evaluator.limited(task))
        other._layered, other._peaks = dict(self._layered), {}
        return other

    def with_figures(self, figures: Figures) -> Mixes:
        """The same plans with other operator times."""
        other = self._on(self.evaluator.with_figures(figures))
        other._layered = {}
        return other

    def exact_up_to(self, batch: int) -> Mixes:
        """The same plans, with lower bounds for larger batches (see `CandidateEvaluator.exact_up_to`)."""
        return self._on(self.evaluator.exact_up_to(batch))

    def _on(self, evaluator: CandidateEvaluator) -> Mixes:
        other = copy(self)
        other.evaluator = evaluator
        return other

    def layered(self, batch: int) -> Layered | None:
        """The layers with their choices at one batch size; None where a step was traced in full."""
        if batch not in self._layered:
            profiles = [self.evaluator.profile(plan, batch) for plan in self.uniform]
            known = [each for each in profiles if each is not None]
            can = 1 < len(known) == len(profiles) and self._combiner is not None
            self._layered[batch] = Layered(known) if can else None
        return self._layered[batch]

    @cached_property
    def _combiner(self) -> Combiner | None:
        try:
            return Combiner([self.evaluator.scaling(plan).traced(self.evaluator.pair[0]) for plan in self.uniform])
        except NotComposable:
            return None

    def candidate(self, spec: str, plan: Plan, batch: int) -> Candidate:
        """Evaluate a named plan at a batch size, without a trace of its own where it is composed of uniform ones."""
        layered = self.layered(batch) if is_composed(plan, self.uniform) else None
        if layered is None:
            return self.evaluator.candidate(spec, plan, batch)
        return self._composed(spec, plan, batch, layered, self._plain_choice(plan, layered.layers))

    @staticmethod
    def _plain_choice(plan: Plan, layers: Sequence[int]) -> tuple[int, ...]:
        checkpointed = {layer for group in plan.groups for layer in group}
        return tuple(1 if layer in checkpointed else 0 for layer in layers)

    def _line(self, choice: Sequence[int], batch: int) -> Timeline:
        assert self._combiner is not None
        return self._combiner.line(choice, [self.evaluator.scaling(each).line(batch) for each in self.uniform])

    def _peak(self, choice: Sequence[int], batch: int) -> tuple[int, Peak]:
        key = (batch, tuple(choice))
        if key not in self._peaks:
            self._peaks[key] = self.evaluator.peak_of(self._line(choice, batch), batch)
        return self._peaks[key]

    def largest_batch(self, plan: Plan) -> int | None:
        """The largest batch at which a named plan fits; None where not even one sequence does."""
        evaluator = self.evaluator
        if evaluator.usable is None or not is_composed(plan, self.uniform) or self._combiner is None:
            return evaluator.largest_batch(plan)
        choice = self._plain_choice(plan, self._combiner.layers)
        return evaluator.largest_that_fits(
            lambda batch: self._line(choice, batch), lambda batch: self._peak(choice, batch)
        )

    def bound(self, batch: int) -> float:
        """Upper bound on the tokens per second of a composed plan within the budget; 0.0 where none fits."""
        layered, budget = self.layered(batch), self._budget
        found = None if layered is None or budget is None else layered.fastest(budget)
        if layered is None or found is None:
            return 0.0
        return self._rate(batch, layered, found.choice)

    def fastest(
        self, batch: int, *, above: float = 0.0, below: int | None = None, num_options: int | None = None
    ) -> Candidate | None:
        """The fastest composed plan that fits, not yet verified by a trace; None where none fits.

        None too where it would not process more than `above` tokens per second. `below` limits the bytes of its
        tensors. `num_options` limits the choices for each layer to the first so many uniform plans.
        """
        layered, budget, usable = self.layered(batch), self._budget, self.evaluator.usable
        if layered is None or budget is None or usable is None:
            return None
        budget = budget if below is None else min(budget, below)
        for _ in range(_MOST_SOLUTIONS):
            solved = layered.fastest(budget, num_options=num_options)
            if solved is None or self._rate(batch, layered, solved.choice) <= above:
                return None
            plan = plan_of(self.uniform, layered.layers, solved.choice)
            draft = self._composed(_name(plan), plan, batch, layered, solved.choice)
            if draft.fits:
                return draft
            over = max((draft.peak_bytes - usable) // 2, int(_LEAST_STEP * usable), MIN_BLOCK_BYTES)
            budget = min(budget, solved.peak_bytes) - over
        return None

    @property
    def _budget(self) -> int | None:
        """Usable bytes for tensors, without fragmentation."""
        usable = self.evaluator.usable
        return None if usable is None else usable - self.evaluator.outside_bytes

    def smallest(self, batch: int) -> Candidate | None:
        """The composed plan with the lowest peak, traced; None where none can be."""
        layered = self.layered(batch)
        if layered is None:
            return None
        for num_options in (None, _PLAIN):
            plan = plan_of(self.uniform, layered.layers, layered.smallest(num_options=num_options).choice)
            with suppress(Exception):  # as in `verified`
                return self.evaluator.candidate(_name(plan), plan, batch, traced=True)
        return None

    def verified(self, draft: Candidate) -> Candidate | None:
        """The draft from a trace of its own; where that does not fit, the fastest in a smaller budget, and so on.

        None where none is left, or after `_MOST_TRACES` traces.
        """
        usable = self.evaluator.usable
        assert usable is not None
        found: Candidate | None = draft
        below, num_options = draft.allocated_bytes, None
        for _ in range(_MOST_TRACES):
            if found is None:
                return None
            try:
                traced = self.evaluator.candidate(found.strategy, found.plan, found.batch_size, traced=True)
            except Exception:
                # A single sequence may run other operators than several do, which no policy names.
                if not found.plan.policies:
                    raise
                num_options = _PLAIN
            else:
                if traced.fits:
                    return traced
                # Below the estimate of this plan, or it would be found again.
                below = min(below, found.allocated_bytes) - max(traced.peak_bytes - usable, MIN_BLOCK_BYTES)
            found = self.fastest(draft.batch_size, below=below, num_options=num_options)
        return None

    def _rate(self, batch: int, layered: Layered, choice: Sequence[int]) -> float:
        seconds = self.evaluator.seconds(self.uniform[0], batch) + layered.seconds(choice)
        return batch * self.evaluator.task.seq_len / seconds

    def _composed(self, spec: str, plan: Plan, batch: int, layered: Layered, choice: Sequence[int]) -> Candidate:
        evaluator = self.evaluator
        nbytes, peak = self._peak(choice, batch)
        rate = self._rate(batch, layered, choice)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=nbytes,
            allocated_bytes=peak.memory.allocated_bytes,
            peak_phase=peak.memory.peak_phase,
            fits=evaluator.fits(nbytes),
            step_time_s=batch * evaluator.task.seq_len / rate,
            tokens_per_s=rate,
            source="estimated",
            is_lower_bound=evaluator.is_lower_bound(peak),
        )


def plan_of(uniform: Sequence[Plan], layers: Sequence[int], choice: Sequence[int]) -> Plan:
    """The plan that gives each of these layers the policy of the uniform plan of its number."""
    groups: list[tuple[int, ...]] = []
    policies: list[Policy] = []
    for layer, number in sorted(zip(layers, choice, strict=True)):
        for group, policy in uniform[number].treated():
            if group == (layer,):
                groups.append(group)
                policies.append(policy)
    plain = all(policy == Policy() for policy in policies)
    return Plan(num_layers=uniform[0].num_layers, groups=tuple(groups), policies=() if plain else tuple(policies))


def is_composed(plan: Plan, uniform: Sequence[Plan]) -> bool:
    """Whether a named plan is composed of uniform ones: its layers are fully recomputed one by one, or not at all."""
    return len(uniform) > 1 and plan not in uniform and _is_plain(plan)


def _is_plain(plan: Plan) -> bool:
    return all(len(group) == 1 for group in plan.groups) and not plan.policies and not (plan.compiled or plan.own)


def _name(plan: Plan) -> str:
    """The named strategy that is this plan; else `SEARCHED`."""
    count = plan.layers_checkpointed
    for spec in (OFF, "per-layer", f"first:{count}", f"last:{count}"):
        try:
            if not plan.policies and parse(spec).plan_for(plan.num_layers) == plan:
                return spec
        except ValueError:
            continue
    return SEARCHED
