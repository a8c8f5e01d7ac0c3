"""A layered trace cut into pieces, and any number of layers put together from them.

A piece is what one layer does in one pass: the blocks it takes, and the blocks, its own or others', that it gives back.
Others' are named by where they were taken: so many layers away, or in the part of the step outside the layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gcbench.simulate.costs import Work
from gcbench.simulate.events import Block
from gcbench.simulate.trace.fake_model import BEFORE, HEAD, LOSS, REST, LayeredTrace, NotComposable, Segment

Ints = npt.NDArray[np.int64]
Ref = tuple[str, int]
"""Where a block was taken: ("forward", layers away), ("backward", layers away), or a segment outside the layers."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What happens in one segment.

    Attributes:
        blocks: those taken in it.
        number: for each event, the block's number within the segment in which it was taken.
        frees: whether the event gives the block back.
        ref: for each event, an index into `refs`.
        works: what its operators have the device do, in order.
    """

    blocks: tuple[Block, ...]
    number: Ints
    frees: npt.NDArray[np.bool_]
    ref: Ints
    refs: tuple[Ref, ...]
    works: tuple[Work, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """All segments of one trace, and where the gradients lie.

    Attributes:
        by_segment: in order of time.
        gradients: id of a parameter -> (segment, number of the block within it).
        boundaries: (layer, where its input was taken relative to it, number of the block there).
        accumulated: id of a parameter -> (segment, number of its events before the gradient was complete).
    """

    by_segment: Mapping[Segment, Piece]
    gradients: Mapping[int, tuple[Segment, int]]
    boundaries: Mapping[int, tuple[Ref, int]]
    accumulated: Mapping[int, tuple[Segment, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward and backward pass of a whole model.

    Attributes:
        instances: (segment, the piece played in it, number of its first block), in order of time.
        events: `n` for the allocation of block n, `~n` for its release.
        num_blocks: blocks are numbered from 0 on.
        bases: segment -> number of the first block taken in it.
        backward_at: number of events before the backward pass.
        starts: number of events before each instance.
        boundaries: for each layer in the order of `layers`, the block of its input; -1 where it is not the step's own.
        events_after: for segments outside the layers, how many events there are after each of their piece's.
    """

    instances: tuple[tuple[Segment, Piece, int], ...]
    events: Ints
    num_blocks: int
    bases: Mapping[Segment, int]
    backward_at: int
    starts: Ints
    boundaries: tuple[int, ...]
    events_after: Mapping[Segment, Ints] = field(default_factory=dict)

    def moment(self, segment: Segment, offset: int) -> int:
        """Number of events up to and with the first `offset` of a segment's piece."""
        place = next(place for place, (other, _, _) in enumerate(self.instances) if other == segment)
        within = self.events_after.get(segment)
        return int(self.starts[place]) + (offset if within is None or offset == 0 else int(within[offset - 1]))

    def first(self, ops: Collection[str], *, backward: bool) -> int | None:
        """Number of events up to and with the first result of one of `ops` in a pass; None where none ran in it."""
        for start, (_, piece, base) in zip(self.starts.tolist(), self.instances, strict=True):
            if (start >= self.backward_at) == backward:
                for number, block in enumerate(piece.blocks):
                    if block.op in ops:
                        return int(start) + int(np.argmax(self.events[start:] == base + number)) + 1
        return None

    def nbytes(self) -> Ints:
        """The size of each block."""
        sizes = {id(piece): np.array([b.nbytes for b in piece.blocks], np.int64) for _, piece, _ in self.instances}
        return np.concatenate([np.zeros(0, np.int64), *(sizes[id(piece)] for _, piece, _ in self.instances)])


def cut(layered: LayeredTrace) -> Pieces:
    """The pieces of a trace; raises NotComposable when its segments are not those of layers run one by one."""
    trace = layered.trace
    starts = [start for start, _ in layered.segments]
    names = [name for _, name in layered.segments]
    if len(set(names)) != len(names) or names != _expected(names):
        raise NotComposable("the layers' passes are not in order")
    place: dict[int, tuple[Segment, int]] = {}
    order = {name: turn for turn, name in enumerate(_layer_order(names))}
    pieces: dict[Segment, Piece] = {}
    ends = [*starts[1:], len(trace.events)]
    works_of = layered.works or [()] * len(names)
    for name, start, end, works in zip(names, starts, ends, works_of, strict=True):
        taken: list[Block] = []
        numbers: list[int] = []
        refs: dict[Ref, int] = {}
        codes: list[int] = []
        frees: list[bool] = []
        for event in trace.events[start:end]:
            block = event if event >= 0 else ~event
            if event >= 0:
                place[block] = (name, len(taken))
                taken.append(trace.blocks[block])
            elif block not in place:
                raise NotComposable("the step gives back what was there before it")
            home, number = place[block]
            numbers.append(number)
            codes.append(refs.setdefault(_relative(name, home, order), len(refs)))
            frees.append(event < 0)
        pieces[name] = Piece(
            blocks=tuple(taken),
            number=np.array(numbers, np.int64),
            frees=np.array(frees, np.bool_),
            ref=np.array(codes, np.int64),
            refs=tuple(refs),
            works=works,
        )
    gradients = {}
    for param, block in layered.gradients.items():
        if block not in place:
            raise NotComposable("a gradient was there before the step")
        gradients[param] = place[block]
    boundaries = {
        layer: (_relative(("forward", layer), place[block][0], order), place[block][1])
        for layer, block in layered.boundaries.items()
        if block in place
    }
    accumulated = {}
    for param, moment in layered.accumulated.items():
        place_of = bisect_right(starts, max(moment - 1, 0)) - 1
        accumulated[param] = (names[place_of], moment - starts[place_of])
    return Pieces(by_segment=pieces, gradients=gradients, boundaries=boundaries, accumulated=accumulated)


