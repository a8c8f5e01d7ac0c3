"""A predicted step as a memory snapshot: what the viewer draws of it is what was predicted."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
import toys
from snapshots import curve

from gcbench.simulate import memory_snapshot, timeline
from gcbench.simulate.allocator.caching_allocator import OutOfMemory
from gcbench.simulate.compose.block_kinds import Kind
from gcbench.simulate.compose.whole_step import Assembly
from gcbench.simulate.events import Block
from gcbench.simulate.predictor import Predictor
from gcbench.simulate.timeline import Timeline
from gcbench.strategies import parse

MIB = 1 << 20
BOTH = pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])
READ_BY_THE_VIEWER = {
    *("APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "DICT"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK"),
    *("MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3"),
}
"""The opcodes that `unpickle` in pytorch's torch/utils/viz/MemoryViz.js knows; it throws at any other."""


def by_hand(sizes_mib: list[float], events: list[int], marks: tuple[int, int, int], settled_at: int) -> Assembly:
    """A step whose block n is of operator `op-n`."""
    blocks = [Block(int(size * MIB), f"op{number}.default") for number, size in enumerate(sizes_mib)]
    return Assembly(
        timeline=Timeline(
            nbytes=np.array([block.nbytes for block in blocks], np.int64),
            events=np.array(events, np.int64),
            marks=tuple(zip(marks, ("forward", "backward", "optimizer"), strict=True)),
            settled_at=(settled_at,),
        ),
        kinds=np.full(len(blocks), Kind.SAVED, np.int8),
        layers=np.arange(len(blocks), dtype=np.int32),
        block_ranges=((0, blocks),),
        section_starts=tuple(zip(marks, ("forward pass", "backward pass", "optimizer step"), strict=True)),
    )


def toy_assembly(strategy: str = "off") -> Assembly:
    plan = parse(strategy).plan_for(6)
    return Predictor(toys.Toy(), precision="fp32", optim="adamw_torch").step(plan, batch_size=4, seq_len=8).assembly


def recorded(assembly: Assembly, *, limit_bytes: int | None = None, expandable: bool = False) -> dict[str, Any]:
    content = memory_snapshot.snapshot(
        assembly, limit_bytes=limit_bytes, device_bytes=limit_bytes, expandable_segments=expandable
    )
    return pickle.loads(content)


@BOTH
@pytest.mark.parametrize("strategy", ["off", "per-layer"])
def test_the_highest_point_of_the_curve_is_the_predicted_peak(strategy: str, expandable: bool) -> None:
    """The traps: parameters and states, which no entry allocates, and rests of blocks that are not split off."""
    assembly = toy_assembly(strategy)
    peak = timeline.cached(assembly.timeline, expandable_segments=expandable)
    snapshot = recorded(assembly, expandable=expandable)
    points = curve(snapshot)
    assert max(points) == peak.memory.allocated_bytes
    assert points[0] > 0
    live = sum(segment["allocated_size"] for segment in snapshot["segments"])
    assert points[-1] == live


@BOTH
def test_segments_tile_what_is_reserved(expandable: bool) -> None:
    """Blocks lie one behind the other, and the entries of segments lead to the segments at the end."""
    snapshot = recorded(toy_assembly(), expandable=expandable)
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
        assert segment["is_expandable"] is expandable
    addresses = [segment["address"] for segment in snapshot["segments"]]
    assert addresses == sorted(addresses)


