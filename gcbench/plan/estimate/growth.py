"""Computes a step at a second batch size from steps traced at both, instead of tracing it there. No torch.

Whatever a layer saves, its operators are those of a step without checkpointing or with full recomputation. These two,
traced at both batch sizes, show what each block and each call becomes.
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
    """Raised for a block or call that was not seen, or that became two different things."""


class _Images(Generic[K, V]):
    """A mapping learned from examples; keys with contradicting examples are unknown."""

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
    """Maps blocks and calls at one batch size to those at another, learned from steps traced at both."""

    def __init__(self, pairs: Sequence[tuple[Step, Step]]) -> None:
        """`pairs` are steps of one model and length, each at both batch sizes."""
        self._blocks: _Images[object, int] = _Images()
        self._calls: _Images[object, tuple[int, int, tuple[int, ...], str]] = _Images()
        self._persistent: _Images[tuple[int, ...], tuple[int, ...]] = _Images()
        for low, high in pairs:
            self._learn(low, high)

    def _learn(self, low: Step, high: Step) -> None:
        if low.parts is None or high.parts is None:
            return
        self._persistent.learn(_persistent(low), _persistent(high))
        seen: set[int] = set()
        are_gradients = _gradients(low.parts)
        for (_, one, base), (_, two, _) in zip(low.parts.passes.instances, high.parts.passes.instances, strict=False):
            if id(one) in seen or len(one.blocks) != len(two.blocks) or len(one.works) != len(two.works):
                continue
            seen.add(id(one))
            for place, (block, grown) in enumerate(zip(one.blocks, two.blocks, strict=True), base):
                self._blocks.learn(_block_key(block, bool(are_gradients[place])), grown.nbytes)
            for work, done in zip(one.works, two.works, strict=True):
                self._calls.learn(_call_key(work), (done.nbytes, done.flops, done.dims, done.call))

    def grown(self, step: Step) -> Step | None:
        """A step at the larger batch size; None where a block or call of it is unknown.

        Its block sizes and operator work are exact; the blocks' shapes are those of the smaller batch size.
        """
        parts = step.parts
        if parts is None or step.update is None:
            return None
        try:
            persistent = np.array(self._persistent.of(_persistent(step)), np.int64)
            sizes: dict[int, Ints] = {}
            works: dict[int, tuple[Work, ...]] = {}
            are_gradients = _gradients(parts).tolist()
            for _, run, base in parts.passes.instances:
                if id(run) not in sizes:
                    keys = map(_block_key, run.blocks, are_gradients[base:])
                    sizes[id(run)] = np.fromiter(map(self._blocks.of, keys), np.int64, len(run.blocks))
                    works[id(run.works)] = tuple(map(self._done, run.works))
        except _Unknown:
            return None
        passes = [sizes[id(run)] for _, run, _ in parts.passes.instances]
        own = step.timeline.nbytes[len(persistent) + parts.passes.num_blocks :][: len(step.update.own)]
        line = replace(step.timeline, nbytes=np.concatenate([persistent, *passes, own, *passes]))
        return replace(
            step,
            assembly=replace(step.assembly, timeline=line),
            works=tuple((segment, works[id(calls)]) for segment, calls in step.works),
        )

    def _done(self, work: Work) -> Work:
        if work.kind == "view":
            return work  # a view moves no bytes at any size
        nbytes, flops, dims, call = self._calls.of(_call_key(work))
        return replace(work, nbytes=nbytes, flops=flops, dims=dims, call=call)


def _persistent(step: Step) -> tuple[int, ...]:
    assert step.parts is not None
    return tuple(term.nbytes for term in step.parts.resident)


def _gradients(parts: Parts) -> npt.NDArray[np.bool_]:
    """Which blocks of the passes are gradients of parameters, whose sizes do not depend on the batch size."""
    found = np.zeros(parts.passes.num_blocks, np.bool_)
    found[list(parts.gradients)] = True
    return found


def _block_key(block: Block, is_gradient: bool) -> object:
    return (block.op, block.shape, block.nbytes, is_gradient)


def _call_key(work: Work) -> object:
    return (work.op, work.kind, work.dtype, work.nbytes, work.flops, work.dims, work.call)
