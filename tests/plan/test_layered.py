"""The memory and time of layers against those of the step."""

from __future__ import annotations

import random

import planned
import pytest
import torch
import toys
from layers_by_hand import BATCH_SIZE, FP32, INNER, ROWS, SEQ_LEN, WIDTH, mlp, named, needed, toy_of

from gcbench.plan.estimate.layer_profile import profile
from gcbench.plan.layer_mix import problem as mix
from gcbench.plan.layer_mix.layered import Layered
from gcbench.plan.policies.layer_calls import inner_calls
from gcbench.plan.policies.layer_policies import uniform_plans
from gcbench.simulate import timeline
from gcbench.strategies import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = planned.Traffic()


def peak_of(step):
    return timeline.exact(step.timeline).memory.allocated_bytes


def test_a_layer_saves_what_its_calls_say():
    """Nothing recomputed: the saved outputs, and its own output, which the next layer saves."""
    one = toy_of(mlp, "aaaa")
    calls = inner_calls(one.fake_model, (0, 1, 2, 3), batch_size=BATCH_SIZE, seq_len=SEQ_LEN)[1]
    found = profile(one.step(toys.plan(4, ()), batch_size=BATCH_SIZE, seq_len=SEQ_LEN), FIGURES)
    saved = sum(named(calls)[name].nbytes for name in needed(calls))
    output = ROWS * WIDTH * FP32
    assert found.layers == (0, 1, 2, 3)
    assert {layer.left_bytes for layer in found.profiles} == {saved + output}
    weights = FP32 * (2 * WIDTH * INNER + WIDTH + INNER)
    layered = Layered([found])
    assert set(layered.gradients[:-1]) == {weights}
    assert {layered.through(place, 0) for place in range(4)} == {saved + output}
    again = profile(one.step(toys.plan(4, range(4)), batch_size=BATCH_SIZE, seq_len=SEQ_LEN), FIGURES)
    state = len(torch.get_rng_state())  # checkpointing keeps it
    assert {layer.left_bytes for layer in again.profiles} == {output + state}


@pytest.fixture(scope="module")
def uniform():
    """A toy of nine layers of two kinds: the predictor, uniform plans, their steps."""
    one = toys.predictor(lambda: toys.Toy("aabbaabba"), optim="adamw_torch")
    found = uniform_plans(one.fake_model, range(9), FIGURES, seq_len=16, most=3)
    plans = [toys.plan(9, ()), toys.plan(9, range(9)), *found]
    return one, plans, [one.step(plan, batch_size=3, seq_len=16) for plan in plans]


def test_the_peak_of_a_uniform_plan_is_that_of_its_step(uniform):
    """The traps: a layer's gradients counted as saved; the head's peak above the wrong base."""
    _, plans, steps = uniform
    layered = Layered([profile(step, FIGURES) for step in steps])
    for number, step in enumerate(steps):
        assert layered.peak((number,) * 9) == peak_of(step)
    assert len({peak_of(step) for step in steps}) == len(plans)


def test_seconds_of_layers_are_what_plans_differ_in(uniform):
    _, _, steps = uniform
    profiles = [profile(step, FIGURES) for step in steps]
    times = [sum(layer.seconds for layer in found.profiles) for found in profiles]
    for step, seconds in zip(steps[1:], times[1:], strict=True):
        assert seconds - times[0] == pytest.approx(step.seconds(FIGURES) - steps[0].seconds(FIGURES), rel=1e-6)
    assert times[0] == pytest.approx(min(times)) and max(times[2:]) < times[1]


def random_choices(plans, count):
    rng = random.Random(0)
    for _ in range(count):
        choice = [rng.randrange(len(plans)) for _ in range(9)]
        pairs = [pair for layer, number in enumerate(choice) for pair in plans[number].treated() if pair[0] == (layer,)]
        yield (
            choice,
            Plan(num_layers=9, groups=tuple(group for group, _ in pairs), policies=tuple(each for _, each in pairs)),
        )


def test_a_composed_peak_is_within_a_layer_input_of_its_trace(uniform):
    """The trap: the tensor between two layers, which either of them saves, depending on both policies."""
    one, plans, steps = uniform
    layered = Layered([profile(step, FIGURES) for step in steps])
    boundary = 3 * 16 * WIDTH * FP32
    exact = 0
    for choice, plan in random_choices(plans, 6):
        traced = peak_of(one.step(plan, batch_size=3, seq_len=16))
        assert abs(layered.peak(choice) - traced) <= boundary, choice
        exact += layered.peak(choice) == traced
    assert exact > 0


def test_the_problem_has_the_peak_of_the_layers(uniform):
    """Without autocast one number says what a layer saves, and the two peaks must agree."""
    _, plans, steps = uniform
    layered = Layered([profile(step, FIGURES) for step in steps])
    for choice, _ in random_choices(plans, 20):
        assert mix.peak(layered.problem(9), choice) == layered.peak(choice)


def test_sizes_are_rounded_up_as_an_allocator_does(uniform):
    _, _, steps = uniform
    rounded, plain = profile(steps[0], FIGURES, rounding=512), profile(steps[0], FIGURES)
    assert all(layer.left_bytes % 512 == 0 for layer in rounded.profiles)
    for one, other in zip(rounded.profiles, plain.profiles, strict=True):
        assert other.left_bytes <= one.left_bytes
    assert rounded.standing_bytes > plain.standing_bytes


def test_a_step_traced_in_full_has_no_layers():
    one = toys.predictor(toys.Toy, exact=True)
    assert profile(one.step(toys.plan(6, ()), batch_size=2, seq_len=4), FIGURES) is None
