"""A step at any batch size, from two that were traced: every block and every operator's work is affine in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gcbench.costs import Figures, Work
from gcbench.simulate.predictor import Predictor, Step
from gcbench.simulate.timeline import Timeline
from gcbench.strategies import Plan

TRACED = (2, 4)
"""Batch sizes; not 1, at which copies of transposed tensors are left out."""


class Scaling:
    """The steps of one plan and length; others than the traced ones are computed."""

    def __init__(
        self, predictor: Predictor, plan: Plan, *, seq_len: int, known: Mapping[int, Step] | None = None
    ) -> None:
        """`known` are steps that were traced already, by batch size."""
        self.predictor, self.plan, self.seq_len = predictor, plan, seq_len
        self._steps: dict[int, Step] = dict(known or {})
        self._are_alike: bool | None = None
        self._works: dict[tuple[int, int], tuple[Work, ...]] = {}

    def traced(self, batch_size: int) -> Step:
        """The step itself; raises what the model's code raises on tensors without values."""
        if batch_size not in self._steps:
            self._steps[batch_size] = self.predictor.step(self.plan, batch_size=batch_size, seq_len=self.seq_len)
        return self._steps[batch_size]

    def is_exact(self, batch_size: int) -> bool:
        """Whether `step` is what a trace at this batch size would be, as far as is known."""
        return batch_size >= TRACED[0] or batch_size in self._steps or not self.is_affine

    def step(self, batch_size: int) -> Step:
        """The step, of which the blocks' sizes and the operators' work are right, and the blocks' shapes are not.

        One sequence alone follows from the others too, but for copies that are left out then.
        """
        if batch_size in self._steps or not self.is_affine:
            return self.traced(batch_size)
        low, high = (self.traced(batch) for batch in TRACED)
        works = tuple(
            (segment, self._scaled(one, two, batch_size))
            for (segment, one), (_, two) in zip(low.works, high.works, strict=True)
        )
        return replace(low, assembly=replace(low.assembly, timeline=self.line(batch_size)), works=works)

    def line(self, batch_size: int) -> Timeline:
        """The step's timeline alone, which takes less to come by."""
        if batch_size in self._steps or not self.is_affine:
            return self.traced(batch_size).timeline
        low, high = (self.traced(batch).timeline for batch in TRACED)
        more = (high.nbytes - low.nbytes) // (TRACED[1] - TRACED[0])
        return replace(low, nbytes=low.nbytes + (batch_size - TRACED[0]) * more)

    def seconds(self, batch_size: int, figures: Figures) -> float:
        """How long the step takes; an estimate."""
        return self.step(batch_size).seconds(figures)

    @property
    def is_affine(self) -> bool:
        """Whether steps of other batch sizes follow from the traced ones."""
        if self._are_alike is None:
            low, high = (self.traced(batch) for batch in TRACED)
            self._are_alike = _alike(low, high)
        return self._are_alike

    def _scaled(self, low: tuple[Work, ...], high: tuple[Work, ...], batch_size: int) -> tuple[Work, ...]:
        key = (id(low), batch_size)
        if key not in self._works:
            self._works[key] = tuple(_at(one, two, batch_size) for one, two in zip(low, high, strict=True))
        return self._works[key]


def _alike(low: Step, high: Step) -> bool:
    a, b = low.timeline, high.timeline
    apart = TRACED[1] - TRACED[0]
    return (
        np.array_equal(a.events, b.events)
        and a.marks == b.marks
        and len(a.nbytes) == len(b.nbytes)
        and not ((b.nbytes - a.nbytes) % apart).any()
        and bool((TRACED[0] * b.nbytes <= TRACED[1] * a.nbytes).all())  # not with the square, as pairs of sequences do
        and len(low.works) == len(high.works)
        and all(
            segment == other and [(w.op, w.kind) for w in one] == [(w.op, w.kind) for w in two]
            for (segment, one), (other, two) in zip(low.works, high.works, strict=True)
        )
    )


def _at(low: Work, high: Work, batch_size: int) -> Work:
    if low == high:
        return low
    times, apart = batch_size - TRACED[0], TRACED[1] - TRACED[0]
    return replace(
        low,
        nbytes=low.nbytes + times * (high.nbytes - low.nbytes) // apart,
        flops=low.flops + times * (high.flops - low.flops) // apart,
        dims=tuple(one + times * (two - one) // apart for one, two in zip(low.dims, high.dims, strict=True)),
    )
