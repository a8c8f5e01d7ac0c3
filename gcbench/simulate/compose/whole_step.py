"""Puts a step together: what stands, the passes of the first step and its update, then the measured step. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from gcbench.core.records import Phase
from gcbench.simulate import timeline
from gcbench.simulate.compose.layer_pieces import Passes
from gcbench.simulate.events import Block, Trace
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.fake_model import NotComposable, Segment
from gcbench.simulate.trace.optimizer_step import UpdateTrace
from gcbench.strategies import Policy

Ints = npt.NDArray[np.int64]


_MOST_KEPT_BYTES = 4096
"""What a step may leave behind besides gradients, as a gradient scaler does. What is more is replaced in every step."""


class Kind(IntEnum):
    """What a block is for, in the order in which a plot stacks them."""

    PARAMETERS = 0
    STANDING = 1
    OPTIMIZER = 2
    GRADIENTS = 3
    BOUNDARIES = 4
    KEPT = 5
    LOGITS = 6
    RECOMPUTED = 7
    TEMPORARY = 8


KIND_NAMES = {
    Kind.PARAMETERS: "parameters",
    Kind.STANDING: "inputs, buffers, workspaces",
    Kind.OPTIMIZER: "optimizer state",
    Kind.GRADIENTS: "gradients",
    Kind.BOUNDARIES: "boundaries",
    Kind.KEPT: "kept activations",
    Kind.LOGITS: "logits and loss",
    Kind.RECOMPUTED: "recomputed activations",
    Kind.TEMPORARY: "temporaries",
}


@dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """How one layer is recomputed: its group's policy, its place in the group, and the group's size."""

    policy: Policy
    place: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is there before the first step, and stays."""

    name: str
    nbytes: int
    kind: Kind
    requested_at: Phase | None = None
    """The phase of the first step that asks for it; None for what is there before."""
    requested_by: tuple[str, ...] = ()
    """Operators, the first of which asks for it, once its result is there."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A timeline whose blocks are known.

    Attributes:
        kinds: for each block, a `Kind`.
        layers: for each block, the layer that it serves; -1 for none.
        stretches: (number of the first, blocks), ascending; what is known of each block.
        segments: (number of events before it, where in the step), of the measured step, ascending.
        places: for each of the segments but the optimizer step, what it is; nothing where layers are not told apart.
    """

    timeline: Timeline
    kinds: npt.NDArray[np.int8]
    layers: npt.NDArray[np.int32]
    stretches: tuple[tuple[int, Sequence[Block]], ...]
    segments: tuple[tuple[int, str], ...]
    places: tuple[Segment, ...] = ()

    def part(self, event: int) -> str:
        """Where in the measured step an event is, in words."""
        starts = [start for start, _ in self.segments]
        return self.segments[max(int(np.searchsorted(starts, event, side="right")) - 1, 0)][1]

    def block(self, number: int) -> Block:
        """What is known of one block."""
        starts = [start for start, _ in self.stretches]
        place = int(np.searchsorted(starts, number, side="right")) - 1
        start, blocks = self.stretches[place]
        return blocks[number - start]


