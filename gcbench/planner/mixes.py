"""How many layers get which policy at a batch size: the problem put together, solved, and verified by a trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace

from gcbench import mix
from gcbench.decision import FOUND, Candidate
from gcbench.mix import Mix, Option, Problem
from gcbench.planner.weighing import Weighing, largest
from gcbench.simulate.pools import MIN_BLOCK_BYTES
from gcbench.simulate.profile import StepProfile
from gcbench.strategies import OFF, Plan, Policy, parse

_MOST_TRIES = 5
"""Times a mix is looked for within a smaller budget, because its real peak was above the one it was chosen by."""


class Mixes:
    """Plans put together from uniform ones, in which every layer is treated alike."""

    def __init__(self, weighing: Weighing, uniform: Sequence[Plan]) -> None:
        """`uniform` begins with nothing recomputed and everything recomputed; then policy by policy."""
        self.weighing = weighing
        self.uniform = tuple(uniform)
        self._problems: dict[int, Problem | None] = {}
        self._order: tuple[int, ...] = ()

    def on(self, weighing: Weighing) -> Mixes:
        """The same plans, weighed for another memory."""
        other = copy(self)
        other.weighing = weighing
        other._problems = dict(self._problems)
        return other

    def problem(self, batch: int) -> Problem | None:
        """Which options there are for which layer, at one batch size; None where layers cannot be told apart."""
        if batch not in self._problems:
            profiles = [self.weighing.profile(plan, batch) for plan in self.uniform]
            known = [each for each in profiles if each is not None]
            self._problems[batch] = _problem(known) if 1 < len(known) == len(profiles) else None
            self._order = known[0].layers if known else ()
        return self._problems[batch]

    def forget(self) -> None:
        """What was put together from figures that hold no longer."""
        self._problems = {}

    def can_compose(self, plan: Plan) -> bool:
        """Whether what a plan takes follows from uniform ones: layers are recomputed plainly or not at all."""
        return len(self.uniform) > 1 and _is_plain(plan)

    def composed(self, spec: str, plan: Plan, batch: int) -> Candidate | None:
        """A plan whose layers are recomputed plainly or not at all, without a trace of its own; None for others."""
        if not self.can_compose(plan) or (problem := self.problem(batch)) is None:
            return None
        choice = self._choice_of(plan)
        return self._candidate(spec, plan, batch, problem, choice, mix.peak(problem, choice))

    def most_composed(self, plan: Plan) -> int | None:
        """The largest batch of such a plan; None where one sequence does not fit."""

        def fits(batch: int) -> bool:
            found = self.composed("", plan, batch)
            return found is not None and found.fits

        return largest(fits) or None

    def fastest(self, batch: int) -> tuple[Candidate, Problem] | None:
        """The fastest mix within the budget, by what it is put together from; None where none fits."""
        problem, weighing = self.problem(batch), self.weighing
        if problem is None or weighing.usable is None:
            return None
        budget = weighing.usable - weighing.beyond_tensors(self.uniform[1], batch)
        solved = mix.solve(replace(problem, budget_bytes=budget))
        return None if solved is None else (self._draft(solved, problem, batch), problem)

    def smallest(self, batch: int) -> Candidate | None:
        """The mix with the lowest peak, traced."""
        problem = self.problem(batch)
        if problem is None:
            return None
        for part in (problem, _plainly(problem)):
            draft = self._draft(mix.smallest(part), part, batch)
            with suppress(Exception):  # as in `settled`
                return self.weighing.candidate(draft.strategy, draft.plan, batch, traced=True)
        return None

    def settled(self, draft: Candidate, problem: Problem) -> Candidate | None:
        """The mix as a trace of it sees it; one that turns out too large is looked for again in a smaller budget."""
        usable = self.weighing.usable
        assert usable is not None
        budget = usable - (draft.peak_bytes - draft.allocated_bytes)
        for _ in range(_MOST_TRIES):
            try:
                verified = self.weighing.candidate(draft.strategy, draft.plan, draft.batch_size, traced=True)
            except Exception:
                # One sequence alone may go through other operators than several: then layers are kept whole or not.
                if not draft.plan.policies:
                    raise
                problem = _plainly(problem)
                solved = mix.solve(replace(problem, budget_bytes=budget))
                if solved is None:
                    return None
                draft = self._draft(solved, problem, draft.batch_size)
                continue
            if verified.fits:
                return verified
            # Below what it was put together as, or the same mix would be found again.
            budget = min(budget, draft.allocated_bytes) - max(verified.peak_bytes - usable, MIN_BLOCK_BYTES)
            solved = mix.solve(replace(problem, budget_bytes=budget))
            if solved is None:
                return None
            draft = self._draft(solved, problem, draft.batch_size)
        return None

    def _draft(self, solved: Mix, problem: Problem, batch: int) -> Candidate:
        plan = self._plan_of(solved.choice)
        return self._candidate(_name(plan), plan, batch, problem, solved.choice, solved.peak_bytes)

    def _candidate(
        self, spec: str, plan: Plan, batch: int, problem: Problem, choice: Sequence[int], peak: int
    ) -> Candidate:
        weighing = self.weighing
        extra = sum(options[number].seconds for options, number in zip(problem.options, choice, strict=True))
        seconds = weighing.seconds(self.uniform[0], batch) + extra
        held = peak + weighing.beyond_tensors(self.uniform[1], batch)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=held,
            allocated_bytes=peak,
            peak_phase=None,
            fits=weighing.fits(held),
            step_time_s=seconds,
            tokens_per_s=batch * weighing.task.seq_len / seconds,
            source="estimated",
        )

    def _choice_of(self, plan: Plan) -> tuple[int, ...]:
        checkpointed = {layer for group in plan.groups for layer in group}
        return tuple(1 if layer in checkpointed else 0 for layer in self._order)

    def _plan_of(self, choice: Sequence[int]) -> Plan:
        """The plan that gives each layer its option."""
        groups: list[tuple[int, ...]] = []
        policies: list[Policy] = []
        for layer, number in sorted(zip(self._order, choice, strict=True)):
            for group, policy in self.uniform[number].treated():
                if group == (layer,):
                    groups.append(group)
                    policies.append(policy)
        plain = all(policy == Policy() for policy in policies)
        return Plan(
            num_layers=self.uniform[0].num_layers, groups=tuple(groups), policies=() if plain else tuple(policies)
        )


def _problem(profiles: Sequence[StepProfile]) -> Problem:
    off, full = profiles[:2]
    options = tuple(
        tuple(
            Option(
                seconds=each.profiles[place].seconds - off.profiles[place].seconds,
                kept_bytes=each.profiles[place].kept_bytes,
                forward_bytes=each.profiles[place].forward_bytes,
                backward_bytes=each.profiles[place].backward_bytes,
            )
            for each in profiles
        )
        for place in range(len(off.layers))
    )
    return Problem(
        options=options,
        gradient_bytes=tuple(layer.gradient_bytes for layer in full.profiles),
        standing_bytes=off.standing_bytes,
        head_bytes=max(each.head_bytes for each in profiles),
        loss_left_bytes=max(each.loss_left_bytes for each in profiles),
        other_peak_bytes=max(each.other_peak_bytes for each in profiles),
        budget_bytes=0,
    )


def _plainly(problem: Problem) -> Problem:
    """Without policies: a layer is recomputed plainly or not at all."""
    return replace(problem, options=tuple(options[:2] for options in problem.options))


def _is_plain(plan: Plan) -> bool:
    """Whether its layers are recomputed one by one, plainly, or not at all."""
    return all(len(group) == 1 for group in plan.groups) and not plan.policies and not plan.compiled


def _name(plan: Plan) -> str:
    """The plain name of a plan that has one."""
    count = plan.layers_checkpointed
    for spec in (OFF, "per-layer", f"first:{count}", f"last:{count}"):
        try:
            if not plan.policies and parse(spec).plan_for(plan.num_layers) == plan:
                return spec
        except ValueError:
            continue
    return FOUND
