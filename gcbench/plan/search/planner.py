"""The search: trace, evaluate, solve, verify, choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial

from gcbench.calibration.figures import figures_of_card
from gcbench.core.errors import GcbenchError
from gcbench.core.prediction import Addition, Fallback
from gcbench.core.units import format_bytes
from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import (
    Candidate,
    CandidateDetails,
    Decision,
    Largest,
    MemoryLever,
    best_of_each,
    choose,
    nearest_faster,
    ranked,
    why_not_faster,
)
from gcbench.plan.policies.layer_policies import uniform_plans
from gcbench.plan.racing import contenders
from gcbench.plan.search.candidates import CandidateEvaluator
from gcbench.plan.search.levers import Trial, levers
from gcbench.plan.search.mixes import Mixes, is_composed
from gcbench.plan.search.two_cores import on_two_cores
from gcbench.plan.task import Decided, Planning, PlanTask
from gcbench.predict.worker import failure
from gcbench.processes.messages import Answer, Refusal
from gcbench.report.explanation import kind_name
from gcbench.simulate.additions import additions
from gcbench.simulate.costs import Figures
from gcbench.simulate.explain import explain
from gcbench.simulate.predictor import Step
from gcbench.simulate.timeline import Peak
from gcbench.strategies import OFF, Plan

MOST_POLICIES = {"bf16-mixed": 6, "fp16-mixed": 6}
"""By precision, for a kind of layer; else 5. For Llama-3.1-8B one more changes the recomputation left at a budget by at
most 2 % of that of everything. Autocast has a layer keep weights that it cast too, so there is more to choose from."""
_MOST_POLICIES = 5
_WITHOUT_BOUND = (1, 2, 4, 8, 16)
"""Batch sizes without a memory limit."""
_STEPS = 4
"""Number of steps that the progress display counts."""
_SHORTEST = 64
"""Tokens; shorter sequences are not proposed."""


def plan(task: PlanTask, tell: Callable[[Decided | Planning], None]) -> Answer:
    """Run a `PlanTask` in a child process: `tell` gets its progress and decision; errors are the answer."""

    def say(done: int, doing: str) -> None:
        tell(Planning(done=done, total=_STEPS, doing=doing))

    try:
        say(0, "tracing the training step")
        tell(Decided(decision=Planner(task, figures_for(task)).decide(say)))
    except GcbenchError as err:
        return Answer(refusal=Refusal(error=type(err).__name__, message=str(err)))
    except Exception as err:  # modelling code may raise anything
        return Answer(failure=failure(err, task.target))
    return Answer()


def figures_for(task: PlanTask) -> Figures:
    """Operator times of the target: calibrated on this machine, or from the published rates of a card."""
    if task.device_here is None:
        return figures_of_card(task.target.card)
    from gcbench.calibration.calibrate import calibrate_for
    from gcbench.devices import backends

    device = backends.open_device(task.device_here)
    return calibrate_for((), device=device, budget_s=task.calibration_s).by_processor_time(())


class Planner:
    """Plans one model for one device: traces it when made, and chooses in `decide`.

    Attributes:
        mixes: the searched plans, and the evaluator of all plans.
        named: the named strategies that can be traced.
    """

    def __init__(self, task: PlanTask, figures: Figures) -> None:
        self.task = task
        self.notices: list[str] = []
        evaluator = CandidateEvaluator(task, figures)
        uniform = self._uniform(evaluator)
        refused = self._trace(evaluator, uniform)
        self.named = tuple((spec, plan) for spec, plan in task.named if plan not in refused)
        self.mixes = Mixes(evaluator, [plan for plan in uniform if plan not in refused])
        self._calibrated: frozenset[int] = frozenset()
        """Batch sizes whose operator calls were timed."""

    @property
    def evaluator(self) -> CandidateEvaluator:
        """The evaluator of all plans."""
        return self.mixes.evaluator

    def limited(self, memory_bytes: int) -> Planner:
        """The planner for a device with so much memory; nothing is traced again."""
        other = copy(self)
        other.task = replace(self.task, target=replace(self.task.target, memory_bytes=memory_bytes))
        other.mixes = self.mixes.limited(other.task)
        other._calibrated = frozenset()  # each planner has figures of its own
        return other

    def decide(self, say: Callable[[int, str], None] = lambda done, doing: None) -> Decision:
        """Evaluate, solve, verify; `say` gets how many of `_STEPS` are done and what is done now."""
        say(1, "evaluating strategies and batch sizes")
        most = self._most()
        batches = self._batches(most)
        self._calibrate(batches)
        lightest = self.mixes.uniform[min(1, len(self.mixes.uniform) - 1)]
        if not self.task.batch_sizes and self.evaluator.candidate("", lightest, batches[0]).fits:
            self.mixes = self.mixes.exact_up_to(batches[0])
        cells = [(spec, plan, batch) for spec, plan in self.named for batch in batches]
        named = on_two_cores(lambda cell: self.mixes.candidate(*cell), cells)
        say(2, "searching plans")
        drafts = self._drafts(batches)
        with ExitStack() as stack:
            likely = choose([*named, *drafts])
            trial = None if likely is None else stack.enter_context(self._trial(likely))
            candidates = self._shown_in_full([*named, *self._verified_drafts(drafts, choose(named))])
            say(3, "trying other changes that reduce the peak")
            choice = choose(candidates)
            smallest = None if choice is not None else self._smallest(min(batches), candidates)
            shown = choice or smallest
            found = () if shown is None else self._levers(shown, trial)
        rivals = [each for each in contenders(ranked(candidates)) if each != choice] if self.task.is_confirmed else []
        return Decision(
            limit_bytes=self.task.target.memory_bytes,
            usable_bytes=self.evaluator.usable,
            reserve_frac=self.task.reserve_frac,
            choice=choice,
            smallest=smallest,
            candidates=ranked(candidates),
            largest=self._largest(most),
            levers=found,
            longest_seq_len=None if choice is not None else self._longest(min(batches)),
            peak_words=None if shown is None else self._peak_words(shown),
            binding=None if choice is None else why_not_faster(candidates, choice),
            details=tuple(map(self._details, rivals)),
            additions=() if shown is None else self._additions(shown),
            fallback=None if shown is None else self._fallback(shown),
            times_from=self.evaluator.figures.source,
            notices=tuple(self.notices),
            outside_bytes=self.evaluator.outside_bytes,
        )

    # Traces.

    def _uniform(self, evaluator: CandidateEvaluator) -> list[Plan]:
        """The plans with one policy for every layer: nothing checkpointed, everything fully recomputed, policies."""
        fake_model = evaluator.session.predictor.fake_model
        num_layers = len(fake_model.layers)
        layers = self.task.layers_in_order or tuple(range(num_layers))
        off = Plan(num_layers=num_layers)
        if self.task.own is not None:
            return [off, self.task.own]
        if not layers or not self.task.can_checkpoint:
            return [off]
        every = Plan(num_layers=num_layers, groups=tuple((layer,) for layer in sorted(layers)))
        try:
            most = MOST_POLICIES.get(self.task.precision, _MOST_POLICIES)
            found = uniform_plans(fake_model, layers, evaluator.figures, seq_len=self.task.seq_len, most=most)
        except Exception as err:  # a model's own code, or layers that cannot be traced one by one
            self.notices.append(f"Policies within layers were not searched: {err}.")
            return [off, every]
        return [off, every, *(each for each in found if any(policy.keep for policy in each.policies))]

    def _trace(self, evaluator: CandidateEvaluator, uniform: Sequence[Plan]) -> dict[Plan, str]:
        """Trace all plans but composed ones; returns, and reports as a notice, those that cannot be traced and why."""
        others = [plan for _, plan in self.task.named if not is_composed(plan, uniform)]
        refused = evaluator.trace(list(dict.fromkeys([*uniform, *others])))
        if not refused:
            return refused
        left_out = [f"{spec} ({refused[plan]})" for spec, plan in self.task.named if plan in refused]
        policies = [why for plan, why in refused.items() if plan in uniform[2:]]
        if policies:
            number = "1 searched policy" if len(policies) == 1 else f"{len(policies)} searched policies"
            left_out.append(f"{number} ({policies[0]})")
        self.notices.append(f"Left out because they cannot be traced: {', '.join(left_out)}.")
        return refused

    def _calibrate(self, batches: Sequence[int]) -> None:
        """On this machine's device, time the operator calls of the steps that were not timed yet."""
        if self.task.device_here is None or set(batches) <= self._calibrated:
            return
        from gcbench.calibration.calibrate import calibrate_for
        from gcbench.devices import backends

        self._calibrated |= set(batches)
        device = backends.open_device(self.task.device_here)
        plans = (
            *self.mixes.uniform[:2],
            *(plan for _, plan in self.named if not is_composed(plan, self.mixes.uniform)),
        )
        works = [
            work for plan in dict.fromkeys(plans) for batch in batches for work in self.evaluator.calls(plan, batch)
        ]
        figures = calibrate_for(works, device=device, budget_s=self.task.calibration_s)
        self.mixes = self.mixes.with_figures(figures.by_processor_time(works))

    # Batch sizes.

    def _most(self) -> dict[Plan, int | None]:
        """The largest batch of each plan; empty without a memory limit."""
        if self.evaluator.usable is None:
            return {}
        plans = list(dict.fromkeys([*self.mixes.uniform[:2], *(plan for _, plan in self.named)]))
        return dict(zip(plans, on_two_cores(self.mixes.largest_batch, plans), strict=True))

    def _batches(self, most: Mapping[Plan, int | None]) -> tuple[int, ...]:
        """The requested batch sizes, or 1, 2, 3, 4, 6, 8, 12, … up to the largest at which anything fits."""
        if self.task.batch_sizes:
            return self.task.batch_sizes
        if self.evaluator.usable is None:
            return _WITHOUT_BOUND
        tops = [top for plan in self.mixes.uniform[:2] if (top := most[plan])]
        ladder = [step for power in range(21) for step in (2**power, 3 * 2**power) if step <= max(tops, default=1)]
        return tuple(sorted({1, *ladder, *tops}))

    def _largest(self, most: Mapping[Plan, int | None]) -> tuple[Largest, ...]:
        if not most:
            return ()
        named = [Largest(strategy=spec, batch_size=most[plan]) for spec, plan in self.named]
        if len(self.mixes.uniform) > 1 and self.task.own is None:
            # No searched plan saves less than every layer's input.
            tops = [top for plan in self.mixes.uniform[:2] if (top := most[plan])]
            named.append(Largest(strategy=SEARCHED, batch_size=max(tops, default=None)))
        return tuple(named)

    # Searched plans.

    def _drafts(self, batches: Sequence[int]) -> list[Candidate]:
        """The fastest composed plan of each batch size at which `off` does not fit, the fastest of all first."""
        off = self.mixes.uniform[0]
        tight = [batch for batch in batches if not self.evaluator.candidate(OFF, off, batch).fits]
        bounds = dict(zip(tight, on_two_cores(self.mixes.bound, tight), strict=True))
        order = sorted((batch for batch in tight if bounds[batch] > 0), key=lambda batch: -bounds[batch])
        drafts: list[Candidate] = []
        bar = 0.0
        for pair in (order[place : place + 2] for place in range(0, len(order), 2)):
            promising = [batch for batch in pair if bounds[batch] > bar]
            for draft in on_two_cores(partial(self.mixes.fastest, above=bar), promising):
                if draft is not None and draft.tokens_per_s > bar:
                    drafts.append(draft)
                    bar = draft.tokens_per_s
        return drafts[::-1]

    def _verified_drafts(self, drafts: Sequence[Candidate], best: Candidate | None) -> list[Candidate]:
        """Those of the drafts that could be chosen, each from a trace of its own."""
        bar = best.tokens_per_s if best is not None else 0.0
        found: list[Candidate] = []
        for draft in drafts:
            if found and draft.tokens_per_s < bar:
                break  # it would not be chosen
            verified = self.mixes.verified(draft)
            if verified is not None:
                found.append(verified)
                bar = max(bar, verified.tokens_per_s)
        return found

    def _verified(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with the choice among them traced, repeated until the choice is a traced one."""
        checked = list(candidates)
        while (choice := choose(checked)) is not None and choice.source == "estimated":
            traced = self.evaluator.candidate(choice.strategy, choice.plan, choice.batch_size, traced=True)
            checked[checked.index(choice)] = traced
        return checked

    def _shown_in_full(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with the choice verified, and with exact peaks where a table or a sentence shows them."""
        known = list(candidates)
        while True:
            known = self._verified(known)
            choice = choose(known)
            shown = best_of_each(known, choice)
            if choice is not None and (nearest := nearest_faster(known, choice)) is not None:
                shown.append(nearest)
            todo = [each for each in dict.fromkeys(shown) if each.is_lower_bound or each.source == "estimated"]
            if not todo:
                return known
            for each, now in zip(todo, on_two_cores(self._in_full, todo), strict=True):
                known[known.index(each)] = now

    def _in_full(self, candidate: Candidate) -> Candidate:
        """The candidate with the peak that `gcbench predict` would report."""
        estimated = candidate.source == "estimated"
        return self.evaluator.candidate(
            candidate.strategy, candidate.plan, candidate.batch_size, traced=estimated, in_full=True
        )

    def _smallest(self, batch: int, candidates: Sequence[Candidate]) -> Candidate | None:
        """The candidate with the lowest peak at a batch size."""
        of_batch = [candidate for candidate in candidates if candidate.batch_size == batch]
        lowest = self.mixes.smallest(batch)
        return min([*of_batch, *([lowest] if lowest else [])], key=lambda each: each.peak_bytes, default=None)

    def _longest(self, batch: int) -> int | None:
        """The longest of the halved sequence lengths at which a batch fits with everything recomputed."""
        plan = self.mixes.uniform[min(1, len(self.mixes.uniform) - 1)]
        evaluator = self.evaluator

        def fits(seq_len: int) -> bool:
            step = evaluator.session.predictor.step(plan, batch_size=batch, seq_len=seq_len)
            return evaluator.fits(evaluator.session.weighed(step.timeline)[0])

        halved = [self.task.seq_len >> times for times in range(1, 20) if self.task.seq_len >> times >= _SHORTEST]
        return next(filter(fits, halved), None) if halved and fits(halved[-1]) else None

    # Details of a candidate.

    def _trial(self, candidate: Candidate) -> Trial:
        return Trial(self.task, candidate)

    def _levers(self, candidate: Candidate, trial: Trial | None) -> tuple[MemoryLever, ...]:
        """What else would reduce its peak; `trial` is used if it is that of this candidate."""
        evaluator = self.evaluator
        step = evaluator.scaling(candidate.plan).traced(candidate.batch_size)
        if trial is None or trial.of != (candidate.plan, candidate.batch_size):
            with self._trial(candidate) as own:
                return self._levers(candidate, own)
        return levers(self.task, evaluator.session, candidate, step, trial, usable=evaluator.usable)

    def _traced(self, candidate: Candidate) -> tuple[Step, Peak]:
        """Its step from a trace of this very batch size, and the step's peak."""
        _, peak = self.evaluator.peak(candidate.plan, candidate.batch_size, traced=True)
        return self.evaluator.scaling(candidate.plan).traced(candidate.batch_size), peak

    def _peak_words(self, candidate: Candidate) -> str:
        step, peak = self._traced(candidate)
        explained = explain(step.assembly, peak, ())
        shares = ", ".join(f"{kind_name(share.kind)} {format_bytes(share.nbytes)}" for share in explained.shares[:3])
        return f"{peak.memory.peak_phase} phase ({explained.part}), of {shares}"

    def _additions(self, candidate: Candidate) -> tuple[Addition, ...]:
        step, peak = self._traced(candidate)
        return additions(step, self.evaluator.session.weighed, peak)

    def _fallback(self, candidate: Candidate) -> Fallback | None:
        step, peak = self._traced(candidate)
        return self.evaluator.session.fallback(step, peak)

    def _details(self, candidate: Candidate) -> CandidateDetails:
        return CandidateDetails(
            of=candidate,
            peak_words=self._peak_words(candidate),
            levers=self._levers(candidate, None),
            additions=self._additions(candidate),
            fallback=self._fallback(candidate),
        )
