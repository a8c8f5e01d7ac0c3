"""A step at a second batch size without a trace of its own: what it is made of has been seen to grow. No torch.

Whatever is kept of a layer, the operators that run are those of a step that keeps all or of one that keeps nothing. Of
these, traced at both batch sizes, it is known what each block and each call becomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gcbench.simulate.costs import Work
from gcbench.simulate.events import Block
from gcbench.simulate.predictor import Parts, Step

Ints = npt.NDArray[np.int64]
K = TypeVar("K")
V = TypeVar("V")


class _Unknown(Exception):
    """Never seen, or seen to become one thing and another."""


class _Images(Generic[K, V]):
    """What becomes of what; nothing is said of what became two things."""

    def __init__(self) -> None:
        self._known: dict[K, V | None] = {}

    def learn(self, one: K, image: V) -> None:
        if self._known.setdefault(one, image) != image:
            self._known[one] = None

    def of(self, one: K) -> V:
        image = self._known.get(one)
        if image is None:
            raise _Unknown
        return image


class Growth:
    """What blocks and calls at one batch size are at another, learned from steps traced at both."""

    def __init__(self, pairs: Sequence[tuple[Step, Step]]) -> None:
        """`pairs` are steps of one model and length, each at both batch sizes."""
        self._blocks: _Images[object, int] = _Images()
        self._calls: _Images[object, tuple[int, int, tuple[int, ...], str]] = _Images()
        self._standing: _Images[tuple[int, ...], tuple[int, ...]] = _Images()
        for low, high in pairs:
            self._learn(low, high)

    def _learn(self, low: Step, high: Step) -> None:
        if low.parts is None or high.parts is None:
            return
        self._standing.learn(_standing(low), _standing(high))
        seen: set[int] = set()
        are_gradients = _gradients(low.parts)
        for (_, one, base), (_, two, _) in zip(low.parts.passes.instances, high.parts.passes.instances, strict=False):
            if id(one) in seen or len(one.blocks) != len(two.blocks) or len(one.works) != len(two.works):
                continue
            seen.add(id(one))
            for place, (block, grown) in enumerate(zip(one.blocks, two.blocks, strict=True), base):
                self._blocks.learn(_told(block, bool(are_gradients[place])), grown.nbytes)
            for work, done in zip(one.works, two.works, strict=True):
                self._calls.learn(_asked(work), (done.nbytes, done.flops, done.dims, done.call))

    def grown(self, step: Step) -> Step | None:
        """A step at the larger batch size; None where that does not follow from what was learned.

        Its sizes and its operators' work are right; blocks' shapes are those of the smaller one.
        """
        parts = step.parts
        if parts is None or step.update is None:
            return None
        try:
            standing = np.array(self._standing.of(_standing(step)), np.int64)
            sizes: dict[int, Ints] = {}
            works: dict[int, tuple[Work, ...]] = {}
            are_gradients = _gradients(parts).tolist()
            for _, piece, base in parts.passes.instances:
                if id(piece) not in sizes:
                    told = map(_told, piece.blocks, are_gradients[base:])
                    sizes[id(piece)] = np.fromiter(map(self._blocks.of, told), np.int64, len(piece.blocks))
                    works[id(piece.works)] = tuple(map(self._done, piece.works))
        except _Unknown:
            return None
        passes = [sizes[id(piece)] for _, piece, _ in parts.passes.instances]
        own = step.timeline.nbytes[len(standing) + parts.passes.num_blocks :][: len(step.update.own)]
        line = replace(step.timeline, nbytes=np.concatenate([standing, *passes, own, *passes]))
        return replace(
            step,
            assembly=replace(step.assembly, timeline=line),
            works=tuple((segment, works[id(calls)]) for segment, calls in step.works),
        )

    def _done(self, work: Work) -> Work:
        if work.kind == "view":
            return work  # moves nothing at any size
        nbytes, flops, dims, call = self._calls.of(_asked(work))
        return replace(work, nbytes=nbytes, flops=flops, dims=dims, call=call)


def _standing(step: Step) -> tuple[int, ...]:
    assert step.parts is not None
    return tuple(term.nbytes for term in step.parts.resident)


def _gradients(parts: Parts) -> npt.NDArray[np.bool_]:
    """Which blocks of the passes are gradients of parameters: no batch size changes these."""
    found = np.zeros(parts.passes.num_blocks, np.bool_)
    found[list(parts.gradients)] = True
    return found


def _told(block: Block, is_gradient: bool) -> object:
    return (block.op, block.shape, block.nbytes, is_gradient)


def _asked(work: Work) -> object:
    return (work.op, work.kind, work.dtype, work.nbytes, work.flops, work.dims, work.call)
