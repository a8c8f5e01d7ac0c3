"""Explains a step's peak: where it is, what is alive there, and the memory over the step. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gcbench.core.prediction import Curve, Explanation, LayerShare, Lever, Share
from gcbench.simulate.compose.block_kinds import KIND_NAMES, Kind
from gcbench.simulate.compose.whole_step import Assembly
from gcbench.simulate.timeline import Peak

Ints = npt.NDArray[np.int64]
_POINTS = 480
ROUNDING = "rounding of the allocator"


def explain(assembly: Assembly, peak: Peak, levers: Sequence[Lever]) -> Explanation:
    """Break down what is alive at the peak by kind and by layer, and name the operator that reached it."""
    line = assembly.timeline
    alive = _alive(assembly, peak.at)
    sizes = np.bincount(assembly.kinds[alive], weights=line.nbytes[alive], minlength=len(Kind)).astype(np.int64)
    shares = [Share(kind=KIND_NAMES[kind], nbytes=int(sizes[kind])) for kind in Kind if sizes[kind]]
    rounding = peak.memory.allocated_bytes - int(sizes.sum())
    if rounding:
        shares.append(Share(kind=ROUNDING, nbytes=rounding))
    event = int(line.events[peak.at])
    block = assembly.block(event) if event >= 0 else None
    layer = int(assembly.layers[event]) if event >= 0 else -1
    return Explanation(
        op=plain_op(block.op) if block is not None and block.op is not None else None,
        layer=layer if layer >= 0 else None,
        part=assembly.part(peak.at),
        shares=tuple(sorted(shares, key=lambda share: -share.nbytes)),
        kept=_by_layer(assembly, alive),
        levers=tuple(levers),
    )


def fallback_bytes(assembly: Assembly, peak: Peak) -> int:
    """Bytes of the peak allocated by PyTorch code in place of a package's fused kernel."""
    is_alive = np.zeros(len(assembly.timeline.nbytes), np.bool_)
    is_alive[_alive(assembly, peak.at)] = True
    are_fallbacks: dict[int, npt.NDArray[np.bool_]] = {}
    total = 0
    for start, blocks in assembly.block_ranges:
        if id(blocks) not in are_fallbacks:
            are_fallbacks[id(blocks)] = np.array([block.fallback for block in blocks], np.bool_)
        here = slice(start, start + len(blocks))
        total += int(assembly.timeline.nbytes[here][is_alive[here] & are_fallbacks[id(blocks)]].sum())
    return total


def curve(assembly: Assembly) -> Curve:
    """The memory over the measured step by kind, reduced to a few hundred points that include every peak."""
    line = assembly.timeline
    begin = line.marks[0][0]
    events = line.events[begin:]
    allocates = events >= 0
    blocks = np.where(allocates, events, ~events)
    change = np.where(allocates, line.nbytes[blocks], -line.nbytes[blocks])
    alive = _alive(assembly, begin - 1)
    before = np.bincount(assembly.kinds[alive], weights=line.nbytes[alive], minlength=len(Kind)).astype(np.int64)
    of_kind = assembly.kinds[blocks]
    by_kind = np.stack([before[kind] + np.cumsum(np.where(of_kind == kind, change, 0)) for kind in Kind])
    total = by_kind.sum(axis=0)
    edges = np.unique(np.linspace(0, len(events), _POINTS + 1).astype(int))
    points = np.array([start + int(np.argmax(total[start:end])) for start, end in pairwise(edges)])
    present = [kind for kind in Kind if by_kind[kind].any()]
    return Curve(
        kinds=tuple(KIND_NAMES[kind] for kind in present),
        nbytes=tuple(tuple(int(size) for size in by_kind[kind][points]) for kind in present),
        phases=tuple((phase, int(np.searchsorted(edges, start - begin))) for start, phase in line.marks),
    )


def without_logits(assembly: Assembly, chunks: int) -> Ints:
    """The blocks' sizes if the loss were computed in `chunks` parts, so that logits exist for one part at a time."""
    sizes = assembly.timeline.nbytes
    return np.where(assembly.kinds == Kind.LOGITS, -(-sizes // chunks), sizes)


def _alive(assembly: Assembly, at: int) -> Ints:
    """The blocks alive after the event `at`."""
    events = assembly.timeline.events[: at + 1]
    is_alive = np.zeros(len(assembly.timeline.nbytes), np.bool_)
    is_alive[events[events >= 0]] = True
    is_alive[~events[events < 0]] = False
    return np.flatnonzero(is_alive)


def _by_layer(assembly: Assembly, alive: Ints) -> tuple[LayerShare, ...]:
    """What each layer saves for the backward pass, with runs of equal layers merged."""
    saved = alive[np.isin(assembly.kinds[alive], (Kind.SAVED, Kind.LAYER_INPUTS)) & (assembly.layers[alive] >= 0)]
    if not len(saved):
        return ()
    sizes = np.bincount(assembly.layers[saved], weights=assembly.timeline.nbytes[saved]).astype(np.int64)
    runs: list[LayerShare] = []
    for layer, nbytes in enumerate(sizes.tolist()):
        if runs and runs[-1].nbytes == nbytes and runs[-1].last == layer - 1:
            runs[-1] = LayerShare(first=runs[-1].first, last=layer, nbytes=nbytes)
        elif nbytes:
            runs.append(LayerShare(first=layer, last=layer, nbytes=nbytes))
    return tuple(runs)


def plain_op(op: str) -> str:
    """`_softmax.default` as `_softmax`."""
    name, _, overload = op.partition(".")
    rest = overload.partition(": ")[2]
    return f"{name} ({rest})" if rest else name