def assemble(
    passes: Passes,
    update: UpdateTrace,
    gradients: Sequence[int],
    *,
    standing: Sequence[Standing],
    treatments: Mapping[int, LayerPolicy | None],
    layers: Sequence[int],
    vocab_size: int | None,
) -> Assembly:
    """The step after the first one, from an empty device on.

    Args:
        gradients: for each parameter of `update`, the block of its gradient in `passes`.
        treatments: layer -> how it is recomputed; None where it is not.
        layers: the layers of `passes`, in order.
        vocab_size: blocks whose last dimension is of this size are logits.
    """
    num_standing, num_passes = len(standing), passes.num_blocks
    nbytes_of_passes = passes.nbytes()
    num_own = len(update.own)
    first_step, first_update = num_standing, num_standing + num_passes
    second_step = first_update + num_own
    persistent = _persistent(passes.events, num_passes, gradients)
    if nbytes_of_passes[persistent].sum() > _MOST_KEPT_BYTES:
        raise NotComposable("the model keeps tensors from one step to the next")
    stays = _among(passes.events, persistent, num_passes)
    nbytes = np.concatenate(
        [
            np.array([term.nbytes for term in standing], np.int64),
            nbytes_of_passes,
            np.array([block.nbytes for block in update.own], np.int64),
            nbytes_of_passes,
        ]
    )
    line = line_of(
        passes.events,
        nbytes,
        gradients,
        num_blocks=num_passes,
        backward_at=passes.backward_at,
        requested=requests(standing, passes),
        update=update,
    )
    (begin, _), _, (update_begins, _) = line.marks
    kinds, of_layers = _classified(
        passes, gradients, treatments=treatments, layers=layers, vocab_size=vocab_size, persistent=persistent
    )
    is_state = np.isin(np.arange(num_own) + update.num_params, states_of(update))
    stretches = [(first_step + base, piece.blocks) for _, piece, base in passes.instances]
    stretches += [(first_update, update.own)]
    stretches += [(second_step + base, piece.blocks) for _, piece, base in passes.instances]
    return Assembly(
        timeline=line,
        kinds=np.concatenate(
            [
                np.array([term.kind for term in standing], np.int8),
                kinds,
                np.where(is_state, Kind.OPTIMIZER, Kind.TEMPORARY).astype(np.int8),
                kinds,
            ]
        ),
        layers=np.concatenate(
            [np.full(num_standing, -1, np.int32), of_layers, np.full(num_own, -1, np.int32), of_layers]
        ),
        stretches=(
            (0, [Block(term.nbytes, term.name) for term in standing]),
            *((start, blocks) for start, blocks in stretches if len(blocks)),
        ),
        segments=_segments(passes, stays, begin, update_begins),
        places=tuple(segment for segment, _, _ in passes.instances),
    )


def requests(standing: Sequence[Standing], passes: Passes) -> tuple[int | None, ...]:
    """For each of what stands, the number of the passes' events before it; None where nothing asks for it.

    What is there before the first step has 0.
    """
    found: dict[tuple[Phase | None, tuple[str, ...]], int | None] = {}
    for term in standing:
        key = (term.requested_at, term.requested_by)
        if key not in found:
            backward = term.requested_at not in (None, "forward")
            begins = passes.backward_at if backward else 0
            found[key] = passes.first(term.requested_by, backward=backward) if term.requested_by else begins
    return tuple(found[term.requested_at, term.requested_by] for term in standing)


