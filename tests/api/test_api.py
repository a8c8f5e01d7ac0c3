"""`gcbench.apply` and `gcbench.remove` on a user's own models: as measured, and afterwards as before."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from loops import ALL, RECOMPUTED, build, differing, enable, runs_again, state, step
from transformers import AutoModelForCausalLM

import gcbench
from gcbench.devices.backends import open_device
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """gpt2 has dropout, whose masks a recomputation has to draw again."""
    return build(request.param)


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(2, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


# Applied


@pytest.mark.parametrize("spec", RECOMPUTED)
def test_gradients_are_unchanged_and_layers_are_recomputed(model, inputs, spec):
    off = step(model, inputs)
    applied = gcbench.apply(model, spec)
    assert differing(step(model, inputs), off) == []
    assert applied.recomputed == set(RECOMPUTED[spec])
    applied.reset()
    assert applied.recomputed == set()
    assert runs_again(model, inputs) == RECOMPUTED[spec]
    gcbench.remove(model)
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == ()


def test_a_plan_is_accepted_as_an_object_and_from_a_file(tmp_path, model, inputs):
    off = step(model, inputs)
    plan = gcbench.Plan(num_layers=4, groups=((1, 2), (3,)), policies=(gcbench.Policy(), gcbench.Policy(keep=("mm",))))
    assert gcbench.apply(model, plan).plan == plan
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == (1, 2, 3)
    file = tmp_path / "Plan.json"
    file.write_text(json.dumps({"groups": [{"layers": [2]}]}), encoding="utf-8")
    assert gcbench.apply(model, f"plan:{file}").plan == gcbench.Plan(num_layers=4, groups=((2,),))
    assert runs_again(model, inputs) == (2,)


def test_one_line_after_from_pretrained(tmp_path, inputs):
    build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    gcbench.apply(model, "per-layer")
    assert not model.training
    assert runs_again(model, inputs) == ()
    assert runs_again(model.train(), inputs) == ALL


def test_operator_outputs_are_saved(inputs):
    """The trap: a policy that is ignored recomputes all, with the same gradients and the same counts."""
    model, products = build(), {}

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products[spec] += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    for spec in ("off", "per-layer", "selective:matmul", "segment:2", "segment:2+selective:matmul"):
        products[spec] = 0
        gcbench.apply(model, spec)
        with Products():
            step(model, inputs)
    assert products["off"] < products["per-layer"]
    assert products["segment:2"] == products["per-layer"] + 2  # the last product of a group is not needed again
    assert products["off"] == products["selective:matmul"] == products["segment:2+selective:matmul"]


def test_offloaded_inputs_are_recomputed_from_host_memory(offloading, model, inputs):
    off = step(model, inputs)
    gcbench.apply(model, "every:2+offload")
    assert differing(step(model, inputs), off) == []
    assert offloading == [(2, 8, 32)] * 2
    assert runs_again(model, inputs) == (0, 2)


def test_nothing_is_recomputed_in_eval(inputs):
    model = build()
    applied = gcbench.apply(model, "per-layer")
    assert runs_again(model.eval(), inputs) == ()
    assert applied.recomputed == set()


def test_no_cache_is_built(inputs):
    """By default the forward pass of a layer that is not checkpointed fills a cache, which training never reads."""
    model = build(use_cache=True)
    before = state(model)
    assert model(**inputs).past_key_values is not None
    gcbench.apply(model, "every:2")
    assert model(**inputs).past_key_values is None
    gcbench.remove(model)
    assert state(model) == before
    assert model(**inputs).past_key_values is not None


# Removed, and applied again


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")  # the compiler, as it is first imported
@pytest.mark.parametrize("spec", [*RECOMPUTED, "compile", "compile:0.5", "per-layer+compile"])
def test_nothing_is_left_behind(model, spec):
    before = state(model)
    gcbench.apply(model, spec)
    assert state(model) != before
    gcbench.remove(model)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
def test_compiled_layers_and_the_budget_are_set():
    model = build()
    applied = gcbench.apply(model, "compile:0.5")
    assert torch._functorch.config.activation_memory_budget == 0.5
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert applied.recomputed is None
    gcbench.apply(model, "compile:0.25")
    gcbench.remove(model)
    assert torch._functorch.config.activation_memory_budget == 1.0
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_memory_goes_down_and_comes_back():
    """To the byte: the peaks of a step, before, while and after."""
    model = build(vocab_size=64)
    batch = training.random_batch(model, batch_size=2, seq_len=64, seed=0)
    one = training.TrainingStep(model, batch=batch, precision="fp32", optim="sgd", seed=0)

    def peaks():
        with open_device("cpu").probe_memory() as probe:
            one(probe.on_phase)
            one(probe.on_phase)
        found = probe.peaks()
        return found.forward_bytes, found.backward_bytes, found.optimizer_bytes

    before = peaks()
    gcbench.apply(model, "per-layer")
    while_on = peaks()
    gcbench.remove(model)
    assert while_on[0] < before[0] and while_on[1] < before[1]
    assert peaks() == before


@pytest.mark.parametrize("first", ["per-layer", "segment:2", "reentrant", "selective:matmul"])
def test_a_second_strategy_takes_the_place_of_the_first(model, inputs, first):
    """The trap: hooks and layers of the first that stay switched on."""
    before, off = state(model), step(model, inputs)
    gcbench.apply(model, "last:1")
    alone = state(model)
    gcbench.remove(model)
    gcbench.apply(model, first)
    gcbench.apply(model, "last:1")
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == (3,)
    hooks = [{name: vars_["_forward_hooks"] for name, vars_ in found[0].items()} for found in (alone, state(model))]
    assert hooks[0] == hooks[1]
    gcbench.remove(model)
    assert state(model) == before


def test_removing_twice_or_what_was_never_applied_does_nothing(model):
    before = state(model)
    gcbench.remove(model)
    assert state(model) == before
    gcbench.apply(model, "per-layer")
    gcbench.remove(model)
    enable(model)
    enabled = state(model)
    gcbench.remove(model)
    assert state(model) == enabled


@pytest.mark.parametrize("stride", [1, 2])
def test_transformers_own_checkpointing_is_replaced_and_put_back(model, inputs, stride):
    enable(model, every_n_layers=stride)
    before, own = state(model), runs_again(model, inputs)
    assert own == ALL[::stride]
    gcbench.apply(model, "last:1")
    assert runs_again(model, inputs) == (3,)
    gcbench.apply(model, "off")
    assert runs_again(model, inputs) == ()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    gcbench.remove(model)
    assert state(model) == before
    assert runs_again(model, inputs) == own


def test_a_deleted_model_is_freed():
    for spec in ("per-layer", "segment:2", "reentrant"):
        model = build()
        gcbench.apply(model, spec)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None, spec


@pytest.mark.parametrize("spec", ["every:2", "selective:matmul"])
def test_a_copy_is_a_model_of_its_own(inputs, spec):
    """As done for an average of the weights."""
    model = build()
    before = state(model)
    applied = gcbench.apply(model, spec)
    twin = copy.deepcopy(model)
    assert runs_again(twin, inputs) == RECOMPUTED.get(spec, ALL)
    assert applied.recomputed == set()
    gcbench.remove(twin)
    assert runs_again(twin, inputs) == ()
    assert runs_again(model, inputs) == RECOMPUTED[spec]
    gcbench.remove(model)
    assert state(model) == before
