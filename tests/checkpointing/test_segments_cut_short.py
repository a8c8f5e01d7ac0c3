"""Segments outside of training, and in passes that are cut short."""

from __future__ import annotations

import pytest
import tiny
import torch
from segmented import (
    SEGMENTS,
    Boom,
    apply,
    assert_nothing_is_switched_on,
    build,
    count_calls,
    differing,
    gradients,
    inputs_of,
)

from gcbench.checkpointing import apply as checkpointing

pytestmark = pytest.mark.usefixtures("one_thread", "no_hook_reaches_the_next_test")

# Outside of training


@pytest.mark.parametrize("spec", SEGMENTS)
@pytest.mark.parametrize("training_mode", [True, False])
def test_without_gradients_a_segment_is_its_layers(spec, training_mode):
    model = build("llama").train(training_mode)
    inputs = inputs_of(model)
    with torch.no_grad():
        off = model(**inputs).loss
        counter = apply(model, spec)
        assert torch.equal(model(**inputs).loss, off)
        assert torch.equal(model(**inputs).loss, off)
    assert_nothing_is_switched_on()
    assert counter.layers == set()
    apply(model, spec)
    model.train()
    assert differing(gradients(model, inputs), gradients(model, inputs, "off")) == []


def test_in_eval_mode_nothing_is_recomputed():
    model = build("gpt2")
    counter = apply(model, "segment:2")
    calls, phase = count_calls(model)
    loss = model.eval()(**inputs_of(model)).loss
    phase[0] = "backward"
    loss.backward()
    assert counter.layers == set()
    assert {name for name, _ in calls} == {"forward"}


def test_a_pass_without_gradients_between_two_steps_changes_nothing():
    """As an evaluation in the middle of training."""
    model = build("gpt2")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    checkpointing.clear(model)
    apply(model, "segment:3")
    assert differing(gradients(model, inputs), off) == []
    with torch.no_grad():
        model(**inputs)
    model.eval()
    model(**inputs)
    model.train()
    assert differing(gradients(model, inputs), off) == []


# Passes that are cut short


@pytest.mark.parametrize("spec", ["segment:2", "segment:4", "segment:3+selective:matmul"])
@pytest.mark.parametrize("place", range(tiny.NUM_LAYERS))
def test_an_exception_in_a_layer_leaves_nothing_switched_on(spec, place):
    """Such as memory that runs out: neither its handling nor the next step may be part of a segment."""
    model = build("gpt2")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    apply(model, spec)
    layer = checkpointing.checkpointable_layers(model)[place]

    def explode(*args):
        raise Boom

    hook = layer.mlp.register_forward_pre_hook(explode)
    for _ in range(2):
        with pytest.raises(Boom):
            model(**inputs)
        assert_nothing_is_switched_on()
    hook.remove()
    assert differing(gradients(model, inputs), off) == []
    assert_nothing_is_switched_on()


@pytest.mark.parametrize("spec", ["segment:2", "segment:3+selective:matmul"])
def test_an_exception_in_the_recomputation_leaves_nothing_switched_on(spec):
    model = build("gpt2")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    apply(model, spec)
    loss = model(**inputs).loss

    def explode(*args):
        raise Boom

    hook = checkpointing.checkpointable_layers(model)[1].mlp.register_forward_pre_hook(explode)
    with pytest.raises(Boom):
        loss.backward()
    assert_nothing_is_switched_on()
    hook.remove()
    assert differing(gradients(model, inputs), off) == []