def line_of(
    events: Ints,
    nbytes: Ints,
    gradients: Sequence[int],
    *,
    num_blocks: int,
    backward_at: int,
    requested: Sequence[int | None],
    update: UpdateTrace,
    accumulated: Sequence[int] | None = None,
) -> Timeline:
    """The first step and the measured one, of passes with these events.

    Args:
        nbytes: the sizes of what stands, of the passes' blocks, of the update's own, and of the passes' once more; with
            `accumulated` a third time.
        gradients: for each parameter of `update`, the block of its gradient in the passes.
        num_blocks: how many the passes have.
        backward_at: number of the passes' events before the backward pass.
        requested: for each of what stands, the number of the passes' events before it; None where nothing asks for it.
        accumulated: for each gradient, the number of the passes' events after which it is added to what is there. If
            given, the measured step is the last micro-batch of several: it begins with all gradients, and ends with
            the update.
    """
    num_own = len(update.own)
    first_step, first_update = len(requested), len(requested) + num_blocks
    second_step = first_update + num_own
    stays = _among(events, _persistent(events, num_blocks, gradients), num_blocks)

    def numbered(events: Ints, step: int) -> Ints:
        return events + np.where(events >= 0, step, -step)

    def renumbered(events: Sequence[int], step: int) -> Ints:
        of_gradients = np.array(gradients, np.int64) + step
        table = np.concatenate([of_gradients, first_update + np.arange(num_own, dtype=np.int64)])
        values = np.array(events, np.int64)
        blocks = table[np.where(values >= 0, values, ~values)] if len(values) else values
        return np.where(values >= 0, blocks, ~blocks)

    asked = [(at, number) for number, at in enumerate(requested) if at is not None]
    opening = [
        np.insert(numbered(events, first_step), [at for at, _ in asked], [number for _, number in asked]),
        renumbered(update.first, first_step),
    ]
    settled_at = sum(map(len, opening))
    once, boundary = events[~stays], int(np.count_nonzero(~stays[:backward_at]))
    later = numbered(once, second_step)
    if accumulated is not None:
        opening.append(later)
        kept = np.cumsum(~stays)
        moments = [int(kept[at - 1]) if at else 0 for at in accumulated]
        third_step = second_step + num_blocks
        given = ~(np.array(gradients, np.int64) + third_step)
        later = np.insert(numbered(once, third_step), moments, given)
    measured = [later[:boundary], later[boundary:], renumbered(update.later, second_step)]
    begins = sum(map(len, opening)) + np.cumsum([0, *(len(part) for part in measured)])
    phases: tuple[Phase, ...] = ("forward", "backward", "optimizer")
    return Timeline(
        nbytes=nbytes,
        events=np.concatenate([*opening, *measured]),
        marks=tuple(zip(map(int, begins), phases, strict=False)),
        settled_at=(settled_at,),
    )


_PARTS = {
    "before": "before the layers, forward",
    "head": "norm, logits and loss, forward",
    "loss": "loss and logits, backward",
    "rest": "before the layers, backward",
}


def of_trace(
    trace: Trace, gradients: Collection[int], *, standing: Sequence[Standing], num_params: int, vocab_size: int | None
) -> Assembly:
    """A step traced in full, in which nothing is known of layers.

    Args:
        gradients: blocks of the measured step's gradients.
        num_params: how many of the first blocks hold parameters.
    """
    line = timeline.of_trace(trace, standing=[term.nbytes for term in standing])
    blocks = [*(Block(term.nbytes, term.name) for term in standing), *trace.blocks]
    (begin, _), (backward, _), (update, _) = line.marks
    never = len(line.events)
    freed_at = np.full(len(blocks), never, np.int64)
    freed_at[~line.events[line.events < 0]] = np.flatnonzero(line.events < 0)
    taken_at = np.zeros(len(blocks), np.int64)
    taken_at[line.events[line.events >= 0]] = np.flatnonzero(line.events >= 0)
    kinds = np.full(len(blocks), Kind.TEMPORARY, np.int8)
    kinds[(taken_at >= begin) & (taken_at < backward) & (freed_at >= backward)] = Kind.KEPT
    for number, block in enumerate(blocks):
        if block.recomputed:
            kinds[number] = Kind.RECOMPUTED
        if begin <= taken_at[number] < update and _is_logits(block, vocab_size):
            kinds[number] = Kind.LOGITS
    kinds[(taken_at < begin) & (freed_at >= begin)] = Kind.OPTIMIZER
    kinds[(taken_at >= update) & (freed_at == never)] = Kind.OPTIMIZER
    for number, block in enumerate(blocks):
        if block.op is None or number < len(standing):
            kinds[number] = Kind.STANDING
    extra = len(standing)
    kinds[:extra] = [term.kind for term in standing]
    kinds[extra : extra + num_params] = Kind.PARAMETERS
    kinds[np.array(sorted(gradients), np.int64) + extra] = Kind.GRADIENTS
    return Assembly(
        timeline=line,
        kinds=kinds,
        layers=np.full(len(blocks), -1, np.int32),
        stretches=((0, blocks),),
        segments=((begin, "forward pass"), (backward, "backward pass"), (update, "optimizer step")),
    )


