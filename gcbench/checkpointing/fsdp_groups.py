"""Which layers FSDP gathers the weights of together, as those of one group have to be."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch.nn import Module
from transformers.modeling_layers import GradientCheckpointingLayer


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_gathering(layers: Sequence[Module], groups: Sequence[Sequence[int]], model: Module, *call: object) -> None:
    """Raise ValueError where FSDP gathers the weights of one group's layers apart from one another.

    The group would be run again when the weights of its last layer alone are there.
    """
    units: dict[int, object] = {}
    _note_units(model, None, units)
    for group in groups:
        if len({id(units.get(id(layers[number]))) for number in group}) > 1:
            raise ValueError(
                f"layers {list(group)} are to be recomputed as one, and FSDP gathers the weights of each on its own; "
                "take groups of one layer, such as per-layer or every:2, or shard each group as one unit"
            )


def _note_units(module: Module, unit: object, units: dict[int, object]) -> None:
    """Under the id of each layer, what FSDP gathers it with."""
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
