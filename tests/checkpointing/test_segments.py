"""Segments: several layers recomputed as one, with the gradients of none."""

from __future__ import annotations

import pytest
import tiny
import torch
from segmented import (
    BATCH_SIZE,
    FAMILIES,
    SEGMENTS,
    SEQ_LEN,
    WIDTH,
    apply,
    assert_nothing_is_switched_on,
    build,
    count_calls,
    differing,
    gradients,
    inputs_of,
)

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.strategies import Plan, Policy
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread", "no_hook_reaches_the_next_test")

# Gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_off_bit_by_bit(family):
    """The traps: dropout masks of the second layer drawn after those of the first, a mask or a rotary table of another
    layer, the last of a tuple instead of the hidden states."""
    model = build(family)
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    assert any(grad.count_nonzero() for grad in off.values())
    for spec in SEGMENTS:
        assert differing(gradients(model, inputs, spec), off) == [], spec
    assert_nothing_is_switched_on()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom", "gemma2"])
@pytest.mark.parametrize("change", ["selective:matmul", "selective:mm#1/addmm#5/_softmax", "selective:attention"])
def test_operator_outputs_are_saved_inside_a_segment(family, change):
    model = build(family)
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    for choice in SEGMENTS:
        assert differing(gradients(model, inputs, f"{choice}+{change}"), off) == [], choice
    assert_nothing_is_switched_on()


def test_a_saved_output_that_is_changed_in_place_is_not_reused():
    """Falcon adds attention into the output of its last product, through a view that torch does not count as one."""
    model = build("falcon")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    try:
        ours = gradients(model, inputs, "segment:2+selective:matmul")
    except RuntimeError:
        return  # refused, which is as good
    assert differing(ours, off) == []


def test_dropout_is_on():
    """Without it, the test of gradients could not tell a right random state from a wrong one."""
    model = build("gpt2")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    torch.manual_seed(8)
    model.zero_grad()
    model(**inputs).loss.backward()
    assert differing({name: param.grad for name, param in model.named_parameters()}, off)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_a_segment_is_recomputed_in_the_precision_it_ran_in(precision):
    """The trap: autocast is off in the backward pass."""
    found = []
    for spec in ("off", "segment:3"):
        model = build("gpt2")
        apply(model, spec)
        batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0)
        step = training.TrainingStep(model, batch=batch, precision=precision, optim="sgd", seed=0)
        taken = {}

        def take(phase, model=model, taken=taken):
            if phase == "optimizer":
                taken.update({name: param.grad.clone() for name, param in model.named_parameters()})

        step(take)
        found.append(taken)
    assert differing(*found) == []


def test_steps_follow_one_another():
    """Three of them, with an optimizer between: weights that differ in the end were trained on other gradients."""
    found = []
    for spec in ("off", "segment:2", "segment:3+selective:matmul"):
        model = build("gpt2")
        apply(model, spec)
        batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0)
        step = training.TrainingStep(model, batch=batch, precision="fp32", optim="adamw_torch", seed=0)
        for _ in range(3):
            step()
        found.append(dict(model.named_parameters()))
    assert differing(found[1], found[0]) == differing(found[2], found[0]) == []


def test_two_forward_passes_may_wait_for_one_backward_pass():
    """The trap: one list of calls for both, so that the second pass is recomputed twice."""
    model = build("gpt2")
    first, second = inputs_of(model), inputs_of(model, seed=1)
    found = []
    for spec in ("off", "segment:3"):
        checkpointing.clear(model)
        apply(model, spec)
        model.zero_grad()
        torch.manual_seed(7)
        (model(**first).loss + 2 * model(**second).loss).backward()
        found.append({name: param.grad.clone() for name, param in model.named_parameters()})
    assert differing(*found) == []


def test_policies_are_those_of_each_group():
    model = build("gpt2", layers=7)
    inputs = inputs_of(model)
    plan = Plan(
        num_layers=7,
        groups=((0, 1, 2), (4, 5), (6,)),
        policies=(Policy(keep=("addmm",)), Policy(), Policy(keep=("bmm#1",))),
    )
    off = gradients(model, inputs, "off")
    assert differing(gradients(model, inputs, plan), off) == []


# What runs


@pytest.mark.parametrize("spec", [*SEGMENTS, "segment:1", "segment:3+selective:matmul"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_each_layer_is_recomputed_once_a_step(family, spec):
    """The trap: a segment that is recomputed for each of its layers, which costs time and shows in no gradient."""
    model = build(family, layers=5)
    counter = apply(model, spec)
    calls, phase = count_calls(model)
    inputs = inputs_of(model)
    for _ in range(2):
        calls.clear()
        counter.reset()
        phase[0] = "forward"
        loss = model(**inputs).loss
        assert calls == {("forward", layer): 1 for layer in range(5)}
        assert counter.layers == set()
        phase[0] = "backward"
        loss.backward()
        assert calls == {(name, layer): 1 for name in ("forward", "backward") for layer in range(5)}
        assert counter.layers == set(range(5))


def test_layers_outside_of_a_segment_are_not_recomputed():
    model = build("llama", layers=5)
    counter = apply(model, Plan(num_layers=5, groups=((1, 2, 3),)))
    calls, phase = count_calls(model)
    loss = model(**inputs_of(model)).loss
    phase[0] = "backward"
    loss.backward()
    assert {layer for name, layer in calls if name == "backward"} == counter.layers == {1, 2, 3}


@pytest.mark.parametrize(
    "spec", ["offload", "segment:2+offload", "segment:3+offload", "segment:2+selective:mm+offload"]
)
def test_offloaded_segments_are_recomputed_from_host_memory(offloading, spec):
    """On a CPU, with memory that is not pinned. The trap: hooks are a stack, and who leaves first takes the top one: a
    segment whose own hook is taken away keeps everything, in the host's memory, with the right gradients."""
    model = build("llama")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    checkpointing.clear(model)
    counter = apply(model, spec)
    assert differing(gradients(model, inputs), off) == []
    assert_nothing_is_switched_on()
    assert counter.layers == set(range(tiny.NUM_LAYERS))
    num_groups = len(strategies.parse(spec).plan_for(tiny.NUM_LAYERS).groups)
    assert offloading == [(BATCH_SIZE, SEQ_LEN, WIDTH)] * num_groups
