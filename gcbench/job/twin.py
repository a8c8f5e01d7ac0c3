"""A user's model once more without weights, so that a look at what its code does asks nothing of the model itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from gcbench.checkpointing import own_way
from gcbench.job.layer_order import groups_of
from gcbench.strategies import Plan


def twin_of(model: PreTrainedModel) -> Module:
    """The same model without weights."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # runs on any device
    with torch.device("meta"):
        twin: Module = type(model)(config).to(torch.bfloat16)
    return twin


def own_plan(model: Module, every: Plan) -> Plan:
    """What the model's own checkpointing recomputes, seen on a twin; every layer where no look is possible."""
    if not isinstance(model, PreTrainedModel) or not own_way.is_all(model):
        return every
    try:
        groups = groups_of(twin_of(model))
    except Exception:  # a model's own code
        groups = None
    if groups == ():
        raise ValueError(f"the flag for checkpointing of {type(model).__name__} changes nothing; train it without")
    return every if groups is None else replace(every, groups=groups)
