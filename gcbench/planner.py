"""The search for the fastest setting that fits: named strategies and found plans, at every batch size that may pay.

It runs in a child process. Memory comes from the predictor, time from the figures of the operators that it traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from gcbench import mix
from gcbench.costs import CardFigures, Figures
from gcbench.decision import FOUND, Candidate, Decision, Gain, Largest, choose, ranked
from gcbench.errors import GcbenchError
from gcbench.mix import Mix, Option, Problem
from gcbench.planner_gains import gains
from gcbench.simulate import timeline
from gcbench.simulate.child import Session, failure
from gcbench.simulate.explain import explain
from gcbench.simulate.layer_policies import uniform_plans
from gcbench.simulate.parallel import in_halves
from gcbench.simulate.pools import MIN_BLOCK_BYTES
from gcbench.simulate.predictor import Step
from gcbench.simulate.profile import StepProfile, profile
from gcbench.simulate.scaling import TRACED, Scaling
from gcbench.strategies import OFF, Plan, parse
from gcbench.tasks import Answer, Decided, PlanTask, Refusal

MOST_POLICIES = 8
"""For a kind of layer; more would move the frontier by less than the figures are good for."""
_MOST_BATCH = 2**20
_MOST_TRIES = 5
"""Times a mix is looked for within a smaller budget, because its real peak was above the one it was chosen by."""
_SHORTEST = 64
"""Tokens; a shorter sequence is no remedy."""
_LAYER_COUNTS = ("every:", "first:", "last:")


def plan(task: PlanTask, tell: Callable[[Decided], None]) -> Answer:
    """Decide and tell; what cannot be decided is a refusal or a failure."""
    try:
        tell(Decided(decision=Planner(task, _figures(task)).decide()))
    except GcbenchError as err:
        return Answer(refusal=Refusal(error=type(err).__name__, message=str(err)))
    except Exception as err:  # modelling code may raise anything
        return Answer(failure=failure(err))
    return Answer()


def _figures(task: PlanTask) -> Figures:
    return CardFigures(task.target.card)


class Planner:
    """One model on one device; `decide` is the whole of it."""

    def __init__(self, task: PlanTask, figures: Figures) -> None:
        self.task = task
        self.figures = figures
        self.session = Session(task.as_predictions())
        self.is_cuda = task.target.kind == "cuda"
        self.limit = task.target.memory_bytes
        self.usable = None if self.limit is None else int(self.limit * (1 - task.reserve_frac))
        self._scalings: dict[Plan, Scaling] = {}
        self._profiles: dict[tuple[Plan, int], StepProfile | None] = {}
        self._peaks: dict[tuple[Plan, int, bool], tuple[int, int, timeline.Peak]] = {}
        self._uniform: list[Plan] = []
        """Every layer treated alike: nothing recomputed, everything recomputed, then policy by policy."""
        self.notices: list[str] = []

    def decide(self) -> Decision:
        """Trace, weigh, solve, verify."""
        self._trace()
        batches = self._batches()
        named = [self._candidate(spec, plan, batch) for spec, plan in self.task.named for batch in batches]
        found = self._mixes(batches, choose(named))
        candidates = self._verified([*named, *found])
        choice = choose(candidates)
        smallest = None if choice is not None else self._smallest(batches, candidates)
        shown = choice or smallest
        return Decision(
            limit_bytes=self.limit,
            usable_bytes=self.usable,
            reserve_frac=self.task.reserve_frac,
            choice=choice,
            smallest=smallest,
            candidates=ranked(candidates),
            largest=tuple(self._largest(spec, plan) for spec, plan in self.task.named) + self._largest_found(),
            gains=() if shown is None else self._gains(shown),
            longest_seq_len=None if choice is not None else self._longest(batches),
            peak_words=None if shown is None else self._peak_words(shown),
            binding=self._binding(candidates, choice),
            times_from=self.figures.source,
            notices=tuple(self.notices),
        )

    # Steps and what they take.

    def _trace(self) -> None:
        """Every plan that all else is computed from, on two cores."""
        num_layers = self.session.predictor.stage.num_layers
        layers = self.task.layers_in_order or tuple(range(num_layers))
        every = Plan(num_layers=num_layers, groups=tuple((layer,) for layer in sorted(layers)))
        self._uniform = [Plan(num_layers=num_layers)]
        if layers and self.task.can_checkpoint:
            self._uniform += [every, *self._policies(layers)]
        wanted = [*self._uniform, *(plan for spec, plan in self.task.named if not self._is_composed(spec, plan))]
        plans = list(dict.fromkeys(wanted))
        predictor, seq_len = self.session.predictor, self.task.seq_len

        def steps(plan: Plan) -> dict[int, Step]:
            return {batch: predictor.step(plan, batch_size=batch, seq_len=seq_len) for batch in TRACED}

        for plan, known in zip(plans, in_halves(steps, plans), strict=True):
            self._scalings[plan] = Scaling(predictor, plan, seq_len=seq_len, known=known)

    def _policies(self, layers: Sequence[int]) -> list[Plan]:
        try:
            stage = self.session.predictor.stage
            found = uniform_plans(stage, layers, self.figures, seq_len=self.task.seq_len, most=MOST_POLICIES)
        except Exception as err:  # a model's own code, or layers that cannot be looked into
            self.notices.append(
                f"Policies inside of layers were not looked for, since its layers cannot be looked into ({err})."
            )
            return []
        return [plan for plan in found if plan.policies and any(policy.keep for policy in plan.policies)]

    def _is_composed(self, spec: str, plan: Plan) -> bool:
        """Whether its layers are all recomputed plainly or not at all, so that two traces tell what it takes."""
        plain = all(len(group) == 1 for group in plan.groups) and not plan.policies and not plan.compiled
        return plain and spec.startswith(_LAYER_COUNTS) and plan not in self._uniform

    def _scaling(self, plan: Plan) -> Scaling:
        if plan not in self._scalings:
            self._scalings[plan] = Scaling(self.session.predictor, plan, seq_len=self.task.seq_len)
        return self._scalings[plan]

    def _held(self, plan: Plan, batch: int, *, traced: bool = False) -> tuple[int, int, timeline.Peak]:
        """(bytes that count against the device's memory, bytes of tensors, the peak) of a step."""
        key = (plan, batch, traced)
        if key not in self._peaks:
            scaling = self._scaling(plan)
            step = scaling.traced(batch) if traced else scaling.step(batch)
            peak = self.session.peak(step.timeline)
            held = peak.memory.process_bytes if self.is_cuda else peak.memory.allocated_bytes
            self._peaks[key] = (held or 0, peak.memory.allocated_bytes, peak)
        return self._peaks[key]

    def _counted(self, line: timeline.Timeline, session: Session) -> int:
        """Bytes that count against the device's memory, of any step in any session."""
        memory = session.peak(line).memory
        return (memory.process_bytes or 0) if self.is_cuda else memory.allocated_bytes

    def _fits(self, held: int) -> bool:
        return self.usable is None or held <= self.usable

    def _candidate(self, spec: str, plan: Plan, batch: int, *, traced: bool = False) -> Candidate:
        problem = None if traced or not self._is_composed(spec, plan) else self._problem(batch)
        if problem is not None:
            choice = self._choice_of(plan)
            return self._of_mix(spec, plan, batch, problem, choice, mix.peak(problem, choice))
        scaling = self._scaling(plan)
        step = scaling.traced(batch) if traced else scaling.step(batch)
        held, allocated, peak = self._held(plan, batch, traced=traced)
        seconds = step.seconds(self.figures)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=held,
            allocated_bytes=allocated,
            peak_phase=peak.memory.peak_phase,
            fits=self._fits(held),
            step_time_s=seconds,
            tokens_per_s=batch * self.task.seq_len / seconds,
            source="predicted" if traced or scaling.is_exact(batch) else "estimated",
        )

    # Batch sizes.

    def _batches(self) -> tuple[int, ...]:
        """Those asked for, or powers of two and their halves between up to the largest at which anything fits."""
        if self.task.batch_sizes:
            return self.task.batch_sizes
        if self.usable is None:
            return (1, 2, 4, 8, 16)
        most = max(self._most(plan) or 1 for plan in self._uniform)
        ladder = [step for power in range(21) for step in (2**power, 3 * 2**power) if step <= most]
        tops = [top for plan in self._uniform[:2] if (top := self._most(plan))]
        return tuple(sorted({1, *ladder, *tops}))

    def _most(self, plan: Plan) -> int | None:
        """The largest batch at which a plan fits; None where one sequence does not."""
        scaling = self._scaling(plan)

        def fits(batch: int) -> bool:
            return self._fits(self._held(plan, batch)[0])

        if not scaling.is_affine:
            return next((batch for batch in (8, 4, 2, 1) if fits(batch)), None)
        # Tensors alone are quick to add up, and tell where to ask the allocator.
        guess = self._most_tensors(scaling)
        low, high = max(guess - 1, 0), guess + 1
        while low > 0 and not fits(low):
            low, high = low // 2, low
        while high <= _MOST_BATCH and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low or None

    def _most_tensors(self, scaling: Scaling) -> int:
        """The largest batch of which the tensors alone would fit, less what the allocator held beyond them at one."""
        assert self.usable is not None
        held, allocated, _ = self._held(scaling.plan, 1)
        room = self.usable - (held - allocated)
        low, high = 0, 1
        while high <= _MOST_BATCH and self._tensors(scaling, high) <= room:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._tensors(scaling, middle) <= room else (low, middle)
        return low

    @staticmethod
    def _tensors(scaling: Scaling, batch: int) -> int:
        return timeline.exact(scaling.step(batch).timeline).memory.allocated_bytes

    def _largest(self, spec: str, plan: Plan) -> Largest:
        if self.usable is None:
            return Largest(strategy=spec, batch_size=None)
        return Largest(strategy=spec, batch_size=self._most(plan))

    def _largest_found(self) -> tuple[Largest, ...]:
        if self.usable is None or len(self._uniform) < 3:
            return ()
        tops = [top for plan in self._uniform if (top := self._most(plan))]
        return (Largest(strategy=FOUND, batch_size=max(tops, default=None)),)

    # Mixes.

    def _problem(self, batch: int) -> Problem | None:
        """Which option for which layer, at one batch size; None where layers cannot be told apart."""
        profiles = [self._profile(plan, batch) for plan in self._uniform]
        known = [each for each in profiles if each is not None]
        if len(known) < 2 or len(known) < len(profiles):
            return None
        off = known[0]
        options = tuple(
            tuple(
                Option(
                    seconds=each.profiles[place].seconds - off.profiles[place].seconds,
                    kept_bytes=each.profiles[place].kept_bytes,
                    forward_bytes=each.profiles[place].forward_bytes,
                    backward_bytes=each.profiles[place].backward_bytes,
                )
                for each in known
            )
            for place in range(len(off.layers))
        )
        return Problem(
            options=options,
            gradient_bytes=tuple(layer.gradient_bytes for layer in known[1].profiles),
            standing_bytes=off.standing_bytes,
            head_bytes=max(each.head_bytes for each in known),
            loss_left_bytes=max(each.loss_left_bytes for each in known),
            other_peak_bytes=max(each.other_peak_bytes for each in known),
            budget_bytes=0,
        )

    def _profile(self, plan: Plan, batch: int) -> StepProfile | None:
        key = (plan, batch)
        if key not in self._profiles:
            rounding = MIN_BLOCK_BYTES if self.is_cuda else 1
            step = self._scaling(plan).step(batch)
            self._profiles[key] = profile(step, self.figures, rounding=rounding)
        return self._profiles[key]

    def _choice_of(self, plan: Plan) -> tuple[int, ...]:
        """A plan of layers that are recomputed plainly or not at all, as options of the problem."""
        checkpointed = {layer for group in plan.groups for layer in group}
        order = self._profiles_layers()
        return tuple(1 if layer in checkpointed else 0 for layer in order)

    def _profiles_layers(self) -> tuple[int, ...]:
        some = next(each for each in self._profiles.values() if each is not None)
        return some.layers

    def _of_mix(
        self, spec: str, plan: Plan, batch: int, problem: Problem, choice: Sequence[int], peak: int
    ) -> Candidate:
        """What a mix takes, put together from steps in which all layers are alike."""
        extra = sum(options[number].seconds for options, number in zip(problem.options, choice, strict=True))
        seconds = self._scaling(self._uniform[0]).seconds(batch, self.figures) + extra
        held = peak + (self._outside(batch) if self.is_cuda else 0)
        return Candidate(
            strategy=spec,
            plan=plan,
            batch_size=batch,
            peak_bytes=held,
            allocated_bytes=peak,
            peak_phase=None,
            fits=self._fits(held),
            step_time_s=seconds,
            tokens_per_s=batch * self.task.seq_len / seconds,
            source="estimated",
        )

    def _outside(self, batch: int) -> int:
        """What a process holds besides tensors: the context, and what the allocator has cached."""
        held, allocated, _ = self._held(self._uniform[1], batch)
        return held - allocated

    def _mixes(self, batches: Iterable[int], best: Candidate | None) -> list[Candidate]:
        """The fastest mix for each batch size at which nothing recomputed does not fit, verified by a trace."""
        found: list[Candidate] = []
        if self.usable is None or len(self._uniform) < 2:
            return found
        drafts: list[tuple[Candidate, Problem]] = []
        for batch in batches:
            if self._candidate(OFF, self._uniform[0], batch).fits:
                continue  # nothing is faster than that at this batch size
            problem = self._problem(batch)
            if problem is None:
                return found
            budget = self.usable - (self._outside(batch) if self.is_cuda else 0)
            solved = mix.solve(replace(problem, budget_bytes=budget))
            if solved is not None:
                drafts.append((self._draft(solved, problem, batch), problem))
        drafts.sort(key=lambda pair: -pair[0].tokens_per_s)
        bar = best.tokens_per_s if best is not None else 0.0
        for draft, problem in drafts:
            if found and draft.tokens_per_s < bar:
                break  # it would not be chosen
            verified = self._settled(draft, problem)
            if verified is not None:
                found.append(verified)
                bar = max(bar, verified.tokens_per_s)
        return found

    def _draft(self, solved: Mix, problem: Problem, batch: int) -> Candidate:
        plan = self._plan_of(solved.choice)
        return self._of_mix(self._name(plan), plan, batch, problem, solved.choice, solved.peak_bytes)

    def _settled(self, draft: Candidate, problem: Problem) -> Candidate | None:
        """The mix as a trace of it sees it; one that turns out too large is looked for again in a smaller budget."""
        assert self.usable is not None
        budget = self.usable - (draft.peak_bytes - draft.allocated_bytes)
        for _ in range(_MOST_TRIES):
            verified = self._candidate(draft.strategy, draft.plan, draft.batch_size, traced=True)
            if verified.fits:
                return verified
            budget -= max(verified.peak_bytes - self.usable, MIN_BLOCK_BYTES)
            solved = mix.solve(replace(problem, budget_bytes=budget))
            if solved is None:
                return None
            draft = self._draft(solved, problem, draft.batch_size)
        return None

    def _plan_of(self, choice: Sequence[int]) -> Plan:
        """The plan that gives each layer its option."""
        groups, policies = [], []
        order = self._profiles_layers()
        for layer, number in sorted(zip(order, choice, strict=True)):
            for group, policy in self._uniform[number].treated():
                if group == (layer,):
                    groups.append(group)
                    policies.append(policy)
        plain = all(policy == type(policy)() for policy in policies)
        num_layers = self._uniform[0].num_layers
        return Plan(num_layers=num_layers, groups=tuple(groups), policies=() if plain else tuple(policies))

    def _name(self, plan: Plan) -> str:
        """The plain name of a plan that has one."""
        count = plan.layers_checkpointed
        for spec in (OFF, "per-layer", f"first:{count}", f"last:{count}"):
            try:
                if not plan.policies and parse(spec).plan_for(plan.num_layers) == plan:
                    return spec
            except ValueError:
                continue
        return FOUND

    # The decision.

    def _verified(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, with the one that would be chosen traced as it is, and so on until that one stands."""
        checked = list(candidates)
        while (choice := choose(checked)) is not None and choice.source == "estimated":
            place = checked.index(choice)
            checked[place] = self._candidate(choice.strategy, choice.plan, choice.batch_size, traced=True)
        return checked

    def _smallest(self, batches: Sequence[int], candidates: Sequence[Candidate]) -> Candidate | None:
        """The lowest peak that can be reached at the smallest batch."""
        batch = min(batches)
        of_batch = [candidate for candidate in candidates if candidate.batch_size == batch]
        problem = self._problem(batch) if len(self._uniform) > 1 else None
        if problem is not None:
            lowest = self._draft(mix.smallest(problem), problem, batch)
            of_batch.append(self._candidate(lowest.strategy, lowest.plan, batch, traced=True))
        return min(of_batch, key=lambda candidate: candidate.peak_bytes, default=None)

    def _gains(self, candidate: Candidate) -> tuple[Gain, ...]:
        step = self._scaling(candidate.plan).traced(candidate.batch_size)
        return gains(self.task, self.session, candidate, step, held=self._counted, usable=self.usable)

    def _longest(self, batches: Sequence[int]) -> int | None:
        """The longest of the halved lengths at which the smallest batch fits with everything recomputed."""
        plan = self._uniform[min(1, len(self._uniform) - 1)]

        def fits(seq_len: int) -> bool:
            step = self.session.predictor.step(plan, batch_size=min(batches), seq_len=seq_len)
            return self._fits(self._counted(step.timeline, self.session))

        halved = [self.task.seq_len >> times for times in range(1, 20) if self.task.seq_len >> times >= _SHORTEST]
        return next(filter(fits, halved), None) if halved and fits(halved[-1]) else None

    def _peak_words(self, candidate: Candidate) -> str:
        step = self._scaling(candidate.plan).traced(candidate.batch_size)
        _, _, peak = self._held(candidate.plan, candidate.batch_size, traced=True)
        told = explain(step.assembly, peak, ())
        from gcbench.units import format_bytes

        shares = ", ".join(f"{share.kind} {format_bytes(share.nbytes)}" for share in told.shares[:3])
        return f"{peak.memory.peak_phase} phase, {told.part}: {shares}"

    def _binding(self, candidates: Sequence[Candidate], choice: Candidate | None) -> str | None:
        if choice is None:
            return None
        off = [candidate for candidate in candidates if candidate.strategy == OFF]
        fastest = max(off, key=lambda candidate: candidate.tokens_per_s, default=None)
        if choice.strategy == OFF and (fastest is None or fastest.tokens_per_s <= choice.tokens_per_s * 1.005):
            return "Memory does not bind: a larger batch would not be faster."
        return "Memory binds."
