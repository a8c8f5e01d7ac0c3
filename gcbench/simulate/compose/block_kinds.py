"""Classifies each block of a step by what it is for: parameters, saved activations, gradients and so on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from gcbench.simulate.compose.layer_traces import SectionTrace
from gcbench.simulate.compose.passes import Passes
from gcbench.simulate.events import Block
from gcbench.simulate.timeline import Timeline
from gcbench.strategies import Policy

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.int8]


class Kind(IntEnum):
    """What a block is for, in the order in which a plot stacks them."""

    PARAMETERS = 0
    RESIDENT = 1
    OPTIMIZER = 2
    GRADIENTS = 3
    LAYER_INPUTS = 4
    SAVED = 5
    LOGITS = 6
    RECOMPUTED = 7
    TEMPORARY = 8


KIND_NAMES = {
    Kind.PARAMETERS: "parameters",
    Kind.RESIDENT: "inputs, buffers, workspaces",
    Kind.OPTIMIZER: "optimizer state",
    Kind.GRADIENTS: "gradients",
    Kind.LAYER_INPUTS: "boundaries",
    Kind.SAVED: "kept activations",
    Kind.LOGITS: "logits and loss",
    Kind.RECOMPUTED: "recomputed activations",
    Kind.TEMPORARY: "temporaries",
}
"""The names that reports store."""


@dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """How one layer is recomputed: its group's policy, its place in the group, and the group's size."""

    policy: Policy
    place: int
    size: int


def classify_passes(
    passes: Passes,
    gradients: Sequence[int],
    *,
    policies: Mapping[int, LayerPolicy | None],
    layers: Sequence[int],
    vocab_size: int | None,
    persistent: Ints,
) -> tuple[Kinds, npt.NDArray[np.int32]]:
    """The kind and the layer of each block of the passes."""
    is_saved = _freed_at(passes.events, passes.num_blocks) >= passes.backward_at
    kinds = np.full(passes.num_blocks, Kind.TEMPORARY, np.int8)
    of_layers = np.full(passes.num_blocks, -1, np.int32)
    masks: dict[int, tuple[Bools, Bools]] = {}
    for (part, layer), trace, base in passes.instances:
        if id(trace) not in masks:
            masks[id(trace)] = _logits_and_recomputed(trace, vocab_size)
        are_logits, are_recomputed = masks[id(trace)]
        here = slice(base, base + len(trace.blocks))
        of_layers[here] = layer
        if part in ("forward", "before", "head"):
            policy = policies.get(layer)
            saves_only_input = policy is not None and not policy.policy.keep
            kinds[here][is_saved[here]] = Kind.LAYER_INPUTS if saves_only_input else Kind.SAVED
        kinds[here][are_recomputed] = Kind.RECOMPUTED
        if layer < 0:
            kinds[here][are_logits] = Kind.LOGITS
    for layer, block in zip(layers, passes.layer_inputs, strict=True):
        policy = policies[layer]
        is_alive = block >= 0 and kinds[block] in (Kind.SAVED, Kind.LAYER_INPUTS)
        if is_alive and policy is not None and policy.place == 0:
            kinds[block], of_layers[block] = Kind.LAYER_INPUTS, layer
    kinds[np.array(gradients, np.int64)] = Kind.GRADIENTS
    kinds[persistent] = Kind.RESIDENT
    return kinds, of_layers


def classify_full_trace(
    line: Timeline,
    blocks: Sequence[Block],
    gradients: Collection[int],
    *,
    resident: Sequence[Kind],
    num_params: int,
    vocab_size: int | None,
) -> Kinds:
    """The kind of each block of a step traced in full, in which nothing is known of layers.

    Args:
        blocks: the resident blocks, then those of the trace, which begin with the parameters.
        gradients: numbers of the gradients' blocks in the trace.
        resident: the kinds of the resident blocks.
    """
    (begin, _), (backward, _), (update, _) = line.marks
    never = len(line.events)
    freed_at = _freed_at(line.events, len(blocks))
    allocated_at = np.zeros(len(blocks), np.int64)
    allocated_at[line.events[line.events >= 0]] = np.flatnonzero(line.events >= 0)
    kinds = np.full(len(blocks), Kind.TEMPORARY, np.int8)
    kinds[(allocated_at >= begin) & (allocated_at < backward) & (freed_at >= backward)] = Kind.SAVED
    for number, block in enumerate(blocks):
        if block.recomputed:
            kinds[number] = Kind.RECOMPUTED
        if begin <= allocated_at[number] < update and _is_logits(block, vocab_size):
            kinds[number] = Kind.LOGITS
    kinds[(allocated_at < begin) & (freed_at >= begin)] = Kind.OPTIMIZER
    kinds[(allocated_at >= update) & (freed_at == never)] = Kind.OPTIMIZER
    extra = len(resident)
    for number, block in enumerate(blocks):
        if block.op is None or number < extra:
            kinds[number] = Kind.RESIDENT
    kinds[:extra] = resident
    kinds[extra : extra + num_params] = Kind.PARAMETERS
    kinds[np.array(sorted(gradients), np.int64) + extra] = Kind.GRADIENTS
    return kinds


def _freed_at(events: Ints, num_blocks: int) -> Ints:
    """For each block, the number of the event that frees it; the number of all events if none does."""
    freed_at = np.full(num_blocks, len(events), np.int64)
    frees = events < 0
    freed_at[~events[frees]] = np.flatnonzero(frees)
    return freed_at


def _logits_and_recomputed(trace: SectionTrace, vocab_size: int | None) -> tuple[Bools, Bools]:
    """For each block of a section, whether it holds logits and whether it is recomputed."""
    are_logits = [_is_logits(block, vocab_size) for block in trace.blocks]
    are_recomputed = [block.recomputed for block in trace.blocks]
    return np.array(are_logits, np.bool_), np.array(are_recomputed, np.bool_)


def _is_logits(block: Block, vocab_size: int | None) -> bool:
    """Whether it holds a number per token and word: an embedding and its gradients have the words first."""
    return vocab_size is not None and len(block.shape) > 1 and block.shape[-1] == vocab_size
