"""Segments: several layers recomputed as one, with the gradients of none, less memory, and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from toys import VOCAB_SIZE, Layer, Toy

from gcbench import checkpointing, models, strategies, training
from gcbench.segments import NotASegment
from gcbench.sources import ModelSource
from gcbench.strategies import Plan, Policy

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH_SIZE, SEQ_LEN, WIDTH = 2, 8, 32
LLAMA_LIKE = {name: value for name, value in tiny.CONFIGS["llama"].items() if name != "model_type"}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
FAMILIES = {
    **tiny.CHECKPOINTING,
    # Its layers return tuples.
    "falcon": {"model_type": "falcon", **LLAMA_LIKE},
    # A mask and rotary tables for each kind of attention.
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4, **LLAMA_LIKE},
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **MAMBA2,
        **LLAMA_LIKE,
        "layer_types": ["mamba", "attention"] * 2,
    },
}
SEGMENTS = ("segment:2", "segment:3", "segment:4")


def build(family, layers=tiny.NUM_LAYERS):
    source = ModelSource(name=family, origin="", config=FAMILIES[family], location="")
    config = models.build_config(source, layers=layers, overrides={})
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
    return model.train()


def apply(model, spec):
    plan = spec
    if isinstance(spec, str):
        plan = strategies.parse(spec).plan_for(len(checkpointing.checkpointable_layers(model)))
    return checkpointing.apply(model, plan)


def inputs_of(model, seed=0):
    batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=seed)
    return training.forward_inputs(model, batch)


def gradients(model, inputs, spec=None):
    """Of one pass, dropout on and the same for every call; with `spec`, under that strategy."""
    if spec is not None:
        checkpointing.clear(model)
        apply(model, spec)
    model.zero_grad()
    torch.manual_seed(7)
    model(**inputs).loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_nothing_is_switched_on():
    """No hook takes what is saved for a backward pass, and no mode sees operators.

    The trap: with checkpointing's hooks left on, all that comes later is part of a segment that is never run again.
    """
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert _get_current_dispatch_mode_stack() == []
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True)
def no_hook_reaches_the_next_test():
    """A hook that a test leaves behind would spoil all tests after it in this process."""
    yield
    for _ in range(20):
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            break
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for mode in reversed(_get_current_dispatch_mode_stack()):
        mode.__exit__(None, None, None)


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
def test_operators_are_kept_inside_a_segment(family, change):
    model = build(family)
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    for choice in SEGMENTS:
        assert differing(gradients(model, inputs, f"{choice}+{change}"), off) == [], choice
    assert_nothing_is_switched_on()


def test_what_is_kept_and_then_changed_in_place_is_not_used_as_it_was():
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
def test_a_segment_runs_again_in_the_precision_it_ran_in(precision):
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
    """The trap: one list of calls for both, so that the second pass is run again twice."""
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


def count_calls(model):
    """How often each layer runs, by (phase, number); the phase is what the test says it is.

    A layer's own hooks are outside of what is checkpointed, those of its parts are not.
    """
    calls, phase = Counter(), ["forward"]
    for number, layer in enumerate(checkpointing.checkpointable_layers(model)):

        def count(*args, number=number):
            calls[phase[0], number] += 1

        layer.mlp.register_forward_pre_hook(count)
    return calls, phase


@pytest.mark.parametrize("spec", [*SEGMENTS, "segment:1", "segment:3+selective:matmul"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_each_layer_runs_again_once_a_step(family, spec):
    """The trap: a segment that is run again for each of its layers, which costs time and shows in no gradient."""
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


def test_layers_outside_of_a_segment_do_not_run_again():
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
def test_what_is_kept_in_the_hosts_memory_is_run_again_from_there(monkeypatch, spec):
    """On a CPU, with memory that is not pinned. The trap: hooks are a stack, and who leaves first takes the top one: a
    segment whose own hook is taken away keeps everything, in the host's memory, with the right gradients."""
    moved = []

    def save_on_host():
        hooks = torch.autograd.graph.save_on_cpu(pin_memory=False)
        moves = hooks.pack_hook
        hooks.pack_hook = lambda tensor: (moved.append(tensor.shape), moves(tensor))[1]
        return hooks

    monkeypatch.setattr(checkpointing, "save_on_host", save_on_host)
    model = build("llama")
    inputs = inputs_of(model)
    off = gradients(model, inputs, "off")
    checkpointing.clear(model)
    counter = apply(model, spec)
    assert differing(gradients(model, inputs), off) == []
    assert_nothing_is_switched_on()
    assert counter.layers == set(range(tiny.NUM_LAYERS))
    num_groups = len(strategies.parse(spec).plan_for(tiny.NUM_LAYERS).groups)
    assert moved == [(BATCH_SIZE, SEQ_LEN, WIDTH)] * num_groups


