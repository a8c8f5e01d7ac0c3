"""`gcbench.apply` on wrapped models, peft's and compiled ones, and in passes that are cut short."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from loops import (
    ALL,
    Broken,
    Compilable,
    assert_nothing_is_watched,
    build,
    config_of,
    differing,
    runs_again,
    state,
    step,
)
from transformers import AutoModel, AutoModelForCausalLM

import gcbench
from gcbench.checkpointing import apply as checkpointing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """gpt2 has dropout, whose masks a recomputation has to draw again."""
    return build(request.param)


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(2, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def peft_model(base):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers by a name that is on its way out
        return peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )


def open_adapters(model):
    """As after some steps: in the first, gradients of half the adapters are zero."""
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)


@pytest.mark.parametrize("spec", ["per-layer", "segment:2+selective:matmul", "reentrant"])
def test_adapters_of_peft(inputs, spec):
    """The trap in `reentrant`: no layer's input requires gradients where the embedding is frozen, so none get any."""
    model = peft_model(build())
    open_adapters(model)
    before, off = state(model), step(model, inputs)
    assert len(off) == 2 * 2 * tiny.NUM_LAYERS
    gcbench.apply(model, spec)
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == ALL
    gcbench.remove(model)
    assert state(model) == before
    assert differing(step(model, inputs), off) == []


class Around(torch.nn.Module):
    """Calls the `forward` of the model inside, as peft 0.18 does, and not the model: none of its hooks fire."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner.forward(**inputs)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_forward_pass_cut_short_ends_its_segment_whoever_calls_the_model(inputs, has_head):
    """The trap: an open segment would also contain everything that is saved for a backward pass later."""
    base = (AutoModelForCausalLM if has_head else AutoModel).from_config(config_of("llama")).train()
    layers = checkpointing.checkpointable_layers(base)
    model = Around(base)
    gcbench.apply(model, "segment:4")

    def fail(*call):
        raise Broken

    hook = layers[2].register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        model(input_ids=inputs["input_ids"])
    assert_nothing_is_watched()
    hook.remove()
    model(input_ids=inputs["input_ids"])[0].sum().backward()
    assert_nothing_is_watched()


def test_wrappers_may_be_removed_or_added_after_apply(inputs):
    model = build()
    holder = torch.nn.ModuleDict({"policy": model, "head": torch.nn.Linear(2, 2)})
    before = state(model)
    gcbench.apply(holder, "first:1")
    assert runs_again(model, inputs) == (0,)
    gcbench.apply(model, "last:1")
    assert runs_again(model, inputs) == (3,)
    gcbench.remove(holder)
    assert state(model) == before


def test_a_prepared_model(inputs):
    accelerate = pytest.importorskip("accelerate")
    model = build()
    off = step(model, inputs)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="no").prepare(model)
    gcbench.apply(prepared, "every:2")
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == (0, 2)


SKIPPING = gcbench.Plan(
    num_layers=3, groups=((1,),), policies=(gcbench.Policy(keep=("relu", "addmm#1"), skip=("addmm#0",)),)
)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method", "ignore:The .grad attribute")  # the compiler's own
@pytest.mark.parametrize(
    ("spec", "first", "counted"),
    [
        ("per-layer", "compile", None),
        ("per-layer", "apply", None),
        ("selective:addmm", "apply", None),
        ("segment:3", "compile", {0, 1, 2}),
        ("reentrant", "apply", {0, 1, 2}),
        (SKIPPING, "apply", {1}),
        ("offload", "apply", {0, 1, 2}),
    ],
    ids=["per-layer-late", "per-layer", "selective", "segment-late", "reentrant", "skipping", "offload"],
)
def test_a_compiled_model(offloading, spec, first, counted):
    """The traps: a compiler that cannot trace the counting fails, and compiles layers of a segment that disagree with
    their recomputation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Compilable("aaa").train()
    ids = torch.randint(2, 50, (2, 4))
    inputs = {"input_ids": ids, "labels": ids}
    off = step(model, inputs)
    if first == "apply":
        applied = gcbench.apply(model, spec)
    compiled = torch.compile(model, backend="aot_eager")
    if first == "compile":
        step(compiled, inputs)
        applied = gcbench.apply(compiled, spec)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step(compiled, inputs)
    for name, grad in off.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert applied.recomputed == counted
    gcbench.remove(compiled)
    torch._dynamo.reset()
    assert differing(step(model, inputs), off) == []
