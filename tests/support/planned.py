"""Tiny models with the policies found for them: what tests of keeping, of its prediction and of plans share."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import tiny
import torch

from gcbench.checkpointing import apply as checkpointing
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.plan.policies.layer_policies import uniform_plans
from gcbench.simulate.costs import CardFigures
from gcbench.simulate.predictor import Predictor
from gcbench.strategies import Plan, Policy
from gcbench.training import step as training

LAYERS = 3
"""The first, the last, and one between them."""
BATCH_SIZE = 2
FAMILIES = {
    **tiny.CHECKPOINTING,
    # Attention and MLP beside each other; dropout in three places.
    "phi": {"model_type": "phi", **tiny.LLAMA_LIKE, "resid_pdrop": 0.1, "attention_dropout": 0.1},
    # Writes keys into an empty tensor, slice by slice, and routes in groups.
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **tiny.LLAMA_LIKE,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    # Writes into views of a tensor of zeros, so that autograd makes views anew.
    "qwen3_next": {
        "model_type": "qwen3_next",
        **tiny.LLAMA_LIKE,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
SEQ_LENS = {"mamba": 4, "qwen3_next": 4}
"""Of families that loop over the sequence; else 12."""


class Traffic:
    """Figures in which every byte and every operation counts, and a call nothing: other policies pay than on a card."""

    source = "bytes and operations"
    step_s = 0.0

    def seconds(self, work):
        return 0.0 if work.kind == "view" else work.nbytes / 1e9 + work.flops / 1e10

    def host_s(self, work):
        return 0.0


FIGURES = {"launches": CardFigures(None), "traffic": Traffic()}
"""At these sizes a card's calls are launches, one like the other."""


def seq_len(family):
    return SEQ_LENS.get(family, 12)


def source_of(family):
    return ModelSource(name=family, origin="", config=FAMILIES[family], location="")


def config_of(family, layers=LAYERS, **overrides):
    return models.build_config(source_of(family), layers=layers, overrides=overrides)


def predictor_of(family, precision="fp32", *, layers=LAYERS, optim="sgd", exact=False, **kwargs):
    meta = models.build_meta(config_of(family, layers), dtype=training.parameter_dtype(precision))
    return Predictor(meta, precision=precision, optim=optim, exact=exact, **kwargs)


def found_plans(family, precision="fp32", layers=LAYERS, most=3):
    """All plans that are found for a family, each once, from the fewest bytes kept on for either figures."""
    return _found_plans(family, precision, layers, most)


@cache
def _found_plans(family, precision, layers, most):
    fake_model = predictor_of(family, precision, layers=layers).fake_model
    found = []
    for figures in FIGURES.values():
        found += uniform_plans(fake_model, range(layers), figures, seq_len=seq_len(family), most=most)
    return tuple(dict.fromkeys(found))


def model_of(family, precision="fp32", layers=LAYERS):
    return _model(family, precision, layers)


@cache
def _model(family, precision, layers):
    dtype = training.parameter_dtype(precision)
    config = config_of(family, layers)
    model = models.build(source_of(family), config, device="cpu", dtype=dtype, attn_implementation=None, seed=0)
    return model.train()


@dataclass(frozen=True)
class Trained:
    """What one forward and backward pass left behind."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    random_state: torch.Tensor
    recomputed: frozenset[int]


def trained(family, plan=None, precision="fp32", layers=LAYERS, batch_size=BATCH_SIZE):
    """One forward and backward pass under a plan (nothing checkpointed without one)."""
    model = model_of(family, precision, layers)
    batch = training.random_batch(model, batch_size=batch_size, seq_len=seq_len(family), seed=0)
    autocast = training.PRECISIONS[precision][1]
    counter = checkpointing.apply(model, plan or Plan(num_layers=layers))
    torch.manual_seed(0)
    try:
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            loss = model(**training.forward_inputs(model, batch)).loss
        loss.backward()
        return Trained(
            loss=loss.detach(),
            gradients={name: param.grad for name, param in model.named_parameters() if param.grad is not None},
            random_state=torch.get_rng_state(),
            recomputed=frozenset(counter.layers),
        )
    finally:
        checkpointing.clear(model)
        model.zero_grad()


def trained_off(family, precision="fp32", layers=LAYERS, batch_size=BATCH_SIZE):
    return _trained_off(family, precision, layers, batch_size)


@cache
def _trained_off(family, precision, layers, batch_size):
    return trained(family, None, precision, layers, batch_size)


def assert_as_off(family, plan, precision="fp32", layers=LAYERS, batch_size=BATCH_SIZE):
    """Under the plan all is as without one, bit by bit, and the layers of the plan did run again."""
    off = trained_off(family, precision, layers, batch_size)
    found = trained(family, plan, precision, layers, batch_size)
    assert torch.equal(found.loss, off.loss)
    assert torch.equal(found.random_state, off.random_state)
    assert found.gradients.keys() == off.gradients.keys()
    for name, gradient in found.gradients.items():
        assert type(gradient) is torch.Tensor, name
        assert torch.equal(gradient, off.gradients[name]), name
    assert found.recomputed == {layer for group in plan.groups for layer in group}


def mixed(rng, plans, layers):
    """Each layer under a policy of some plan, under none, plainly recomputed, or beside the next one in a segment."""
    groups, policies, layer = [], [], 0
    while layer < layers:
        kind = rng.choice(["policy", "policy", "policy", "plain", "off", "segment"])
        size = 2 if kind == "segment" and layer + 1 < layers else 1
        if kind != "off":
            groups.append(tuple(range(layer, layer + size)))
            found = rng.choice(plans).policies[layer] if kind == "policy" else Policy()
            policies.append(found)
        layer += size
    return Plan(num_layers=layers, groups=tuple(groups), policies=tuple(policies))