# Memory


class Live(TorchDispatchMode):
    """The storages that operators have made and that are still there; those of the model and its inputs are not new."""

    def __init__(self, model, inputs):
        super().__init__()
        self.alive = {}
        old = [*model.parameters(), *model.buffers(), *inputs.values()]
        self.old = {tensor.untyped_storage()._cdata for tensor in old if isinstance(tensor, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.note(value.untyped_storage())
        return out

    def note(self, storage):
        key = storage._cdata
        if key not in self.old and key not in self.alive:
            self.alive[key] = (weakref.ref(storage, lambda reference: self.alive.pop(key)), storage.nbytes())

    @property
    def nbytes(self):
        return sum(nbytes for _, nbytes in self.alive.values())


@pytest.fixture
def no_collector():
    """What is held by cycles alone stays until the collector comes, which in a real run may be after the peak."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def kept_bytes(family, spec, *, layers):
    """What operators of the forward pass have left behind at its end."""
    model = build(family, layers=layers)
    inputs = inputs_of(model)
    apply(model, spec)
    with Live(model, inputs) as live:
        loss = model(**inputs).loss
    assert loss.requires_grad
    return live.nbytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom", "gemma2"])
def test_a_segment_keeps_one_boundary_where_layers_keep_one_each(no_collector, family):
    """To the byte: 7 layers, so 7 inputs one by one, 4 in twos, 3 in threes and 1 as a whole."""
    boundary = BATCH_SIZE * SEQ_LEN * WIDTH * 4
    kept = {spec: kept_bytes(family, spec, layers=7) for spec in ("off", "per-layer", "segment:2", "segment:3")}
    kept["segment:7"] = kept_bytes(family, "segment:7", layers=7)
    assert kept["off"] > kept["per-layer"]
    assert kept["per-layer"] - kept["segment:2"] == 3 * boundary
    assert kept["per-layer"] - kept["segment:3"] == 4 * boundary
    assert kept["per-layer"] - kept["segment:7"] == 6 * boundary


def test_a_segment_keeps_what_its_policy_says(no_collector):
    """One product of (2 x 8 tokens, 64) in each layer of three, whether or not they are one segment."""
    product = BATCH_SIZE * SEQ_LEN * 64 * 4
    kept = {spec: kept_bytes("llama", spec, layers=3) for spec in ("segment:3", "per-layer")}
    assert kept_bytes("llama", "segment:3+selective:mm#4/mm#11/mm#18", layers=3) - kept["segment:3"] == 3 * product
    assert kept_bytes("llama", "segment:3+selective:mm#4", layers=3) - kept["segment:3"] == product
    assert kept_bytes("llama", "selective:mm#4", layers=3) - kept["per-layer"] == 3 * product


@pytest.mark.parametrize("spec", ["segment:2", "segment:3", "segment:3+selective:matmul"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_nothing_is_held_after_a_step(no_collector, family, spec):
    """The trap: calls noted for the recomputation, with their masks and hidden states, kept until the next step or, in
    a cycle, until the collector comes."""
    model = build(family)
    apply(model, spec)
    inputs = inputs_of(model)
    model(**inputs).loss.backward()  # what a model makes once and keeps
    model.zero_grad()
    with Live(model, inputs) as live:
        loss = model(**inputs).loss
        assert live.nbytes > 0
        loss.backward()
        del loss
        assert live.nbytes == sum(param.grad.nbytes for param in model.parameters())
        model.zero_grad()
    assert live.nbytes == 0


@pytest.mark.parametrize("spec", ["per-layer", "segment:2", "segment:4+selective:matmul"])
def test_nothing_is_held_after_a_forward_pass_that_is_thrown_away(no_collector, spec):
    model = build("gpt2")
    apply(model, spec)
    inputs = inputs_of(model)
    model(**inputs)
    with Live(model, inputs) as live:
        loss = model(**inputs).loss
        del loss
    assert live.nbytes == 0


@pytest.mark.parametrize("spec", ["segment:2", "segment:3", "segment:2+selective:matmul"])
def test_a_model_that_is_let_go_is_gone(no_collector, spec):
    """The trap: a segment holds its layers' bound methods, and its layers hold the segment."""
    model = build("llama")
    apply(model, spec)
    gradients(model, inputs_of(model))
    gc.enable()  # a module and its functions may be a cycle; what is global is none
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


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


def test_in_eval_mode_nothing_runs_again():
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


class Boom(Exception):
    pass


@pytest.mark.parametrize("spec", ["segment:2", "segment:4", "segment:3+selective:matmul"])
@pytest.mark.parametrize("place", range(tiny.NUM_LAYERS))
def test_an_exception_in_a_layer_leaves_nothing_switched_on(spec, place):
    """As memory that runs out: the report of it must not be part of a segment, nor the next step."""
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


# Models whose layers are no chain

TOY_SEGMENTS = ("segment:2", "segment:3", "segment:2+selective:addmm")


class ScaledBetweenLayers(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks) * 0.5
        return hidden


class CopiedBetweenLayers(Toy):
    """The same values, and another tensor: whether it is a copy cannot be seen from outside."""

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks).clone()
        return hidden


class EveryLayerTwice(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(layer(hidden, masks), masks)
        return hidden


class LastLayerFirst(Toy):
    def run(self, hidden, masks):
        for layer in reversed(self.layers):
            hidden = layer(hidden, masks)
        return hidden


class FirstLayerLeftOut(Toy):
    def run(self, hidden, masks):
        for layer in self.layers[1:]:
            hidden = layer(hidden, masks)
        return hidden


class HiddenStatesByName(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden_states=hidden, masks=masks)
        return hidden


class ScaledInPlaceBetweenLayers(Toy):
    """The same tensor, and other values."""

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks)
            hidden.mul_(0.5)
        return hidden


class LastLayerOfAGroupLeftOut(Toy):
    """As with LayerDrop: a group that is begun and never ended."""

    def run(self, hidden, masks):
        for number, layer in enumerate(self.layers):
            if number != 1:
                hidden = layer(hidden, masks)
        return hidden


class LastLayerOfAllLeftOut(Toy):
    def run(self, hidden, masks):
        for layer in self.layers[:-1]:
            hidden = layer(hidden, masks)
        return hidden


class DropoutLayer(Layer):
    def forward(self, hidden_states, masks):
        return torch.nn.functional.dropout(super().forward(hidden_states, masks), 0.3)


class DrawsBetweenLayers(Toy):
    """As with LayerDrop: a number drawn before each layer, which decides whether it runs."""

    layer = DropoutLayer

    def run(self, hidden, masks):
        for layer in self.layers:
            torch.rand([])
            hidden = layer(hidden, masks)
        return hidden


class AllLayersTwice(Toy):
    """One group after the other, and again: each run of a group is a segment of its own."""

    def run(self, hidden, masks):
        return super().run(super().run(hidden, masks), masks)


class StopsBetweenLayers(Toy):
    stops = True

    def run(self, hidden, masks):
        for number, layer in enumerate(self.layers):
            if number == 1 and self.stops:
                raise Boom
            hidden = layer(hidden, masks)
        return hidden


def toy(cls):
    torch.manual_seed(0)
    return cls().train()


def toy_inputs():
    ids = torch.randint(VOCAB_SIZE, (2, 4), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
@pytest.mark.parametrize(
    "cls",
    [
        ScaledBetweenLayers,
        CopiedBetweenLayers,
        EveryLayerTwice,
        LastLayerFirst,
        FirstLayerLeftOut,
        HiddenStatesByName,
    ],
)
def test_layers_that_are_no_chain_are_refused(cls, spec):
    """And nothing stays switched on: a run goes on with its other strategies, a test process with its other tests."""
    model = toy(cls)
    off = gradients(model, toy_inputs(), "off")
    for _ in range(2):
        with pytest.raises(NotASegment):
            gradients(model, toy_inputs(), spec)
        assert_nothing_is_switched_on()
    assert differing(gradients(model, toy_inputs(), "per-layer"), off) == []


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
@pytest.mark.parametrize(
    "cls",
    [
        Toy,
        AllLayersTwice,
        ScaledInPlaceBetweenLayers,
        DrawsBetweenLayers,
        LastLayerOfAGroupLeftOut,
        LastLayerOfAllLeftOut,
    ],
)
def test_gradients_are_right_or_there_are_none(cls, spec):
    """The traps: hidden states that are changed in place are still the output of the layer before; random numbers that
    are drawn between layers are not drawn again; a group that is never ended takes in all that comes after it."""
    model = toy(cls)
    off = gradients(model, toy_inputs(), "off")
    try:
        ours = gradients(model, toy_inputs(), spec)
    except NotASegment:
        ours = off
    assert differing(ours, off) == []
    assert_nothing_is_switched_on()


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
def test_an_exception_between_two_layers_is_forgotten_by_the_next_step(spec):
    model = toy(StopsBetweenLayers)
    apply(model, spec)
    for _ in range(2):
        with pytest.raises(Boom):
            model(**toy_inputs())
    model.stops = False
    ours = gradients(model, toy_inputs())
    assert_nothing_is_switched_on()
    assert differing(ours, gradients(model, toy_inputs(), "off")) == []


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
def test_an_exception_between_two_layers_leaves_nothing_switched_on(spec):
    """The code of the model runs there, and memory may run out in it."""
    model = toy(StopsBetweenLayers)
    apply(model, spec)
    with pytest.raises(Boom):
        model(**toy_inputs())
    assert_nothing_is_switched_on()
