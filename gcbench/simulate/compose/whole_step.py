"""Assembles a step: resident memory, the passes of the first step and its update, then the measured step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gcbench.simulate import timeline
from gcbench.simulate.compose.block_kinds import Kind, LayerPolicy, classify_full_trace, classify_passes
from gcbench.simulate.compose.passes import Passes
from gcbench.simulate.compose.resident import ResidentMemory, positions_in_trace, request_positions
from gcbench.simulate.compose.step_timeline import are_allocations_of, persistent_blocks, state_blocks, step_timeline
from gcbench.simulate.events import Block, Trace
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.fake_model import NotComposable, Section
from gcbench.simulate.trace.optimizer_step import UpdateTrace

Ints = npt.NDArray[np.int64]


_MOST_PERSISTENT_BYTES = 4096
"""What a step may leave allocated besides gradients, as a gradient scaler does. Larger ones are replaced each step."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A timeline whose blocks are known.

    Attributes:
        kinds: for each block, a `Kind`.
        layers: for each block, the layer that it serves; -1 for none.
        block_ranges: (number of the first, blocks), ascending; what is known of each block.
        section_starts: (number of events before it, its name in words), of the measured step, ascending.
        sections: the sections that `section_starts` names, without the optimizer step; empty if the step was traced in
            full.
    """

    timeline: Timeline
    kinds: npt.NDArray[np.int8]
    layers: npt.NDArray[np.int32]
    block_ranges: tuple[tuple[int, Sequence[Block]], ...]
    section_starts: tuple[tuple[int, str], ...]
    sections: tuple[Section, ...] = ()

    def part(self, event: int) -> str:
        """The section of the measured step that an event is in, in words."""
        starts = [start for start, _ in self.section_starts]
        return self.section_starts[max(int(np.searchsorted(starts, event, side="right")) - 1, 0)][1]

    def block(self, number: int) -> Block:
        """What is known of one block."""
        starts = [start for start, _ in self.block_ranges]
        start, blocks = self.block_ranges[int(np.searchsorted(starts, number, side="right")) - 1]
        return blocks[number - start]


def assemble(
    passes: Passes,
    update: UpdateTrace,
    gradients: Sequence[int],
    *,
    resident: Sequence[ResidentMemory],
    policies: Mapping[int, LayerPolicy | None],
    layers: Sequence[int],
    vocab_size: int | None,
) -> Assembly:
    """The step after the first one, from an empty device on.

    Args:
        gradients: for each parameter of `update`, the block of its gradient in `passes`.
        policies: layer -> how it is recomputed; None if it is not checkpointed.
        layers: the layers of `passes`, in order.
        vocab_size: blocks whose last dimension is of this size are logits.

    Raises:
        NotComposable: the passes leave more allocated than gradients.
    """
    persistent = persistent_blocks(passes.events, passes.num_blocks, gradients)
    if passes.nbytes()[persistent].sum() > _MOST_PERSISTENT_BYTES:
        raise NotComposable("the model keeps tensors from one step to the next")
    line = step_timeline(
        passes.events,
        _sizes(resident, passes, update),
        gradients,
        num_blocks=passes.num_blocks,
        backward_at=passes.backward_at,
        update_at=passes.update_at,
        requested=request_positions(resident, passes),
        update=update,
    )
    kinds, of_layers = classify_passes(
        passes, gradients, policies=policies, layers=layers, vocab_size=vocab_size, persistent=persistent
    )
    outside_resident = np.full(len(resident), -1, np.int32)
    outside_update = np.full(len(update.own), -1, np.int32)
    of_resident = np.array([term.kind for term in resident], np.int8)
    (begin, _), _, (update_begins, _) = line.marks
    is_once = are_allocations_of(passes.events, persistent, passes.num_blocks)
    return Assembly(
        timeline=line,
        kinds=np.concatenate([of_resident, kinds, _update_kinds(update), kinds]),
        layers=np.concatenate([outside_resident, of_layers, outside_update, of_layers]),
        block_ranges=_block_ranges(resident, passes, update),
        section_starts=_section_starts(passes, is_once, begin, update_begins),
        sections=tuple(section for section, _, _ in passes.instances),
    )


def assemble_full_trace(
    trace: Trace,
    gradients: Collection[int],
    *,
    resident: Sequence[ResidentMemory],
    num_params: int,
    vocab_size: int | None,
) -> Assembly:
    """A step traced in full, in which nothing is known of layers.

    Args:
        gradients: blocks of the measured step's gradients.
        num_params: how many of the first blocks hold parameters.
    """
    line = timeline.of_trace(
        trace, resident=[term.nbytes for term in resident], requested=positions_in_trace(resident, trace)
    )
    blocks = [*(Block(term.nbytes, term.name) for term in resident), *trace.blocks]
    (begin, _), (backward, _), (update, _) = line.marks
    return Assembly(
        timeline=line,
        kinds=classify_full_trace(
            line,
            blocks,
            gradients,
            resident=[term.kind for term in resident],
            num_params=num_params,
            vocab_size=vocab_size,
        ),
        layers=np.full(len(blocks), -1, np.int32),
        block_ranges=((0, blocks),),
        section_starts=((begin, "forward pass"), (backward, "backward pass"), (update, "optimizer step")),
    )


def _sizes(resident: Sequence[ResidentMemory], passes: Passes, update: UpdateTrace) -> Ints:
    """The size of each block: resident, the first step's passes, its update, the measured step's passes."""
    of_passes = passes.nbytes()
    of_resident = np.array([term.nbytes for term in resident], np.int64)
    of_update = np.array([block.nbytes for block in update.own], np.int64)
    return np.concatenate([of_resident, of_passes, of_update, of_passes])


def _update_kinds(update: UpdateTrace) -> npt.NDArray[np.int8]:
    """The kind of each of the update's own blocks."""
    is_state = np.isin(np.arange(len(update.own)) + update.num_params, state_blocks(update))
    return np.where(is_state, Kind.OPTIMIZER, Kind.TEMPORARY).astype(np.int8)


def _block_ranges(
    resident: Sequence[ResidentMemory], passes: Passes, update: UpdateTrace
) -> tuple[tuple[int, Sequence[Block]], ...]:
    """(number of the first, blocks), without empty ranges but the resident one."""
    first_step = len(resident)
    first_update = first_step + passes.num_blocks
    second_step = first_update + len(update.own)
    ranges: list[tuple[int, Sequence[Block]]] = [
        *((first_step + base, trace.blocks) for _, trace, base in passes.instances),
        (first_update, update.own),
        *((second_step + base, trace.blocks) for _, trace, base in passes.instances),
    ]
    return (
        (0, [Block(term.nbytes, term.name) for term in resident]),
        *((start, blocks) for start, blocks in ranges if len(blocks)),
    )


_OUTSIDE_LAYERS = {
    "before": "before the layers, forward",
    "head": "norm, logits and loss, forward",
    "loss": "loss and logits, backward",
    "rest": "before the layers, backward",
}


def _section_starts(
    passes: Passes, is_once: npt.NDArray[np.bool_], begin: int, update_begins: int
) -> tuple[tuple[int, str], ...]:
    """Where each section of the passes begins in the measured step, and the optimizer's update.

    `is_once` says of each event whether only the first step has it.
    """
    dropped = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_once)])
    named = [
        (
            begin + int(start - dropped[start]),
            f"layer {layer}, {part}" if layer >= 0 else _OUTSIDE_LAYERS[part],
        )
        for start, ((part, layer), _, _) in zip(passes.starts.tolist(), passes.instances, strict=True)
    ]
    return (*named, (update_begins, "optimizer step"))
