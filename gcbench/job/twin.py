"""Builds a twin of a user's model without weights, to find out what the code does without running the model itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import own_checkpointing
from gcbench.job.layer_order import groups_of
from gcbench.simulate.trace.fake_model import FakeModel
from gcbench.strategies import Plan
from gcbench.training import step as training

_TRACED_TOKENS = 8


def twin_of(model: PreTrainedModel) -> Module:
    """Build the model again on the meta device, in bf16."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # runs on any device
    with torch.device("meta"):
        twin: Module = type(model)(config).to(torch.bfloat16)
    return twin


def own_plan(model: Module, every: Plan) -> Plan:
    """Make the plan of what a model's own checkpointing recomputes, found on a twin; `every` where that fails.

    Raises ValueError where it recomputes nothing.
    """
    if not isinstance(model, PreTrainedModel) or not own_checkpointing.is_all(model):
        return every
    try:
        groups = groups_of(twin_of(model))
    except Exception:  # a model's own code
        groups = None
    if groups == ():
        raise ValueError(
            f"the checkpointing flag of {type(model).__name__} changes nothing; train it without checkpointing"
        )
    return every if groups is None else replace(every, groups=groups)


def order_of_twin(model: PreTrainedModel, num_layers: int) -> tuple[int, ...] | None:
    """Find the numbers of the layers that a twin runs on text, in order; None where it has another number of them."""
    twin = twin_of(model)
    fake_model = FakeModel(twin, precision="bf16")
    if len(fake_model.layers) != num_layers:
        return None
    with checkpointing.layers_run(twin) as ran, fake_model.ready():
        twin(**training.forward_inputs(twin, torch.zeros(1, _TRACED_TOKENS, dtype=torch.int64)))
    return tuple(ran.order)
