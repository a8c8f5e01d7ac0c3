"""A step as events: its peaks with CUDA's allocator, by hand; and traces of layers that must fit together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from gcbench.core.records import PHASES
from gcbench.core.units import MIB
from gcbench.simulate import timeline
from gcbench.simulate.allocator.caching_allocator import OutOfMemory
from gcbench.simulate.compose.block_kinds import Kind
from gcbench.simulate.compose.layer_traces import LayerTraces, SectionTrace, cut
from gcbench.simulate.compose.passes import compose_passes
from gcbench.simulate.compose.resident import ResidentMemory, positions_in_trace
from gcbench.simulate.events import Block, Trace
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.fake_model import BEFORE, HEAD, LOSS, REST, LayeredTrace, NotComposable

HALF_KIB = 512


def line(nbytes, events, marks, settled_at=()):
    phases = tuple(zip(marks, PHASES, strict=True))
    return Timeline(nbytes=np.array(nbytes), events=np.array(events), marks=phases, settled_at=settled_at)


def by_phase(peak):
    return [peak.memory.of_phase(phase) for phase in PHASES]


# The step of most tests here: 3 MiB of parameters and a small buffer are resident, the first step allocated and freed
# 30 MiB; the measured one allocates 12 MiB, then 100 bytes more, frees the 12, and at last allocates 1 MiB and a bit.
PARAMETERS, BUFFER, FIRST_STEP, KEPT, NUMBER, LAST = range(6)
STEP = line(
    nbytes=[3 * MIB, 700, 30 * MIB, 12 * MIB, 100, MIB + 1],
    events=[PARAMETERS, BUFFER, FIRST_STEP, ~FIRST_STEP, KEPT, NUMBER, ~KEPT, ~NUMBER, LAST, ~LAST],
    marks=(4, 6, 8),
    settled_at=(4,),
)


def test_allocated_counts_what_is_handed_out_in_units_of_512_bytes():
    """By hand: 700 bytes are 1024, 100 are 512, 1 MiB and a byte are 1 MiB and 512."""
    resident = 3 * MIB + 2 * HALF_KIB
    forward = resident + 12 * MIB + HALF_KIB
    peak = timeline.cached(STEP)
    assert by_phase(peak) == [forward, forward, resident + MIB + HALF_KIB]
    assert peak.memory.allocated_bytes == forward
    assert peak.memory.peak_phase == "forward"
    assert peak.at == 5
    assert peak.fits and peak.num_alloc_retries == 0


def test_reserved_counts_segments():
    """By hand: one of 20 MiB for the parameters, 17 MiB of which are left for the 12; one of 2 MiB for all that is
    small. The 30 MiB of the first step were returned to the device."""
    assert timeline.cached(STEP).memory.reserved_bytes == 22 * MIB


def test_what_the_first_step_cached_counts_unless_the_cache_was_emptied():
    """The trap: a measurement empties the cache before the measured step, and a replay that does not reads high."""
    kept = line(STEP.nbytes, STEP.events, (4, 6, 8))
    assert timeline.cached(kept).memory.reserved_bytes == 52 * MIB
    assert by_phase(timeline.cached(kept)) == by_phase(timeline.cached(STEP))


def test_peaks_begin_with_the_first_mark():
    """The trap: the first step, which creates the optimizer's states, allocates more than any later one."""
    assert timeline.cached(STEP).memory.allocated_bytes < 30 * MIB
    earlier = line(STEP.nbytes, STEP.events, (2, 6, 8), settled_at=(4,))
    memory = timeline.cached(earlier).memory
    assert memory.forward_bytes == 33 * MIB + 2 * HALF_KIB
    assert memory.reserved_bytes == 52 * MIB