def test_entries_are_those_of_a_recording() -> None:
    """Block 0 is there before the step, 1 is freed before it; in it 2 is allocated in a new segment, and 0 is freed.

    The trap: the cache is emptied where the step begins, before anything is recorded.
    """
    snapshot = recorded(by_hand([30, 12, 8], [0, 1, ~1, 2, ~0], (3, 4, 4), 3))
    trace = snapshot["device_traces"][0]
    assert [(entry["action"], entry["size"] // MIB) for entry in trace] == [
        ("segment_alloc", 20),
        ("alloc", 8),
        ("free_requested", 30),
        ("free_completed", 30),
    ]
    assert trace[0]["addr"] == trace[1]["addr"]
    assert [entry["time_us"] for entry in trace] == [3, 3, 4, 4]
    assert {(note["name"], note["stage"], note["time_us"]) for note in snapshot["external_annotations"]} == {
        *(("forward", "START", 3), ("forward", "END", 4)),
        *(("backward", "START", 4), ("backward", "END", 4)),
        *(("optimizer", "START", 4), ("optimizer", "END", 5)),
    }


def test_frames_name_operator_layer_part_and_use() -> None:
    snapshot = recorded(by_hand([30, 12, 8], [0, 1, ~1, 2, ~0], (3, 4, 4), 3))
    of_alloc, of_free = (snapshot["device_traces"][0][place]["frames"] for place in (1, 3))
    assert [(frame["filename"], frame["name"]) for frame in of_alloc] == [
        ("layers.2", "op2"),
        ("part", "forward pass"),
        ("memory", "saved activations"),
    ]
    assert [frame["name"] for frame in of_free] == ["op0", "before the step", "saved activations"]


def test_parameters_are_named() -> None:
    """They are named by their tensor, and not cut at its dots as an operator's name is at its overload."""
    snapshot = recorded(toy_assembly())
    names = {
        block["frames"][0]["name"]
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        if block["frames"] and block["frames"][2]["name"] == "parameters"
    }
    assert {"embed.weight", "layers.0.up.weight", "layers.5.down.bias"} <= names


def test_a_step_that_does_not_fit_is_shown_whole_with_the_place_where_it_ends() -> None:
    """30 of 40 MiB are in use; 20 more do not fit, then 8 do. The curve goes on to 58."""
    step = by_hand([30, 20, 8], [0, 1, 2, ~1], (1, 2, 3), 1)
    with pytest.raises(OutOfMemory):
        timeline.cached(step.timeline, limit_bytes=40 * MIB)
    snapshot = recorded(step, limit_bytes=40 * MIB)
    trace = snapshot["device_traces"][0]
    assert [entry["action"] for entry in trace[:3]] == ["oom", "segment_alloc", "alloc"]
    assert (trace[0]["size"], trace[0]["device_free"]) == (20 * MIB, 10 * MIB)
    assert "addr" not in trace[0]
    assert trace[0]["frames"][0]["name"] == "op1"
    assert max(curve(snapshot)) == 58 * MIB == timeline.cached(step.timeline).memory.allocated_bytes


def test_a_cache_that_is_emptied_to_go_on_is_recorded() -> None:
    """12 MiB cached of 40; 30 fit once they are released."""
    snapshot = recorded(by_hand([12, 30], [0, ~0, 1], (0, 2, 3), 0), limit_bytes=40 * MIB)
    assert [entry["action"] for entry in snapshot["device_traces"][0]] == [
        *("segment_alloc", "alloc", "free_requested", "free_completed"),
        *("segment_free", "segment_alloc", "alloc"),
    ]


def test_the_viewer_can_read_it() -> None:
    """The trap: the default protocol of newer Pythons, which its own reader of pickles refuses."""
    content = memory_snapshot.snapshot(toy_assembly(), limit_bytes=None, device_bytes=None, expandable_segments=False)
    assert {opcode.name for opcode, _, _ in pickletools.genops(content)} <= READ_BY_THE_VIEWER


@BOTH
def test_torchs_own_reader_reads_it(expandable: bool) -> None:
    """`python -m torch.cuda._memory_viz` checks that blocks and segments add up."""
    from torch.cuda import _memory_viz as viz

    snapshot = recorded(toy_assembly(), expandable=expandable)
    assert "total_reserved" in viz.segsum(snapshot)
    assert "entries" in viz.trace(snapshot)
    assert "snapshot.pickle" in viz.trace_plot(snapshot)
    assert "snapshot.pickle" in viz.segment_plot(snapshot)
    lines = viz.memory(snapshot, format_flamegraph=lambda text: text).splitlines()
    assert any("parameters;" in line and "embed.weight" in line for line in lines)
