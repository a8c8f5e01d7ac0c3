"""Builds a twin of a user's model without weights, to find out what the code does without running the model itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from gcbench.checkpointing import own_checkpointing
from gcbench.job.layer_order import groups_of
from gcbench.strategies import Plan


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
