"""The decision against all possible choices, on a toy model that is quick to trace."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import planned
import pytest
import torch
import toys
from timed_calls import calibration_of, pointwise

from gcbench.calibration import calibrate as calibration
from gcbench.devices.target import Target
from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import AS_FAST_FRAC
from gcbench.plan.estimate.mixed_layers import Combiner
from gcbench.plan.layer_mix.layered import Layered
from gcbench.plan.racing import contenders
from gcbench.plan.search import planner as search
from gcbench.plan.search.planner import Planner
from gcbench.plan.task import PlanTask
from gcbench.predict.worker import Session
from gcbench.simulate import timeline
from gcbench.simulate.predictor import Predictor
from gcbench.strategies import OFF, Plan, Policy, parse

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SEQ_LEN = 16
FIGURES = planned.Traffic()
SPECS = (OFF, "per-layer", "every:2", "selective:matmul")
LAYER_INPUT_BYTES = SEQ_LEN * toys.WIDTH * 4
"""Of one sequence."""


def task(memory_bytes=None, *, layers=4, specs=SPECS, **changes):
    return PlanTask(
        **{
            "source": planned.source_of("llama"),
            "layers": None,
            "overrides": {},
            "attn_implementation": None,
            "lora": None,
            "precision": "fp32",
            "optim": "sgd",
            "target": Target(kind="cpu", name="cpu", memory_bytes=memory_bytes),
            "seq_len": SEQ_LEN,
            "named": tuple((spec, parse(spec).plan_for(layers)) for spec in specs),
            "batch_sizes": None,
            "reserve_frac": 0.0,
            "layers_in_order": None,
            "can_checkpoint": True,
            "device_here": None,
        }
        | changes
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few policies, and no levers, which have a test file of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_MOST_POLICIES", 3)
        patch.setattr(search, "levers", lambda *args, **kwargs: ())
        yield


def predicting(patch, make):
    """Have every session predict for the model that `make` makes."""

    def predictor(session, optim):
        with torch.device("meta"):
            model = make()
        return Predictor(
            model, precision="fp32", optim=optim, trace_mode=session.device_model.trace_mode, exact=session.task.exact
        )

    patch.setattr(Session, "_predictor", predictor)


@pytest.fixture
def toy(monkeypatch):
    return lambda make: predicting(monkeypatch, make)


@pytest.fixture(scope="module")
def planner():
    """`planner(memory_bytes)` for a toy of four layers; what it traces serves all tests."""
    with pytest.MonkeyPatch.context() as patch:
        predicting(patch, four_layers)
        first = Planner(task(10**9), FIGURES)
    return first.limited


@cache
def exact_predictor(model):
    return toys.predictor(model, exact=True)


def four_layers():
    return toys.Toy("aaaa")


def exact_peak(plan, batch_size, *, model=four_layers, seq_len=SEQ_LEN):
    """The peak by a full trace, independent of the planner."""
    step = exact_predictor(model).step(plan, batch_size=batch_size, seq_len=seq_len)
    return timeline.exact(step.timeline).memory.allocated_bytes


def content(decision):
    choice = decision.choice
    return (choice.strategy, choice.plan, choice.batch_size, choice.peak_bytes, decision.largest)


# What is chosen


@pytest.mark.parametrize("memory_bytes", [80_000, 130_000, 1_000_000])
def test_the_choice_fits_and_nothing_that_fits_is_faster(planner, memory_bytes):
    """The traps: a composed plan whose traced peak is larger than its estimate; a strategy that is faster at a batch
    size of its own."""
    one = planner(memory_bytes)
    decision = one.decide()
    choice = decision.choice
    assert choice is not None and choice.fits and decision.smallest is None
    assert choice.source == "predicted"
    assert choice.peak_bytes == exact_peak(choice.plan, choice.batch_size) <= decision.usable_bytes == memory_bytes
    fitting = [each for each in decision.candidates if each.fits]
    assert {spec for spec, _ in one.named} <= {each.strategy for each in decision.candidates}
    assert max(each.tokens_per_s for each in fitting) * (1 - AS_FAST_FRAC) <= choice.tokens_per_s
    largest = {each.strategy: each.batch_size for each in decision.largest}
    for spec, plan in one.named:
        for batch in {1, largest[spec] // 2, largest[spec]} - {0}:
            rival = one.evaluator.candidate(spec, plan, batch)
            assert rival.tokens_per_s * (1 - AS_FAST_FRAC) <= choice.tokens_per_s, rival


def test_more_memory_is_never_slower(planner):
    speeds = [planner(memory).decide().choice.tokens_per_s for memory in range(70_000, 400_000, 80_000)]
    for less, more in itertools.pairwise(speeds):
        assert more >= less * (1 - AS_FAST_FRAC)
    assert speeds[-1] > 1.02 * speeds[0]


def test_no_combination_of_the_policies_is_better(toy):
    """Every combination of the policies at one batch size, each traced: of those that fit with the headroom of one
    layer input, by which a composed peak may be off, none is faster than the choice."""
    toy(lambda: toys.Toy("aaa"))
    batch = 4
    first = Planner(task(10**9, layers=3, specs=(OFF, "per-layer"), batch_sizes=(batch,)), FIGURES)
    uniform = first.mixes.uniform
    assert len(uniform) == 4, "neither too little to choose from nor too much to try"
    every = []
    for choice in itertools.product(range(len(uniform)), repeat=3):
        pairs = [
            pair for layer, number in enumerate(choice) for pair in uniform[number].treated() if pair[0] == (layer,)
        ]
        plan = Plan(num_layers=3, groups=tuple(group for group, _ in pairs), policies=tuple(each for _, each in pairs))
        every.append(first.evaluator.candidate("mix", plan, batch, traced=True))
    lowest, highest = (pick(each.peak_bytes for each in every) for pick in (min, max))
    slack = batch * LAYER_INPUT_BYTES
    found = set()
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        memory = int(lowest + slack + share * (highest - lowest))
        choice = first.limited(memory).decide().choice
        assert choice.peak_bytes <= memory
        best = max(each.tokens_per_s for each in every if each.peak_bytes <= memory - slack)
        assert choice.tokens_per_s >= best * (1 - AS_FAST_FRAC), share
        found.add((choice.strategy, choice.plan))
    assert len(found) >= 4 and any(strategy == SEARCHED for strategy, _ in found)


@pytest.mark.parametrize("hidden_bytes", [3_000, 10_000])
def test_a_composed_plan_that_does_not_fit_is_replaced_by_a_smaller_one(toy, monkeypatch, hidden_bytes):
    """The trap: composed peaks are too low, and the step itself is never traced."""
    put_together = Combiner.line

    def short(self, choice, lines):
        line = put_together(self, choice, lines)
        nbytes = line.nbytes.copy()
        nbytes[int(nbytes[:10].argmax())] -= hidden_bytes  # a block that stays allocated
        return replace(line, nbytes=nbytes)

    toy(four_layers)
    peaks = [exact_peak(parse(spec).plan_for(4), 8) for spec in (OFF, "per-layer")]
    memory = sum(peaks) // 2
    one = Planner(task(memory, specs=(OFF,), batch_sizes=(8,)), FIGURES)
    monkeypatch.setattr(Combiner, "line", short)
    layered = one.mixes.layered(8)
    monkeypatch.setattr(layered, "peak", lambda choice: Layered.peak(layered, choice) - hidden_bytes)
    monkeypatch.setattr(
        layered,
        "problem",
        lambda guess, num_options=None: replace(
            (problem := Layered.problem(layered, guess, num_options=num_options)),
            standing_bytes=problem.standing_bytes - hidden_bytes,
        ),
    )
    draft = one.mixes.fastest(8)
    assert draft.fits and exact_peak(draft.plan, 8) > memory
    verified = one.mixes.verified(draft)
    assert verified.fits and verified.peak_bytes == exact_peak(verified.plan, 8) <= memory
    choice = one.decide().choice
    assert choice.source == "predicted" and exact_peak(choice.plan, 8) <= memory


def test_a_named_strategy_is_its_plan(planner):
    """The trap: a composed plan named per-layer, which the user then runs."""
    for each in planner(130_000).decide().candidates:
        if each.strategy != SEARCHED:
            assert parse(each.strategy).plan_for(4).treated() == each.plan.treated()


def test_a_reserve_is_held_back(toy):
    toy(four_layers)
    decision = Planner(task(200_000, reserve_frac=0.25), FIGURES).decide()
    assert (decision.limit_bytes, decision.usable_bytes) == (200_000, 150_000)
    assert exact_peak(decision.choice.plan, decision.choice.batch_size) <= 150_000


def test_only_the_requested_batch_sizes_are_evaluated(toy):
    toy(four_layers)
    decision = Planner(task(300_000, batch_sizes=(2, 3)), FIGURES).decide()
    assert {each.batch_size for each in decision.candidates} == {2, 3}
    assert decision.choice.batch_size in (2, 3)


# The rest of the decision


@pytest.mark.parametrize("memory_bytes", [130_000])
def test_one_more_sequence_than_the_largest_batch_does_not_fit(planner, memory_bytes):
    """For traced and for composed plans; by a full trace."""
    largest = {each.strategy: each.batch_size for each in planner(memory_bytes).decide().largest}
    assert set(largest) == {*SPECS, SEARCHED}
    for spec in SPECS:
        plan, batch = parse(spec).plan_for(4), largest[spec]
        slack = LAYER_INPUT_BYTES * batch if spec == "every:2" else 0
        assert exact_peak(plan, batch) <= memory_bytes + slack, spec
        assert exact_peak(plan, batch + 1) > memory_bytes - slack, spec
    assert largest[SEARCHED] >= largest["per-layer"] >= largest[OFF]


def test_memory_limits_the_speed_or_does_not(planner):
    assert planner(10**12).decide().binding.startswith("Memory does not limit the speed")
    binding = planner(100_000).decide().binding
    assert binding.startswith("Memory limits the speed: off at batch ") and "% faster" in binding


def test_without_a_bound_nothing_is_recomputed_at_the_largest_batch(toy):
    toy(four_layers)
    decision = Planner(task(None), FIGURES).decide()
    assert decision.choice.strategy == OFF
    assert decision.choice.batch_size == max(each.batch_size for each in decision.candidates) == 16
    assert decision.usable_bytes is None and decision.largest == ()
    assert all(each.fits for each in decision.candidates)


def test_where_nothing_fits_the_smallest_is_shown_with_a_length_that_would_do(toy):
    """The traps: a smallest that is not; a length at which it does not fit either, or half of one that does."""
    toy(four_layers)
    first = Planner(task(10**9, seq_len=512), FIGURES)
    every = parse("per-layer").plan_for(4)
    memory = exact_peak(every, 1, seq_len=130)
    decision = first.limited(memory).decide()
    assert decision.choice is None and decision.binding is None
    assert not any(each.fits for each in decision.candidates)
    smallest = decision.smallest
    assert smallest.batch_size == 1
    assert smallest.peak_bytes == exact_peak(smallest.plan, 1, seq_len=512)
    for plan in first.mixes.uniform:
        assert smallest.peak_bytes <= exact_peak(plan, 1, seq_len=512)
    assert decision.longest_seq_len == 128
    assert [each.batch_size for each in decision.largest] == [None] * len(decision.largest)
    nothing = first.limited(1000).decide()
    assert nothing.choice is None and nothing.longest_seq_len is None


# Models that cannot be checkpointed or traced


def test_a_model_that_cannot_checkpoint_is_not_recomputed(toy):
    toy(four_layers)
    one = Planner(task(150_000, specs=(OFF,), can_checkpoint=False), FIGURES)
    decision = one.decide()
    assert {each.strategy for each in decision.candidates} == {OFF}
    assert [each.strategy for each in decision.largest] == [OFF]
    assert decision.choice.batch_size == decision.largest[0].batch_size
    refused = one.limited(1000).decide()
    assert refused.choice is None and refused.smallest.strategy == OFF


class Twice(toys.Toy):
    """Runs all its layers twice, so that none can be traced by itself."""

    def run(self, hidden, masks):
        return super().run(super().run(hidden, masks), masks)


def two_layers_twice():
    return Twice("aa")


def test_a_model_whose_layers_cannot_be_traced_gets_a_named_strategy(toy):
    specs = (OFF, "per-layer")
    toy(two_layers_twice)
    decision = Planner(task(80_000, layers=2, specs=specs), FIGURES).decide()
    assert any("Policies within layers were not searched" in notice for notice in decision.notices)
    choice = decision.choice
    assert {each.strategy for each in decision.candidates} == set(specs) and choice.strategy in specs
    assert exact_peak(choice.plan, choice.batch_size, model=two_layers_twice) == choice.peak_bytes <= 80_000


def test_what_cannot_be_traced_is_left_out_and_reported(toy, monkeypatch):
    """The trap: one policy of eight cannot be traced, and there is no answer at all."""
    toy(four_layers)
    every = parse("per-layer").plan_for(4)
    lie = replace(every, policies=(Policy(keep=("addmm#1",), skip=("addmm#0",)),) * 4)
    monkeypatch.setattr(search, "uniform_plans", lambda *args, **kwargs: [lie])
    decision = Planner(task(150_000), FIGURES).decide()
    assert decision.choice is not None and decision.choice.plan != lie
    (notice,) = decision.notices
    assert notice.startswith("Left out because they cannot be traced: 1 searched policy (the plan skips what")


def test_every_rival_of_a_choice_to_be_measured_has_details(toy):
    """The details that each would have as the choice; none where nothing will be measured."""
    toy(four_layers)
    planner = Planner(task(150_000, is_confirmed=True), FIGURES)
    decision = planner.decide()
    rivals = [each for each in contenders(decision.candidates) if each != decision.choice]
    assert rivals and [told.of for told in decision.details] == rivals
    assert [told.peak_words for told in decision.details] == [planner._peak_words(each) for each in rivals]
    assert {told.peak_words for told in decision.details} - {decision.peak_words}
    assert Planner(task(150_000), FIGURES).decide().details == ()


# One planner for several memories


def test_another_memory_shares_what_was_traced(toy, monkeypatch):
    """And decides as a planner for that memory alone would; what is left is the trace of the choice itself."""
    toy(four_layers)
    shared = Planner(task(10**9), FIGURES)
    steps = []
    step = shared.evaluator.session.predictor.step

    def counted(plan, **kwargs):
        steps.append(plan)
        return step(plan, **kwargs)

    monkeypatch.setattr(shared.evaluator.session.predictor, "step", counted)
    found = {memory: shared.limited(memory) for memory in (80_000, 250_000)}
    assert steps == []
    decided = {memory: one.decide() for memory, one in found.items()}
    assert len(steps) <= 2 * 6
    assert content(decided[250_000]) == content(Planner(task(250_000), FIGURES).decide())
    assert content(decided[80_000]) != content(decided[250_000])
    assert {memory: decision.limit_bytes for memory, decision in decided.items()} == {each: each for each in found}


def test_each_memory_has_the_calls_of_its_batch_sizes_timed(toy, monkeypatch):
    """The trap: a batch size that one planner had timed counted as timed for all, whose figures lacked it."""
    toy(four_layers)
    shared = Planner(task(10**9, device_here="cpu"), FIGURES)
    asked = []

    def calibrate_for(works, *, device, budget_s):
        asked.append(budget_s)
        return calibration_of(pointwise(1000, 1e-6))

    monkeypatch.setattr(calibration, "calibrate_for", calibrate_for)
    one, other = shared.limited(200_000), shared.limited(250_000)
    for each in (one, other):
        each._calibrate([1, 2])
        each._calibrate([2])
    assert len(asked) == 2
    assert FIGURES not in (one.evaluator.figures, other.evaluator.figures)
    assert shared.evaluator.figures is FIGURES
