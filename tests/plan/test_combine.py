"""Steps composed of uniform ones, against traces of the same plans."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import planned
import pytest
import toys

from gcbench.plan.estimate.layer_profile import profile
from gcbench.plan.estimate.mixed_layers import Combiner
from gcbench.plan.layer_mix.layered import Layered
from gcbench.plan.policies.layer_policies import uniform_plans
from gcbench.simulate import timeline
from gcbench.simulate.trace.fake_model import NotComposable
from gcbench.strategies import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 7
SEQ_LEN = 16


def plan_of(plans, choice):
    pairs = [pair for layer, number in enumerate(choice) for pair in plans[number].treated() if pair[0] == (layer,)]
    return Plan(
        num_layers=len(choice), groups=tuple(group for group, _ in pairs), policies=tuple(each for _, each in pairs)
    )


def plans_of(one, kinds):
    found = uniform_plans(one.fake_model, range(len(kinds)), planned.Traffic(), seq_len=SEQ_LEN, most=3)
    return [toys.plan(len(kinds), ()), toys.plan(len(kinds), range(len(kinds))), *found]


@pytest.fixture(scope="module", params=[("aaaaaaa", "fp32"), ("aabbaab", "fp32"), ("aaaaaaa", "bf16-mixed")])
def toy(request):
    """(predictor, uniform plans, their steps). Autocast keeps the weights that it has cast until the forward pass ends,
    those of recomputed layers too."""
    kinds, precision = request.param
    one = toys.predictor(lambda: toys.Toy(kinds), optim="adamw_torch", precision=precision)
    plans = plans_of(one, kinds)
    assert len(plans) > 3
    return one, plans, [one.step(plan, batch_size=2, seq_len=SEQ_LEN) for plan in plans]


def memory(line):
    return timeline.exact(line).memory, timeline.cached(line).memory


def test_one_policy_for_all_layers_gives_the_uniform_step(toy):
    """The traps: a block freed where another is, gradients of other layers, the update's blocks shifted."""
    _, _, steps = toy
    lines = [step.timeline for step in steps]
    for number, step in enumerate(steps):
        line = Combiner(steps).line([number] * LAYERS, lines)
        assert np.array_equal(line.nbytes, step.timeline.nbytes)
        assert np.array_equal(line.events, step.timeline.events)
        assert (line.marks, line.settled_at) == (step.timeline.marks, step.timeline.settled_at)


def test_a_composed_step_is_close_to_its_trace(toy):
    """Whatever policies are neighbours: the peak within a layer input of the trace's, and most of them exact."""
    one, plans, steps = toy
    combiner, lines = Combiner(steps), [step.timeline for step in steps]
    rng = random.Random(1)
    exact = 0
    for _ in range(8):
        choice = [rng.randrange(len(plans)) for _ in range(LAYERS)]
        traced = one.step(plan_of(plans, choice), batch_size=2, seq_len=SEQ_LEN).timeline
        put_together = combiner.line(choice, lines)
        ours, theirs = (timeline.exact(line).memory.allocated_bytes for line in (put_together, traced))
        assert abs(ours - theirs) <= 2 * SEQ_LEN * toys.WIDTH * 4, choice
        assert put_together.live()[-1] == traced.live()[-1], "what stays after the step"
        exact += memory(put_together) == memory(traced)
    assert exact >= 5


def test_the_memory_of_layers_adds_up_to_the_peak(toy):
    """The trap: weights cast by autocast counted as saved until the backward pass."""
    one, plans, steps = toy
    layered = Layered([profile(step, planned.Traffic()) for step in steps])
    rng = random.Random(3)
    for _ in range(6):
        choice = [rng.randrange(len(plans)) for _ in range(LAYERS)]
        traced = timeline.exact(one.step(plan_of(plans, choice), batch_size=2, seq_len=SEQ_LEN).timeline)
        assert abs(layered.peak(choice) - traced.memory.allocated_bytes) <= 2 * SEQ_LEN * toys.WIDTH * 4, choice


def test_no_other_choice_within_the_budget_is_faster(toy):
    """All choices of three ways for seven layers, by the same peaks. Under autocast what the last layer leaves is known
    to a boundary; activations are larger than weights there, or those that were cast would set the peak."""
    one, plans, _ = toy
    steps = [one.step(plan, batch_size=32, seq_len=SEQ_LEN) for plan in plans[:3]]
    layered = Layered([profile(step, planned.Traffic()) for step in steps])
    every = [(layered.peak(choice), layered.seconds(choice)) for choice in itertools.product(range(3), repeat=LAYERS)]
    lowest, highest = min(every)[0], layered.peak((0,) * LAYERS)
    assert layered.smallest().peak_bytes == lowest
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        budget = int(lowest + share * (highest - lowest))
        found = layered.fastest(budget)
        slack = 32 * SEQ_LEN * toys.WIDTH * 4 if any(layered.casts) else 0
        best = min(seconds for peak, seconds in every if peak <= budget)
        with_slack = min([seconds for peak, seconds in every if peak <= budget - slack], default=math.inf)
        assert found.peak_bytes == layered.peak(found.choice) <= budget
        assert best * (1 - 1e-9) <= found.seconds <= with_slack * (1 + 1e-9), share


def test_every_block_is_allocated_once_and_freed_at_most_once(toy):
    _, plans, steps = toy
    combiner, lines = Combiner(steps), [step.timeline for step in steps]
    rng = random.Random(2)
    for _ in range(20):
        line = combiner.line([rng.randrange(len(plans)) for _ in range(LAYERS)], lines)
        taken, given = line.events[line.events >= 0], ~line.events[line.events < 0]
        assert len(set(taken.tolist())) == len(taken) == len(line.nbytes)
        assert len(set(given.tolist())) == len(given)
        assert (line.live() >= 0).all()


def test_another_batch_size_has_other_sizes(toy):
    one, plans, steps = toy
    choice = [number % len(plans) for number in range(LAYERS)]
    larger = [one.step(plan, batch_size=4, seq_len=SEQ_LEN) for plan in plans]
    by_sizes = Combiner(steps).line(choice, [step.timeline for step in larger])
    itself = Combiner(larger).line(choice, [step.timeline for step in larger])
    assert np.array_equal(by_sizes.nbytes, itself.nbytes)
    assert timeline.exact(by_sizes) == timeline.exact(itself)


def test_a_step_traced_in_full_cannot_be_combined():
    one = toys.predictor(toys.Toy, exact=True)
    with pytest.raises(NotComposable, match="in full"):
        Combiner([one.step(toys.plan(6, ()), batch_size=2, seq_len=4)])
