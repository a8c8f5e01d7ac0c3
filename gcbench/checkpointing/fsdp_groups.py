"""Checks that FSDP gathers the weights of a group's layers together, as recomputing them as one needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch.nn import Module
from transformers.modeling_layers import GradientCheckpointingLayer


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_gathering(layers: Sequence[Module], groups: Sequence[Sequence[int]], model: Module, *call: object) -> None:
    """Raise ValueError where FSDP gathers the weights of one group's layers separately.

    The group would be recomputed while only the weights of its last layer are gathered.
    """
    units: dict[int, object] = {}
    _note_units(model, None, units)
    for group in groups:
        if len({id(units.get(id(layers[number]))) for number in group}) > 1:
            raise ValueError(
                f"layers {list(group)} are recomputed as one group, and FSDP gathers the weights of each separately; "
                "take groups of one layer, such as per-layer or every:2, or shard each group as one unit"
            )


def _note_units(module: Module, unit: object, units: dict[int, object]) -> None:
    """Note in `units`, under the id of each layer, the FSDP unit that gathers its weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        unit = module._get_fsdp_state()
    elif fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        unit = module
    if isinstance(module, GradientCheckpointingLayer):
        units[id(module)] = unit
        return
    for child in module.children():
        _note_units(child, unit, units)