def _layer_order(names: Sequence[Segment]) -> list[int]:
    return [layer for part, layer in names if part == "forward"]


def _expected(names: Sequence[Segment]) -> list[Segment]:
    """The segments in the order in which layers that run one by one have them."""
    layers = _layer_order(names)
    forward: list[Segment] = [("forward", layer) for layer in layers]
    backward: list[Segment] = [("backward", layer) for layer in reversed(layers)]
    return [BEFORE, *forward, HEAD, LOSS, *backward, *([REST] if names[-1] == REST else [])]


def _relative(here: Segment, home: Segment, order: Mapping[int, int]) -> Ref:
    """How `here` speaks of `home`: by distance between layers, by name otherwise."""
    if here[1] < 0 or home[1] < 0:
        return home
    return (home[0], order[home[1]] - order[here[1]])


def put_together(pieces: Pieces, layers: Sequence[int], stand_in: Sequence[int]) -> Passes:
    """The passes of a model whose layers `layers` (in order) behave as the kept layers `stand_in` do.

    Raises NotComposable when the pieces do not fit: a block given back twice, or before it was taken.
    """
    played = dict(zip(layers, stand_in, strict=True))
    images: dict[int, list[int]] = {}
    for layer, kept in played.items():
        images.setdefault(kept, []).append(layer)
    turn = {layer: number for number, layer in enumerate(layers)}

    instances: list[tuple[Segment, Piece, int]] = []
    base: dict[Segment, int] = {}
    total = 0
    forward: list[Segment] = [("forward", layer) for layer in layers]
    backward: list[Segment] = [("backward", layer) for layer in reversed(layers)]
    for segment in (BEFORE, *forward, HEAD, LOSS, *backward, REST):
        name = (segment[0], played[segment[1]]) if segment[1] >= 0 else segment
        piece = pieces.by_segment.get(name)
        if piece is None and segment == REST:
            continue
        if piece is None:
            raise NotComposable("a layer has no backward pass")
        instances.append((segment, piece, total))
        base[segment] = total
        total += len(piece.blocks)

    parts: list[Ints] = []
    events_after: dict[Segment, Ints] = {}
    given = np.zeros(total, np.bool_)
    for segment, piece, _ in instances:
        if segment[1] < 0:
            part, events_after[segment] = _outside(
                piece, base, {layer: images[kept] for layer, kept in played.items()}, given
            )
        else:
            here = turn[segment[1]]
            bases = np.array([base[_resolve(ref, here, layers)] for ref in piece.refs], np.int64)
            blocks = bases[piece.ref] + piece.number if len(piece.ref) else piece.number
            part = np.where(piece.frees, ~blocks, blocks)
        given[~part[part < 0]] = True
        parts.append(part)
    events = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    _check(events, total)
    loss = next(number for number, (segment, _, _) in enumerate(instances) if segment == LOSS)
    inputs = [pieces.boundaries.get(played[layer]) for layer in layers]
    boundaries = [
        -1 if found is None else base[_resolve(found[0], here, layers)] + found[1] for here, found in enumerate(inputs)
    ]
    return Passes(
        instances=tuple(instances),
        events=events,
        num_blocks=total,
        bases=base,
        backward_at=int(starts[loss]),
        starts=starts,
        boundaries=tuple(boundaries),
        events_after=events_after,
    )


def _resolve(ref: Ref, here: int, layers: Sequence[int]) -> Segment:
    part, distance = ref
    if part not in ("forward", "backward"):
        return ref
    there = here + distance
    if not 0 <= there < len(layers):
        raise NotComposable("layers far from each other hold the same memory")
    return (part, layers[there])


def _outside(
    piece: Piece, base: Mapping[Segment, int], images: Mapping[int, Sequence[int]], given: npt.NDArray[np.bool_]
) -> tuple[Ints, Ints]:
    """The events of a segment outside the layers, and how many there are after each of the piece's.

    What it gives back of a kept layer it gives back of all its images that still hold it: the output of a layer is
    given back by the next layer, and that of the last but one by the head.
    """
    events: list[int] = []
    after: list[int] = []
    for number, frees, code in zip(piece.number.tolist(), piece.frees.tolist(), piece.ref.tolist(), strict=True):
        part, layer = piece.refs[code]
        homes: Sequence[Segment] = [(part, other) for other in images[layer]] if layer >= 0 else [(part, layer)]
        blocks = [base[home] + number for home in homes]
        events.extend(~block if frees else block for block in blocks if not (frees and layer >= 0 and given[block]))
        after.append(len(events))
    return np.array(events, np.int64), np.array(after, np.int64)


def _check(events: Ints, num_blocks: int) -> None:
    """Each block is taken once, and given back at most once and later."""
    times = np.arange(len(events))
    taken, given = events >= 0, events < 0
    taken_at = np.full(num_blocks, -1, np.int64)
    taken_at[events[taken]] = times[taken]
    freed = ~events[given]
    if np.count_nonzero(taken) != num_blocks or (taken_at < 0).any():
        raise NotComposable("a block is taken twice")
    if len(np.unique(freed)) != len(freed) or (taken_at[freed] > times[given]).any():
        raise NotComposable("a block is given back twice, or before it was taken")
