"""Computes a step at any batch size from two traced ones: all block sizes and operator work are affine in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gcbench.devices.target import Target
from gcbench.operators.call_text import between
from gcbench.simulate.costs import Figures, Work
from gcbench.simulate.cuda.workspaces import MOST_UNSORTED
from gcbench.simulate.predictor import Predictor, Step
from gcbench.simulate.timeline import Timeline
from gcbench.strategies import Plan

TRACED = (2, 4)
"""Batch sizes to trace; not 1, at which operators skip copies of transposed tensors."""
_APART = TRACED[1] - TRACED[0]
_ROUNDED = 1.01
"""A block may be this many times what is proportional to the batch, since kernels round sizes up."""


def traced_at(target: Target, seq_len: int) -> tuple[int, int]:
    """The two batch sizes to trace, large enough that a device runs the kernels of larger batches."""
    low = TRACED[0] if target.kind == "cpu" else max(TRACED[0], MOST_UNSORTED // seq_len + 1)
    return low, low + _APART


class Scaling:
    """The steps of one plan at one sequence length, at any batch size."""

    def __init__(
        self,
        predictor: Predictor,
        plan: Plan,
        *,
        seq_len: int,
        pair: tuple[int, int] = TRACED,
        known: Mapping[int, Step] | None = None,
        grown: Step | None = None,
    ) -> None:
        """`pair` are the batch sizes to trace, `known` traced steps, `grown` replaces the trace at the larger size."""
        self.predictor, self.plan, self.seq_len = predictor, plan, seq_len
        self.pair = pair
        self._steps: dict[int, Step] = dict(known or {})
        self._grown = grown
        self._is_affine: bool | None = None
        self._works: dict[tuple[int, int], tuple[Work, ...]] = {}

    def traced(self, batch_size: int) -> Step:
        """The traced step; raises what the model's code raises on fake tensors (shapes and dtypes, no data)."""
        if batch_size not in self._steps:
            self._steps[batch_size] = self.predictor.step(self.plan, batch_size=batch_size, seq_len=self.seq_len)
        return self._steps[batch_size]

    def is_exact(self, batch_size: int) -> bool:
        """Whether `step` equals a trace at this batch size, as far as is known."""
        return batch_size >= self.pair[0] or batch_size in self._steps or not self.is_affine

    def step(self, batch_size: int) -> Step:
        """The step with exact block sizes and operator work; the blocks' shapes are those of a traced step.

        Smaller batches than the traced ones are computed too, except for copies that a single sequence does not need
        and kernels for few tokens.
        """
        if batch_size in self._steps or not self.is_affine:
            return self.traced(batch_size)
        low, high = self._pair
        works = tuple(
            (segment, self._scaled(one, two, batch_size))
            for (segment, one), (_, two) in zip(low.works, high.works, strict=True)
        )
        return replace(low, assembly=replace(low.assembly, timeline=self.line(batch_size)), works=works)

    def calls(self, batch_size: int) -> list[Work]:
        """Every call of the passes with its text at this batch size, so that it can be replayed."""
        step = self.step(batch_size)
        if batch_size in self._steps or not self.is_affine:
            return [work for _, works in step.works for work in works]
        low, high = self._pair
        more = batch_size - self.pair[0]
        written: dict[tuple[str, str], str] = {}
        found = []
        for (_, ones), (_, twos), (_, works) in zip(low.works, high.works, step.works, strict=True):
            for one, two, work in zip(ones, twos, works, strict=True):
                key = (one.call, two.call)
                if key not in written:
                    written[key] = between(*key, more, _APART)
                found.append(replace(work, call=written[key]))
        return found

    def line(self, batch_size: int) -> Timeline:
        """The step's timeline alone, which is quicker to compute."""
        if batch_size in self._steps or not self.is_affine:
            return self.traced(batch_size).timeline
        low, high = (step.timeline for step in self._pair)
        more = (high.nbytes - low.nbytes) // _APART
        return replace(low, nbytes=np.maximum(low.nbytes + (batch_size - self.pair[0]) * more, 0))

    def seconds(self, batch_size: int, figures: Figures) -> float:
        """The estimated time of the step."""
        return self.step(batch_size).seconds(figures)

    @property
    def _pair(self) -> tuple[Step, Step]:
        low, high = self.pair
        return self.traced(low), self._grown if self._grown is not None else self.traced(high)

    @property
    def is_affine(self) -> bool:
        """Whether steps of other batch sizes can be computed from the traced ones."""
        if self._is_affine is None:
            self._is_affine = _grow_evenly(*self._pair, self.pair)
        return self._is_affine

    def _scaled(self, low: tuple[Work, ...], high: tuple[Work, ...], batch_size: int) -> tuple[Work, ...]:
        key = (id(low), batch_size)
        if key not in self._works:
            self._works[key] = tuple(
                _at(one, two, batch_size - self.pair[0]) for one, two in zip(low, high, strict=True)
            )
        return self._works[key]


def _grow_evenly(low: Step, high: Step, pair: tuple[int, int]) -> bool:
    """Whether two steps have the same events and calls, with sizes that are affine in the batch size."""
    a, b = low.timeline, high.timeline
    return (
        np.array_equal(a.events, b.events)
        and a.marks == b.marks
        and len(a.nbytes) == len(b.nbytes)
        and not ((b.nbytes - a.nbytes) % _APART).any()
        # Not quadratic, as pairs of sequences are; kernels that round sizes up may be slightly above.
        and bool((pair[0] * b.nbytes <= _ROUNDED * pair[1] * a.nbytes).all())
        and len(low.works) == len(high.works)
        and all(
            segment == other and [(w.op, w.kind) for w in one] == [(w.op, w.kind) for w in two]
            for (segment, one), (other, two) in zip(low.works, high.works, strict=True)
        )
    )


def _at(low: Work, high: Work, more: int) -> Work:
    """The call with `more` sequences more than in `low`."""
    if (low.nbytes, low.flops, low.dims) == (high.nbytes, high.flops, high.dims):
        return low
    return replace(
        low,
        nbytes=max(low.nbytes + more * (high.nbytes - low.nbytes) // _APART, 0),
        flops=max(low.flops + more * (high.flops - low.flops) // _APART, 0),
        dims=tuple(one + more * (two - one) // _APART for one, two in zip(low.dims, high.dims, strict=True)),
    )
