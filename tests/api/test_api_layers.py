"""`gcbench.apply`: the order in which layers run, and mistakes, which change nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from loops import (
    GEMMA3,
    LLAMA_LIKE,
    Broken,
    Compilable,
    assert_nothing_is_watched,
    build,
    differing,
    enable,
    runs_again,
    state,
    step,
)
from processes import PROCESS_TIMEOUT_S
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

import gcbench
from gcbench import api
from gcbench.checkpointing.segments import LayersNotSequential

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """gpt2 has dropout, whose masks a recomputation has to draw again."""
    return build(request.param)


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(2, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


# The order of layers


HALF = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}


def text_only(family):
    if family == "gemma3":
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"](**GEMMA3))
    from transformers.models.mllama import modeling_mllama as mllama

    values = {**LLAMA_LIKE, "num_hidden_layers": 6}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return mllama.MllamaForCausalLM(
        mllama.MllamaTextConfig(**values, cross_attention_layers=[1, 5], rope_parameters=rope)
    )


@pytest.mark.parametrize(
    ("family", "num_layers", "spec", "numbers"),
    [
        ("gemma3", 7, "first:2", (3, 4)),
        ("gemma3", 7, "segment:2", (3, 4, 5, 6)),
        ("gemma3", 7, "every:2", (0, 2, 4, 6)),
        ("mllama", 6, "last:2", (3, 4)),
    ],
)
def test_layers_are_counted_as_training_on_text_runs_them(inputs, family, num_layers, spec, numbers):
    """The traps: layers for images at the front, and in one list with the others. A stride counts all, as in
    transformers."""
    model = text_only(family).train()
    random_state, attention = torch.get_rng_state(), model.config._attn_implementation
    applied = gcbench.apply(model, spec)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.config._attn_implementation == attention
    assert applied.plan.num_layers == num_layers
    assert sum(applied.plan.groups, ()) == numbers
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if family == "gemma3" else {}
    model(**inputs, **types).loss.backward()
    assert applied.recomputed == {number for number in numbers if number > 2 or family != "gemma3"}


def test_the_caches_of_all_parts_are_put_back():
    model = text_only("gemma3")
    texts = [model.config.get_text_config(), model.model.language_model.config]
    texts[0].use_cache = True
    gcbench.apply(model, "per-layer")
    assert [config.use_cache for config in texts] == [False, False]
    gcbench.remove(model)
    assert [config.use_cache for config in texts] == [True, True]


@pytest.mark.parametrize(("spec", "groups"), [("segment:2", ((0, 1), (2, 3))), ("last:1", ((3,),))])
def test_both_halves_of_an_encoder_and_decoder(inputs, spec, groups):
    """Their layers are in two lists: the order is found on a twin, and the hook for groups is on what contains both."""
    torch.manual_seed(0)
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in HALF.items()}
    model = BartForConditionalGeneration(BartConfig(vocab_size=256, d_model=32, use_cache=False, **sizes)).train()
    off = step(model, inputs)
    assert gcbench.apply(model, spec).plan.groups == groups
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == sum(groups, ())


def test_an_ordinary_model_is_not_run_to_learn_its_order(monkeypatch, model):
    looks = []

    def fail(*call):
        looks.append(call)
        raise Broken

    monkeypatch.setattr(api, "order_of_twin", fail)
    for spec in ("first:2", "segment:2", "per-layer"):
        assert gcbench.apply(model, spec).plan.num_layers == 4
    assert looks == []
    monkeypatch.setattr(api, "_in_one_list", lambda *call: False)
    assert gcbench.apply(model, "first:2").plan.groups == ((0,), (1,))  # in `modules()` order where no look is possible
    assert len(looks) == 1


# Mistakes


class Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.policy, self.reference = build(), build()


@pytest.mark.parametrize(
    ("make", "strategy", "error", "words"),
    [
        (build, "per-leyer", ValueError, r"no strategy 'per-leyer'; did you mean per-layer\?"),
        (build, "every:9", ValueError, "every:9 needs at least 9 layers and the model has 4; use"),
        (build, "selective:mn", ValueError, r"^torch .* has no operator 'mn'; near names: min"),
        (build, 3, TypeError, "3 is not a strategy; pass one by name, like 'per-layer', or a gcbench.Plan"),
        (build, None, TypeError, "None is not a strategy; pass"),
        (build, gcbench.Plan(num_layers=3), ValueError, "plan is for 3 layers and LlamaForCausalLM has 4; make one"),
        (
            build,
            gcbench.Plan(num_layers=4, groups=((0,),), policies=(gcbench.Policy(keep=("nothing_like_it",)),)),
            ValueError,
            "has no operator 'nothing_like_it'; write",
        ),
        (build, "plan:nowhere.json", ValueError, "nowhere.json cannot be read .*; give"),
        (lambda: build("ctrl"), "per-layer", ValueError, "CTRLLMHeadModel does not support .*; train it without"),
        (lambda: torch.nn.Linear(2, 2), "off", ValueError, "Linear does not support .*; train it without"),
        (
            Several,
            "off",
            ValueError,
            r"several models \(LlamaForCausalLM and LlamaForCausalLM\); pass the one",
        ),
        (lambda: "llama", "off", TypeError, "'llama' is not a model; pass"),
    ],
)
def test_mistakes_are_reported_with_a_remedy(make, strategy, error, words):
    with pytest.raises(error, match=words) as raised:
        gcbench.apply(make(), strategy)
    assert ";" in str(raised.value) and "--" not in str(raised.value)


def test_offload_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="on a CPU they are there already; leave it out"):
        gcbench.apply(build(), "offload")


def test_layers_that_torch_would_recompute_as_well_are_refused():
    model = build()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    with pytest.raises(ValueError, match="recomputed twice; leave activation checkpointing out of the FSDP settings"):
        gcbench.apply(model, "per-layer")


def test_a_mistake_changes_nothing(model, inputs):
    gcbench.apply(model, "every:2")
    before = state(model)
    for wrong in ("every:9", "first:9", "nonsense", gcbench.Plan(num_layers=9), "selective:mn"):
        with pytest.raises(ValueError):
            gcbench.apply(model, wrong)
    assert state(model) == before
    assert runs_again(model, inputs) == (0, 2)


class Scaling(Compilable):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks) * 2
        return hidden


def test_a_group_that_does_not_run_as_one_says_what_to_take(inputs):
    model = Scaling("aa").train()
    gcbench.apply(model, "segment:2")
    ids = inputs["input_ids"] % 50
    with pytest.raises(
        LayersNotSequential, match="between the layers of a group; take groups of one layer, such as per-layer"
    ):
        model(ids, ids)
    assert_nothing_is_watched()


# Imported


def test_only_what_trains_imports_torch():
    probe = (
        "import sys, gcbench\n"
        "assert gcbench.Plan(num_layers=1, groups=((0,),), policies=(gcbench.Policy(),)).layers_checkpointed == 1\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert {'apply', 'remove', 'Plan', 'Policy'} <= set(gcbench.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, timeout=PROCESS_TIMEOUT_S)
    assert gcbench.apply is api.apply and gcbench.remove is api.remove
    with pytest.raises(AttributeError, match="module 'gcbench' has no attribute 'appply'"):
        _ = gcbench.appply


def test_transformers_own_function_still_checkpoints_by_the_same_switch():
    """What `apply` relies on: a flag and a function of each layer, which `enable` sets too."""
    model = build()
    enable(model)
    assert {layer._gradient_checkpointing_func.func for layer in model.model.layers} == {checkpoint}