def _among(events: Ints, blocks: Ints, num_blocks: int) -> npt.NDArray[np.bool_]:
    """Which of the events are allocations of these blocks."""
    wanted = np.zeros(num_blocks + 1, np.bool_)  # the last stands for every release
    wanted[blocks] = True
    return wanted[np.where(events >= 0, events, num_blocks)]


def _segments(
    passes: Passes, stays: npt.NDArray[np.bool_], begin: int, update_begins: int
) -> tuple[tuple[int, str], ...]:
    """Where each instance of the passes begins in the measured step, and the optimizer's update.

    `stays` tells of each event whether the measured step lacks it.
    """
    dropped = np.concatenate([np.zeros(1, np.int64), np.cumsum(stays)])
    named = [
        (
            begin + int(start - dropped[start]),
            f"layer {layer}, {part}" if layer >= 0 else _PARTS[part],
        )
        for start, ((part, layer), _, _) in zip(passes.starts.tolist(), passes.instances, strict=True)
    ]
    return (*named, (update_begins, "optimizer step"))


def _persistent(events: Ints, num_blocks: int, gradients: Sequence[int]) -> Ints:
    """Blocks that the passes take and never give back, other than gradients: later steps find them there."""
    freed = np.zeros(num_blocks, np.bool_)
    freed[~events[events < 0]] = True
    freed[np.array(gradients, np.int64)] = True
    return np.flatnonzero(~freed)


def _is_logits(block: Block, vocab_size: int | None) -> bool:
    """Whether it holds a number per token and word: an embedding and its gradients have the words first."""
    return vocab_size is not None and len(block.shape) > 1 and block.shape[-1] == vocab_size


def states_of(update: UpdateTrace) -> Ints:
    """Blocks of the update that outlive a phase."""
    kept = set(update.states)
    given = {~event for event in update.later if event < 0}
    kept |= {event for event in update.later if event >= 0 and event not in given}
    return np.array(sorted(kept), np.int64)


def _classified(
    passes: Passes,
    gradients: Sequence[int],
    *,
    treatments: Mapping[int, LayerPolicy | None],
    layers: Sequence[int],
    vocab_size: int | None,
    persistent: Ints,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """The kind and the layer of each block of the passes."""
    freed_at = np.full(passes.num_blocks, len(passes.events), np.int64)
    freed = passes.events < 0
    freed_at[~passes.events[freed]] = np.flatnonzero(freed)
    kinds = np.full(passes.num_blocks, Kind.TEMPORARY, np.int8)
    of_layers = np.full(passes.num_blocks, -1, np.int32)
    looks: dict[int, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = {}
    for (part, layer), piece, base in passes.instances:
        if id(piece) not in looks:
            wide = [_is_logits(block, vocab_size) for block in piece.blocks]
            again = [block.recomputed for block in piece.blocks]
            looks[id(piece)] = (np.array(wide, np.bool_), np.array(again, np.bool_))
        wide_here, again_here = looks[id(piece)]
        here = slice(base, base + len(piece.blocks))
        of_layers[here] = layer
        if part in ("forward", "before", "head"):
            kinds[here][freed_at[here] >= passes.backward_at] = Kind.KEPT
            treatment = treatments.get(layer)
            if treatment is not None and not treatment.policy.keep:
                kinds[here][freed_at[here] >= passes.backward_at] = Kind.BOUNDARIES
        kinds[here][again_here] = Kind.RECOMPUTED
        if layer < 0:
            kinds[here][wide_here] = Kind.LOGITS
    for layer, block in zip(layers, passes.boundaries, strict=True):
        treatment = treatments[layer]
        is_kept = block >= 0 and kinds[block] in (Kind.KEPT, Kind.BOUNDARIES)
        if is_kept and treatment is not None and treatment.place == 0:
            kinds[block], of_layers[block] = Kind.BOUNDARIES, layer
    kinds[np.array(gradients, np.int64)] = Kind.GRADIENTS
    kinds[persistent] = Kind.STANDING
    return kinds, of_layers
