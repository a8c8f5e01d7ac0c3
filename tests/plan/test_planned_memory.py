"""Plans that save and skip calls, predicted against measured peaks: to the byte on this CPU, at any batch size."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import numpy as np
import planned
import pytest
import torch
import toys
from planned import mixed

from gcbench.checkpointing import apply as checkpointing
from gcbench.core.records import PHASES
from gcbench.devices.backends import open_device
from gcbench.models import build as models
from gcbench.plan.estimate import batch_scaling
from gcbench.plan.estimate.batch_scaling import TRACED, Scaling
from gcbench.plan.policies.layer_policies import uniform_plans
from gcbench.simulate import timeline
from gcbench.strategies import Plan
from gcbench.training import step as training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

OFF = Plan(num_layers=planned.LAYERS)
BATCH_SIZE = 4
SEQ_LENS = {"mamba": 4}
"""Of families that loop over the sequence; else 32."""
DROPOUT_SLACK_BYTES = 64
"""Dropout by hand makes a few single numbers more, now in this phase and now in that."""


def measured(family, plan, precision):
    """The peaks of the second step, from the allocator's own events."""
    config, dtype = planned.config_of(family), training.parameter_dtype(precision)
    model = models.build(planned.source_of(family), config, device="cpu", dtype=dtype, attn_implementation=None, seed=0)
    checkpointing.apply(model, plan)
    batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LENS.get(family, 32), seed=0)
    step = training.TrainingStep(model, batch=batch, precision=precision, optim="adamw_torch", seed=0)
    with open_device("cpu").probe_memory() as probe:
        step()
        step(probe.on_phase)
    return probe.peaks()


@cache
def predictor_of(family, precision):
    return planned.predictor_of(family, precision, optim="adamw_torch")


def predicted(family, plan, precision):
    return predictor_of(family, precision).step(plan, batch_size=BATCH_SIZE, seq_len=SEQ_LENS.get(family, 32))


def missing(family, plan, precision="fp32"):
    """Bytes of each phase's peak that the prediction lacks: single numbers that real operators make and fake ones do
    not. They are as many as without a plan, and in each phase, but for what other tests of this process hold."""
    step, real = predicted(family, plan, precision), measured(family, plan, precision)
    assert step.why_in_full is None
    fake = timeline.exact(step.timeline).memory
    return [real.of_phase(phase) - fake.of_phase(phase) for phase in PHASES]


@cache
def missing_off(family, precision="fp32"):
    found = missing(family, OFF, precision)
    assert all(0 <= nbytes <= 256 for nbytes in found)
    return found


def assert_exact(family, plan, precision="fp32"):
    found = missing(family, plan, precision)
    slack = DROPOUT_SLACK_BYTES if family == "gpt2" else 0
    apart = [one - other for one, other in zip(found, missing_off(family, precision), strict=True)]
    assert max(apart) - min(apart) <= slack and max(map(abs, apart)) <= 256, (apart, plan)


@pytest.mark.parametrize(
    ("family", "precision", "numbers"),
    [
        ("llama", "fp32", (0, 2, -1)),
        ("gpt2", "fp32", (2,)),
        ("mixtral", "fp32", (3,)),
        ("opt", "fp32", (-1,)),
        ("llama", "bf16", (2,)),
        ("llama", "bf16-mixed", (2,)),
    ],
)
def test_a_prediction_is_the_real_step(family, precision, numbers):
    """The traps: placeholders counted as memory; saved outputs counted twice, or until the end of the step."""
    for number in numbers:
        assert_exact(family, planned.found_plans(family, precision)[number], precision)


def test_different_policies_side_by_side_are_the_real_step():
    rng, plans = random.Random(1), planned.found_plans("llama")
    for _ in range(3):
        assert_exact("llama", mixed(rng, plans, planned.LAYERS))


def test_different_plans_have_different_peaks():
    """This file's own alarm: a comparison that every plan would pass."""
    plans = planned.found_plans("llama")
    peaks = [timeline.exact(predicted("llama", plan, "fp32").timeline).memory for plan in (OFF, plans[0], plans[-1])]
    assert len({peak.forward_bytes for peak in peaks}) == len({peak.backward_bytes for peak in peaks}) == 3


def test_policies_side_by_side_are_composed_as_they_are_traced():
    """The traps: a few layers represent eight; which of two policies saves the layer input between them."""
    one, full = (toys.predictor(lambda: toys.Toy("aaaaaaaa"), exact=exact) for exact in (False, True))
    found = uniform_plans(one.fake_model, range(8), planned.Traffic(), seq_len=16, most=3)
    policies = [found[number].policies[1] for number in (0, 0, 0, 0, -1, -1, -1, -1)]
    plan = toys.plan(8, range(8))
    plan = replace(plan, policies=tuple(policies))
    composed, traced = (each.step(plan, batch_size=2, seq_len=16) for each in (one, full))
    assert composed.why_in_full is None and composed.layers_traced < traced.layers_traced
    assert timeline.exact(composed.timeline).memory == timeline.exact(traced.timeline).memory


