"""A step at a larger batch size computed from examples, and None where these do not determine it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import planned
import pytest

from gcbench.devices.target import Target
from gcbench.plan.estimate import batch_scaling
from gcbench.plan.estimate.batch_scaling import TRACED, Scaling, traced_at
from gcbench.plan.estimate.growth import Growth
from gcbench.simulate.cuda.workspaces import MOST_UNSORTED
from gcbench.strategies import Plan

LOW, HIGH = TRACED
LAYERS = 3
OFF = Plan(num_layers=LAYERS)
EVERY = Plan(num_layers=LAYERS, groups=((0,), (1,), (2,)))
IN_TWOS = Plan(num_layers=LAYERS, groups=((0, 1), (2,)))
CUDA = Target(kind="cuda", name="a card", memory_bytes=None, card=None)


def steps_of(family, *plans, precision="fp32", seq_len=16):
    predictor = planned.predictor_of(family, precision)
    return [
        tuple(predictor.step(plan, batch_size=batch, seq_len=seq_len) for batch in TRACED)
        for plan in (OFF, EVERY, *plans)
    ]


@cache
def at_eight_and_ten():
    return tuple(planned.predictor_of("llama").step(OFF, batch_size=batch, seq_len=16) for batch in (8, 10))


def works_of(step):
    return [
        (
            segment,
            [
                (work.op, work.kind, work.nbytes, work.flops, work.dims, work.kind == "view" or work.call)
                for work in works
            ],
        )
        for segment, works in step.works
    ]


@pytest.mark.parametrize(("family", "precision"), [("gpt2", "bf16-mixed"), ("mixtral", "fp32")])
def test_a_step_that_grew_is_the_step_that_would_be_traced(family, precision):
    """The traps: a gradient of a parameter as large as an activation; a block that no batch changes."""
    off, every, *others = steps_of(family, IN_TWOS, planned.found_plans(family)[-1], precision=precision, seq_len=11)
    growth = Growth([off, every])
    for low, high in others:
        grown = growth.grown(low)
        assert grown is not None
        assert np.array_equal(grown.timeline.nbytes, high.timeline.nbytes)
        assert works_of(grown) == works_of(high)
        assert not np.array_equal(low.timeline.nbytes, high.timeline.nbytes)


def test_a_gradient_is_distinguished_from_an_activation_of_its_size():
    """The trap: as many tokens in a batch as a weight has rows. Llama-3.1-70B, two sequences of 4096."""
    width = planned.config_of("llama").hidden_size
    off, every, (low, high) = steps_of("llama", IN_TWOS, seq_len=width // LOW)
    grown = Growth([off, every]).grown(low)
    assert grown is not None and np.array_equal(grown.timeline.nbytes, high.timeline.nbytes)


def test_unknown_and_contradicting_examples_give_no_step():
    off, every, (low, _) = steps_of("llama", IN_TWOS)
    assert Growth([]).grown(low) is None
    assert Growth([off]).grown(every[0]) is None  # the random state that it keeps
    assert Growth([off, every]).grown(low) is not None
    piece = off[1].parts.passes.instances[1][1]
    blocks = (replace(piece.blocks[0], nbytes=piece.blocks[0].nbytes + 512), *piece.blocks[1:])
    passes = off[1].parts.passes
    instances = tuple(
        (segment, replace(each, blocks=blocks) if each is piece else each, base)
        for segment, each, base in passes.instances
    )
    other = replace(off[1], parts=replace(off[1].parts, passes=replace(passes, instances=instances)))
    assert Growth([(off[0], other), off, every]).grown(low) is None


def test_a_step_that_grew_serves_for_all_others_and_not_for_its_own_trace(monkeypatch):
    off, every, (low, high) = steps_of("llama", IN_TWOS)
    predictor = planned.predictor_of("llama")
    grown = Growth([off, every]).grown(low)
    scaled = Scaling(predictor, IN_TWOS, seq_len=16, known={LOW: low}, grown=grown)
    seven = predictor.step(IN_TWOS, batch_size=7, seq_len=16)
    assert np.array_equal(scaled.line(7).nbytes, seven.timeline.nbytes)
    assert [work.call for work in scaled.calls(7) if work.kind != "view"] == [
        work.call for _, works in seven.works for work in works if work.kind != "view"
    ]
    blocks = [block.shape for _, some in scaled.traced(HIGH).assembly.block_ranges for block in some]
    assert blocks == [block.shape for _, some in high.assembly.block_ranges for block in some]


# Kernels for few tokens


def test_what_is_traced_runs_the_kernels_of_larger_batches():
    """The trap: an embedding's gradients are summed without sorting up to 3072 tokens, and gpt2 is 1024 long."""
    assert traced_at(replace(CUDA, kind="cpu"), 1024) == TRACED
    assert traced_at(CUDA, 4096) == TRACED
    for seq_len in (3, 64, 1000, 1024, 2048):
        low, high = traced_at(CUDA, seq_len)
        assert low * seq_len > MOST_UNSORTED and high - low == HIGH - LOW
        assert low == TRACED[0] or (low - 1) * seq_len <= MOST_UNSORTED


def test_smaller_batches_than_the_traced_ones_are_computed_and_not_called_exact():
    predictor = planned.predictor_of("llama")
    scaled = Scaling(predictor, EVERY, seq_len=16, pair=(8, 10))
    assert scaled.is_affine and scaled.is_exact(8) and not scaled.is_exact(3)
    three = predictor.step(EVERY, batch_size=3, seq_len=16)
    assert np.array_equal(scaled.line(3).nbytes, three.timeline.nbytes)
    assert [work.call for work in scaled.calls(3)] == [work.call for _, works in three.works for work in works]
    assert [work.nbytes for _, works in scaled.step(3).works for work in works] == [
        work.nbytes for work in scaled.calls(3)
    ]


def test_no_block_has_a_negative_size():
    """The trap: a kernel's workspace that grows from some batch size on, seen from far below it."""
    low, high = at_eight_and_ten()
    sizes = low.timeline.nbytes.copy()
    sizes[-1], more = 512, high.timeline.nbytes.copy()
    more[-1] = 640
    early, late = (
        replace(step, assembly=replace(step.assembly, timeline=replace(step.timeline, nbytes=nbytes)))
        for step, nbytes in ((low, sizes), (high, more))
    )
    assert batch_scaling._grow_evenly(early, late, (8, 10))
    scaled = Scaling(planned.predictor_of("llama"), OFF, seq_len=16, pair=(8, 10), known={8: early, 10: late})
    assert scaled.line(1).nbytes[-1] == 64 and scaled.line(9).nbytes[-1] == 576
    more[-1] = 641
    assert not batch_scaling._grow_evenly(early, late, (8, 10))


@pytest.mark.parametrize(("times", "is_affine"), [(1.25, True), (1.26, True), (1.5625, False)])
def test_a_kernel_that_rounds_is_no_square(times, is_affine):
    low, high = at_eight_and_ten()
    sizes, more = low.timeline.nbytes.copy(), high.timeline.nbytes.copy()
    sizes[-1], more[-1] = 12800, int(12800 * times)
    early, late = (
        replace(step, assembly=replace(step.assembly, timeline=replace(step.timeline, nbytes=nbytes)))
        for step, nbytes in ((low, sizes), (high, more))
    )
    assert batch_scaling._grow_evenly(early, late, (8, 10)) == is_affine