def test_a_rest_of_up_to_1_mib_is_handed_out_and_counted():
    """11.5 MiB get a section of 12, whole; 11 MiB less a byte get one of 12, of which more than 1 MiB is split off."""
    for nbytes, allocated in ((11 * MIB + MIB // 2, 12 * MIB), (11 * MIB - HALF_KIB, 11 * MIB - HALF_KIB)):
        memory = timeline.cached(line([nbytes], [0, ~0], (0, 1, 2))).memory
        assert (memory.allocated_bytes, memory.reserved_bytes) == (allocated, 12 * MIB)


def test_a_cell_that_needs_more_than_the_limit_runs_out_of_memory():
    fitting = timeline.cached(STEP).memory.reserved_bytes
    # The first step wants 32 MiB beside them: that is what decides, not the measured step.
    with pytest.raises(OutOfMemory) as refused:
        timeline.cached(STEP, limit_bytes=fitting)
    assert refused.value.requested_bytes == 30 * MIB
    assert timeline.cached(STEP, limit_bytes=52 * MIB).memory == timeline.cached(STEP).memory


def test_at_the_limit_the_cache_is_flushed_and_the_step_goes_on():
    """16 MiB freed and cached are no use for 18; without a limit both stay reserved."""
    step = line([16 * MIB, 18 * MIB], [0, ~0, 1, ~1], (0, 2, 3))
    assert timeline.cached(step).memory.reserved_bytes == 34 * MIB
    assert timeline.cached(step).num_alloc_retries == 0
    short = timeline.cached(step, limit_bytes=20 * MIB)
    assert short.num_alloc_retries == 1
    assert short.memory.reserved_bytes == 18 * MIB
    assert by_phase(short) == [16 * MIB, 18 * MIB, 18 * MIB]
    with pytest.raises(OutOfMemory):
        timeline.cached(step, limit_bytes=18 * MIB - 1)


def test_expandable_segments_reserve_pages():
    """By hand: 16 MiB lie in one page of 20; for 18 one more page joins it, once the 16 are freed."""
    step = line([16 * MIB, 18 * MIB, 25 * MIB], [0, ~0, 1, ~1, 2, ~2], (0, 2, 4))
    peak = timeline.cached(step, expandable_segments=True)
    assert by_phase(peak) == [16 * MIB, 18 * MIB, 25 * MIB]
    assert peak.memory.reserved_bytes == 40 * MIB
    assert timeline.cached(step).memory.reserved_bytes == 60 * MIB


def test_what_is_alive_when_a_phase_begins_is_its_peak_if_nothing_is_allocated():
    """The trap: a phase that only frees shows nothing, or the peak of the phase before it."""
    step = line([2 * MIB, 4 * MIB], [0, 1, ~1, ~0], (0, 2, 3))
    assert by_phase(timeline.cached(step)) == by_phase(timeline.exact(step)) == [6 * MIB, 6 * MIB, 2 * MIB]


def test_the_cpu_counts_bytes_and_caches_nothing():
    peak = timeline.exact(STEP)
    resident = 3 * MIB + 700
    assert by_phase(peak) == [resident + 12 * MIB + 100, resident + 12 * MIB + 100, resident + MIB + 1]
    assert peak.memory.reserved_bytes is None


def test_a_trace_comes_after_the_resident_blocks():
    """The trap: blocks and marks that are not moved by as many places as there are resident blocks."""
    trace = Trace(
        blocks=[Block(5, None), Block(7, None)],
        events=[0, 1, ~1, ~0],
        marks=[(1, "forward"), (2, "backward"), (3, "optimizer")],
        settled_at=[1],
    )
    made = timeline.of_trace(trace, resident=[100, 200], settled_at=[0])
    assert made.nbytes.tolist() == [100, 200, 5, 7]
    assert made.events.tolist() == [0, 1, 2, 3, ~3, ~2]
    assert made.live().tolist() == [100, 300, 305, 312, 305, 300]
    assert made.marks == ((3, "forward"), (4, "backward"), (5, "optimizer"))
    assert made.settled_at == (2, 3)
    assert made.spans() == (("forward", 3, 4), ("backward", 4, 5), ("optimizer", 5, 6))


def test_a_full_trace_requests_a_workspace_where_its_first_product_runs():
    """The trap: a workspace below the model's own blocks, or one of the backward pass before it begins."""
    trace = Trace(
        blocks=[Block(5, None), Block(7, "mm.default"), Block(9, "mm.default")],
        events=[0, 1, 2, ~2, ~1, ~0],
        marks=[(4, "forward")],
        settled_at=[3],
        forward_at=1,
        backward_at=2,
    )
    terms = [
        ResidentMemory(name="w", nbytes=100, kind=Kind.RESIDENT, requested_at=at, requested_by=(op,))
        for at, op in (("forward", "mm.default"), ("backward", "mm.default"), ("backward", "addmm.default"))
    ]
    requested = positions_in_trace(terms, trace)
    assert requested == (2, 3, None)
    made = timeline.of_trace(trace, resident=[100, 100, 100], requested=requested)
    assert made.events.tolist() == [3, 4, 0, 5, 1, ~5, ~4, ~3]
    assert made.marks == ((6, "forward"),)
    assert made.settled_at == (5,)


# Layer traces. Each layer allocates an activation of 10 + its number in the forward pass and frees it in its backward
# pass, in which it allocates a gradient; the backward pass of the layer behind it frees what the loss or a layer passed
# on.


def section_trace(*events, here):
    """A section by hand, of `("take", bytes)` and `("give", number, where it was taken)`; `here` is its own name."""
    refs: dict[object, int] = {}
    taken, numbers, frees, codes = [], [], [], []
    for action, value, *ref in events:
        if action == "take":
            numbers.append(len(taken))
            taken.append(Block(value, "op"))
        else:
            numbers.append(value)
        frees.append(action == "give")
        codes.append(refs.setdefault(ref[0] if ref else here, len(refs)))
    return SectionTrace(
        blocks=tuple(taken),
        number=np.array(numbers, np.int64),
        frees=np.array(frees, np.bool_),
        ref=np.array(codes, np.int64),
        refs=tuple(refs),
    )


def layer_sections(number: int) -> Mapping[tuple[str, int], SectionTrace]:
    return {
        ("forward", number): section_trace(("take", 10 + number), here=("forward", 0)),
        ("backward", number): section_trace(("take", 100), ("give", 0, ("forward", 0)), here=("backward", 0)),
    }


def three_layers(**changes: SectionTrace | None) -> LayerTraces:
    """Layers 0, 1 and 2, with sections replaced by name (`forward_1`), or removed by None."""
    by_section = {
        BEFORE: section_trace(("take", 1), here=BEFORE),
        **layer_sections(0),
        **layer_sections(1),
        **layer_sections(2),
        HEAD: section_trace(("take", 2), here=HEAD),
        LOSS: section_trace(("take", 3), ("give", 0, HEAD), here=LOSS),
        REST: section_trace(("give", 0, BEFORE), ("give", 0, LOSS), here=REST),
    }
    for name, changed in changes.items():
        part, _, number = name.partition("_")
        section = (part, int(number)) if number else (part, -1)
        assert section in by_section
        if changed is None:
            del by_section[section]
        else:
            by_section[section] = changed
    return LayerTraces(by_section=by_section, gradients={}, layer_inputs={})


def five_layers(traces: LayerTraces):
    """Layers 1, 2 and 3 all do what the middle one of three did."""
    return compose_passes(traces, range(5), [0, 1, 1, 1, 2])


def test_layer_traces_that_fit_compose_the_passes_of_more_layers():
    """By hand: three middle layers, each with blocks of its own."""
    passes = five_layers(three_layers())
    sizes = passes.nbytes()
    held = np.cumsum([sizes[event] if event >= 0 else -sizes[~event] for event in passes.events])
    forward = [1, 11, 22, 33, 44, 56, 58]
    loss = [61, 59]
    backward = [159, 147, 247, 236, 336, 325, 425, 414, 514, 504]
    rest = [503, 500]
    assert held.tolist() == [*forward, *loss, *backward, *rest]
    assert passes.backward_at == len(forward)
    assert [section for section, _, _ in passes.instances][1:6] == [("forward", layer) for layer in range(5)]


def test_what_the_head_frees_of_a_traced_layer_it_frees_of_all_that_it_represents():
    """The output of every layer held to the end, as by a model that returns all hidden states."""
    passes = five_layers(
        three_layers(
            backward_1=section_trace(("take", 100), here=("backward", 0)),
            head=section_trace(("take", 2), ("give", 0, ("forward", 1)), here=HEAD),
        )
    )
    given = [~event for event in passes.events[: passes.backward_at] if event < 0]
    assert given == [passes.bases["forward", layer] for layer in (1, 2, 3)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        # The middle layer's backward pass is never seen: no gradient passes through it.
        ({"backward_1": None}, "no backward pass"),
        # The middle layer holds what the first one took: every middle one would free its neighbour's.
        (
            {"backward_1": section_trace(("take", 9), ("give", 0, ("forward", -1)), here=("backward", 0))},
            "freed twice",
        ),
        # A layer gives back what the one behind it takes: in the forward pass that is yet to come.
        (
            {"forward_1": section_trace(("take", 11), ("give", 0, ("forward", 1)), here=("forward", 0))},
            "before it is allocated",
        ),
        # What lies two layers away does not for the first but one of five, which has the same trace.
        (
            {"forward_1": section_trace(("take", 11), ("give", 0, ("forward", -2)), here=("forward", 0))},
            "far from each other",
        ),
        ({"rest": section_trace(("give", 0, BEFORE), ("give", 0, HEAD), here=REST)}, "freed twice"),
    ],
)
def test_layer_traces_that_do_not_fit_are_refused(changes, why):
    """The trap: a plausible sum of events that cannot happen."""
    with pytest.raises(NotComposable, match=why):
        five_layers(three_layers(**changes))


def layered(sections, events, num_blocks, gradients=()):
    return LayeredTrace(
        trace=Trace(blocks=[Block(1, "op")] * num_blocks, events=list(events)),
        batch=(),
        sections=tuple(sections),
        gradients=dict(gradients),
        layer_inputs={},
        called=(0, 1),
    )


IN_ORDER = [BEFORE, ("forward", 0), ("forward", 1), HEAD, LOSS, ("backward", 1), ("backward", 0), REST]


def test_a_trace_is_cut_where_layers_begin_and_refers_by_distance():
    """One resident block; one that layer 0 allocates and layer 1 frees; one of layer 1 that the loss frees."""
    events = [0, 1, 2, ~1, ~2]
    traces = cut(layered(zip([1, 1, 2, 4, 4, 5, 5, 5], IN_ORDER, strict=True), events, 3, {7: 2}))
    assert traces.by_section["forward", 1].refs == (("forward", 0), ("forward", -1))
    assert traces.by_section["forward", 1].frees.tolist() == [False, True]
    assert traces.by_section[LOSS].refs == (("forward", 1),)
    assert traces.gradients == {7: (("forward", 1), 0)}


@pytest.mark.parametrize(
    ("sections", "events", "gradients", "why"),
    [
        ([*IN_ORDER[:5], ("backward", 0), ("backward", 1), REST], [0], {}, "not in order"),
        ([*IN_ORDER[:3], ("forward", 0), *IN_ORDER[3:]], [0], {}, "not in order"),
        ([BEFORE, HEAD, *IN_ORDER[1:3], *IN_ORDER[4:]], [0], {}, "not in order"),
        (IN_ORDER, [0, ~0], {}, "was allocated before it"),
        (IN_ORDER, [0], {7: 0}, "gradient was allocated before"),
    ],
)
def test_a_trace_of_layers_that_do_not_run_one_by_one_is_not_cut(sections, events, gradients, why):
    starts = [1] * len(sections)
    with pytest.raises(NotComposable, match=why):
        cut(layered(zip(starts, sections, strict=True), events, 1, gradients))