# At any batch size

AFFINE = {
    "llama": (-1,),
    "mixtral": (2,),
}
"""Family -> numbers of its plans."""


def content(step):
    return [
        (segment, [(work.op, work.kind, work.dtype, work.nbytes, work.flops, work.dims) for work in works])
        for segment, works in step.works
    ]


@pytest.mark.parametrize("family", AFFINE)
def test_a_step_that_is_computed_is_the_step_that_would_be_traced(family):
    """The traps: a block that does not grow with the batch, or from the second sequence on only; an odd batch."""
    predictor = predictor_of(family, "fp32")
    for number in AFFINE[family]:
        plan = planned.found_plans(family)[number]
        scaled = Scaling(predictor, plan, seq_len=16)
        assert scaled.is_affine
        for batch in (7,):
            computed, traced = scaled.step(batch), predictor.step(plan, batch_size=batch, seq_len=16)
            assert np.array_equal(computed.timeline.events, traced.timeline.events)
            assert np.array_equal(computed.timeline.nbytes, traced.timeline.nbytes)
            assert timeline.exact(computed.timeline) == timeline.exact(traced.timeline)
            assert content(computed) == content(traced)
            assert [work.call for work in scaled.calls(batch)] == [w.call for _, works in traced.works for w in works]
            for figures in planned.FIGURES.values():
                assert computed.seconds(figures) == pytest.approx(traced.seconds(figures), rel=1e-12)
                assert scaled.seconds(batch, figures) == computed.seconds(figures)


def test_one_sequence_alone_is_computed_and_not_called_exact():
    scaled = Scaling(predictor_of("llama", "fp32"), OFF, seq_len=16)
    assert not scaled.is_exact(1) and scaled.is_exact(2) and scaled.is_exact(5)
    one, two, three = (timeline.exact(scaled.step(batch).timeline).memory.allocated_bytes for batch in (1, 2, 3))
    assert one < two < three
    scaled.traced(1)
    assert scaled.is_exact(1)


def test_steps_that_were_traced_are_not_traced_again(monkeypatch):
    predictor = planned.predictor_of("llama")
    known = {batch: predictor.step(OFF, batch_size=batch, seq_len=16) for batch in TRACED}
    monkeypatch.setattr(predictor, "step", None)
    scaled = Scaling(predictor, OFF, seq_len=16, known=known)
    assert scaled.step(TRACED[0]) is known[TRACED[0]]
    assert scaled.step(10).timeline.nbytes.sum() > known[TRACED[1]].timeline.nbytes.sum()


class Pairs(toys.Layer):
    """Compares every sequence with every other one."""

    def forward(self, hidden_states, masks):
        flat = hidden_states.flatten(1)
        return hidden_states + (flat @ flat.T).softmax(-1).sum() * super().forward(hidden_states, masks)


class Chunks(toys.Layer):
    """Goes through a batch in parts of two sequences."""

    def forward(self, hidden_states, masks):
        return torch.cat([super(Chunks, self).forward(part, {}) for part in hidden_states.split(2)])


@pytest.mark.parametrize("layer", [Pairs, Chunks])
def test_what_does_not_grow_evenly_is_traced(layer):
    """The traps: memory that grows with the square of the batch, and more operators for more sequences."""

    class Toy(toys.Toy):
        pass

    Toy.layer = layer
    one = toys.predictor(lambda: Toy("aaa"))
    plan = toys.plan(3, range(3))
    scaled = Scaling(one, plan, seq_len=4)
    assert not scaled.is_affine
    for batch in (1, 3, 6):
        assert scaled.is_exact(batch)
        computed, traced = scaled.step(batch), one.step(plan, batch_size=batch, seq_len=4)
        assert timeline.exact(computed.timeline) == timeline.exact(traced.timeline)
        assert content(computed) == content(traced)


def test_memory_that_grows_by_halves_is_no_whole_number_of_bytes():
    """The trap: a difference between two batch sizes that their distance does not divide."""
    low, high = (predictor_of("llama", "fp32").step(OFF, batch_size=batch, seq_len=16) for batch in TRACED)
    assert batch_scaling._grow_evenly(low, high, TRACED)
    line = high.timeline
    grown = line.nbytes.copy()
    grown[-1] += 1
    odd = replace(high, assembly=replace(high.assembly, timeline=replace(line, nbytes=grown)))
    assert not batch_scaling._grow_evenly(low, odd, TRACED)
