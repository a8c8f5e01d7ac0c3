"""How many layers get which policy at a batch size: the problem put together, solved, and verified by a trace."""

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
from gcbench.simulate.allocator.pools import MIN_BLOCK_BYTES
from gcbench.simulate.timeline import Peak, Timeline
from gcbench.simulate.trace.fake_model import NotComposable
from gcbench.strategies import OFF, Plan, Policy, parse

_PLAIN = 2
"""The first two ways to treat a layer: not recomputed, and recomputed plainly."""
_MOST_LOOKS = 12
"""Times a mix is looked for within a smaller budget, because an allocator has to reserve more than its tensors take."""
_MOST_TRACES = 4
"""Mixes at one batch size of which a trace shows that they do not fit after all."""
_LEAST_STEP = 1 / 512
"""Of the budget, by which it is lowered at least."""


class Mixes:
    """Plans put together from uniform ones, in which every layer is treated alike."""

    def __init__(self, evaluator: CandidateEvaluator, uniform: Sequence[Plan]) -> None:
        """`uniform` begins with nothing recomputed and everything recomputed; then policy by policy."""
        self.evaluator = evaluator
        self.uniform = tuple(uniform)
        self._layered: dict[int, Layered | None] = {}
        self._held: dict[tuple[int, tuple[int, ...]], tuple[int, Peak]] = {}

    def on(self, evaluator: CandidateEvaluator) -> Mixes:
        """The same plans, weighed for another memory."""
        other = copy(self)
        other.evaluator = evaluator
        other._layered, other._held = dict(self._layered), {}
        return other

    def forget(self) -> None:
        """What was put together from figures that hold no longer."""
        self._layered = {}

    def layered(self, batch: int) -> Layered | None:
        """Which ways there are to treat which layer, at one batch size; None where layers cannot be told apart."""
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

    def can_compose(self, plan: Plan) -> bool:
        """Whether what a plan takes follows from uniform ones: layers are recomputed plainly or not at all."""
        return len(self.uniform) > 1 and _is_plain(plan)

    def composed(self, spec: str, plan: Plan, batch: int) -> Candidate | None:
        """A plan whose layers are recomputed plainly or not at all, without a trace of its own; None for others."""
        if not self.can_compose(plan) or (layered := self.layered(batch)) is None:
            return None
        return self._candidate(spec, plan, batch, layered, self._plainly(plan, layered.layers))

    @staticmethod
    def _plainly(plan: Plan, layers: Sequence[int]) -> tuple[int, ...]:
        checkpointed = {layer for group in plan.groups for layer in group}
        return tuple(1 if layer in checkpointed else 0 for layer in layers)

    def _line(self, choice: Sequence[int], batch: int) -> Timeline:
        assert self._combiner is not None
        return self._combiner.line(choice, [self.evaluator.scaling(each).line(batch) for each in self.uniform])

    def _weighed(self, choice: Sequence[int], batch: int) -> tuple[int, Peak]:
        key = (batch, tuple(choice))
        if key not in self._held:
            self._held[key] = self.evaluator.weighed(self._line(choice, batch), batch)
        return self._held[key]

    def most_composed(self, plan: Plan) -> int | None:
        """The largest batch of such a plan; None where one sequence does not fit, or nothing is too large."""
        evaluator = self.evaluator
        if evaluator.usable is None or self._combiner is None:
            return evaluator.most(plan)
        choice = self._plainly(plan, self._combiner.layers)
        return evaluator.largest_of(
            lambda batch: evaluator.tensors(self._line(choice, batch)), lambda batch: self._weighed(choice, batch)
        )

    def bound(self, batch: int) -> float:
        """Tokens per second that no mix within the budget goes beyond; 0.0 where none fits."""
        layered, budget = self.layered(batch), self._budget
        found = None if layered is None or budget is None else layered.fastest(budget)
        if layered is None or found is None:
            return 0.0
        return self._rate(batch, layered, found.choice)

    def fastest(
        self, batch: int, *, above: float = 0.0, below: int | None = None, ways: int | None = None
    ) -> Candidate | None:
        """The fastest mix within the budget, by what it is put together from; None where none fits.

        None too where it would not process more than `above` tokens per second. With `below` the tensors of the mix
        take at most so many bytes. `ways` limits those of treating a layer to the first so many.
        """
        layered, budget, usable = self.layered(batch), self._budget, self.evaluator.usable
        if layered is None or budget is None or usable is None:
            return None
        budget = budget if below is None else min(budget, below)
        for _ in range(_MOST_LOOKS):
            solved = layered.fastest(budget, ways=ways)
            if solved is None or self._rate(batch, layered, solved.choice) <= above:
                return None
            plan = plan_of(self.uniform, layered.layers, solved.choice)
            draft = self._candidate(_name(plan), plan, batch, layered, solved.choice)
            if draft.fits:
                return draft
            over = max((draft.peak_bytes - usable) // 2, int(_LEAST_STEP * usable), MIN_BLOCK_BYTES)
            budget = min(budget, solved.peak_bytes) - over
        return None

    @property
    def _budget(self) -> int | None:
        """What tensors may take, were there nothing lost between them."""
        usable = self.evaluator.usable
        return None if usable is None else usable - self.evaluator.outside_bytes

    def smallest(self, batch: int) -> Candidate | None:
        """The mix with the lowest peak, traced."""
        layered = self.layered(batch)
        if layered is None:
            return None
        for ways in (None, _PLAIN):
            plan = plan_of(self.uniform, layered.layers, layered.smallest(ways=ways).choice)
            with suppress(Exception):  # as in `settled`
                return self.evaluator.candidate(_name(plan), plan, batch, traced=True)
        return None

    def settled(self, draft: Candidate) -> Candidate | None:
        """The mix as a trace of it sees it; one that turns out too large is looked for again in a smaller budget."""
        usable = self.evaluator.usable
        assert usable is not None
        found: Candidate | None = draft
        below, ways = draft.allocated_bytes, None
        for _ in range(_MOST_TRACES):
            if found is None:
                return None
            try:
                verified = self.evaluator.candidate(found.strategy, found.plan, found.batch_size, traced=True)
            except Exception:
                # One sequence alone may go through other operators than several: then layers are kept whole or not.
                if not found.plan.policies:
                    raise
                ways = _PLAIN
            else:
                if verified.fits:
                    return verified
                # Below what it was put together as, or the same mix would be found again.
                below = min(below, found.allocated_bytes) - max(verified.peak_bytes - usable, MIN_BLOCK_BYTES)
            found = self.fastest(draft.batch_size, below=below, ways=ways)
        return None

    def _rate(self, batch: int, layered: Layered, choice: Sequence[int]) -> float:
        seconds = self.evaluator.seconds(self.uniform[0], batch) + layered.seconds(choice)
        return batch * self.evaluator.task.seq_len / seconds

    def _candidate(self, spec: str, plan: Plan, batch: int, layered: Layered, choice: Sequence[int]) -> Candidate:
        evaluator = self.evaluator
        held, peak = self._weighed(choice, batch)
        rate = self._rate(batch, layered, choice)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=held,
            allocated_bytes=peak.memory.allocated_bytes,
            peak_phase=peak.memory.peak_phase,
            fits=evaluator.fits(held),
            step_time_s=batch * evaluator.task.seq_len / rate,
            tokens_per_s=rate,
            source="estimated",
            is_lower_bound=evaluator.is_bound(peak),
        )


def plan_of(uniform: Sequence[Plan], layers: Sequence[int], choice: Sequence[int]) -> Plan:
    """The plan that treats each of these layers as the uniform plan of its number does."""
    groups: list[tuple[int, ...]] = []
    policies: list[Policy] = []
    for layer, number in sorted(zip(layers, choice, strict=True)):
        for group, policy in uniform[number].treated():
            if group == (layer,):
                groups.append(group)
                policies.append(policy)
    plain = all(policy == Policy() for policy in policies)
    return Plan(num_layers=uniform[0].num_layers, groups=tuple(groups), policies=() if plain else tuple(policies))


def _is_plain(plan: Plan) -> bool:
    """Whether its layers are recomputed one by one, plainly, or not at all."""
    return all(len(group) == 1 for group in plan.groups) and not plan.policies and not (plan.compiled or plan.own)


def _name(plan: Plan) -> str:
    """The plain name of a plan that has one."""
    count = plan.layers_checkpointed
    for spec in (OFF, "per-layer", f"first:{count}", f"last:{count}"):
        try:
            if not plan.policies and parse(spec).plan_for(plan.num_layers) == plan:
                return spec
        except ValueError:
            continue
    return SEARCHED
