"""What calls of operators take here: stored, and asked for other sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from timed_calls import MACHINE, US, calibration_of, generic, overheads, pointwise, product, tensor

from gcbench.calibration import op_times
from gcbench.calibration.call_overhead import CORE_BYTES
from gcbench.calibration.op_times import Point, machine_key
from gcbench.devices import backends
from gcbench.operators import call_text
from gcbench.simulate.costs import Work

# What is not measured follows from what is.


def test_a_measured_call_has_its_measured_time_plus_the_overhead_of_its_caller():
    known = calibration_of(
        pointwise(1000, 7e-6), product(64, 64, 64, 3e-5), overheads=overheads(model=5e-6, backward=-1e-5)
    )
    assert known.seconds(pointwise(1000, caller="optimizer")) == 7e-6
    assert known.seconds(pointwise(1000, caller="model")) == pytest.approx(12e-6)
    assert known.seconds(product(64, 64, 64, caller="optimizer")) == 3e-5
    # No call takes less than nothing.
    assert known.seconds(pointwise(1000, caller="backward")) == 0.0


def test_overhead_grows_with_what_a_call_evicts_from_the_cache():
    """In proportion up to a core's own cache, which can be swept once."""
    nbytes = (8, CORE_BYTES // 4, CORE_BYTES, 4 * CORE_BYTES)
    known = calibration_of(*(pointwise(each // 8, 7e-6) for each in nbytes), overheads=overheads(policy=(5e-6, 40e-6)))
    added = [known.seconds(pointwise(each // 8, caller="policy")) - 7e-6 for each in nbytes]
    assert added == pytest.approx([5e-6, 15e-6, 45e-6, 45e-6], abs=1e-9)


def test_traffic_lies_on_the_line_between_the_nearest_sizes():
    known = calibration_of(pointwise(1000, 1e-6), pointwise(100_000, 100e-6), pointwise(10_000, 4e-6))
    assert known.seconds(pointwise(31_623)) == pytest.approx(20e-6, rel=1e-3)


def test_traffic_grows_beyond_what_was_measured_and_never_falls():
    known = calibration_of(
        *(generic(n, s) for n, s in ((1_000, 2e-6), (100_000, 20e-6), (10_000_000, 8e-3))), pointwise(50_000, 15e-6)
    )
    sizes = [10 * 2**step for step in range(26)]
    for op in ("silu", "gelu"):
        times = [known.seconds(pointwise(size, op=op)) for size in sizes]
        assert times == sorted(times)
        assert known.seconds(pointwise(10**9, op=op)) == pytest.approx(10 * known.seconds(pointwise(10**8, op=op)))


def test_beyond_its_points_an_operator_grows_as_the_generic_one():
    """The trap: a small call is all dispatch, and in proportion to it a large one would take minutes."""
    known = calibration_of(generic(1_000, 2e-6), generic(1_000_000, 600e-6), pointwise(1_500, 4e-6))
    assert known.seconds(pointwise(1_500_000)) == pytest.approx(1200e-6, rel=0.01)


def test_a_call_of_another_layout_is_estimated_from_its_own_layout_first():
    dense = pointwise(1000, 1e-6)
    gaps = pointwise(1000, 9e-6, call=call_text.write("aten::silu", [tensor(1000, strides=(2,))], {}))
    known = calibration_of(dense, gaps)
    assert known.seconds(pointwise(2000)) == 2e-6
    asked = pointwise(2000, call=call_text.write("aten::silu", [tensor(2000, strides=(2,))], {}))
    assert known.seconds(asked) == 18e-6


def test_products_go_at_the_rate_of_the_nearest_dimensions():
    known = calibration_of(product(64, 64, 64, 2 * 64**3 / 1e9), product(1024, 1024, 1024, 2 * 1024**3 / 1e11))
    assert known.seconds(product(1100, 1000, 1024)) == pytest.approx(2 * 1100 * 1000 * 1024 / 1e11, rel=0.1)
    times = [known.seconds(product(rows, 1024, 1024)) for rows in (1024, 2048, 4096, 8192)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(8 * times[0], rel=0.6)


def test_the_time_of_a_view_does_not_depend_on_its_size():
    seen = Point(
        op="t", kind="view", dtype="fp32", nbytes=0, flops=0, dims=(), is_causal=False, call="", cold=0, seconds=US
    )
    known = calibration_of(seen)
    for op in ("t", "view"):
        assert known.seconds(Work(op=op, kind="view", dtype="bf16", nbytes=0)) == US


def test_without_any_point_every_call_still_takes_time():
    known = calibration_of()
    for work in (pointwise(10), product(8, 8, 8), Work(op="t", kind="view", dtype="fp32", nbytes=0)):
        assert known.seconds(work) > 0


def test_missing_calls_have_no_similar_point_and_come_costliest_first():
    known = calibration_of(generic(10, 1e-6), generic(10**7, 1e-2), pointwise(1000, 1e-6), product(64, 64, 64, 1e-4))
    near, far, other = pointwise(1100), pointwise(1300), product(64, 64, 65)
    often, once = pointwise(5_000, op="gelu"), pointwise(20_000, op="tanh")
    unwritten = pointwise(777, op="relu", call="")
    works = [near, far, product(64, 64, 64), other, *[often] * 50, once, unwritten]
    missing = known.missing(works)
    assert set(missing) == {far, other, often, once}
    assert missing.index(often) < missing.index(once)
    # The same call from elsewhere in the step is not measured twice.
    assert known.missing([far, replace(far, caller="backward")]) == (far,)


# Processor time.


def test_by_processor_time_steps_are_compared_by_it_and_take_their_wall_time_together():
    """The trap: one of two calls was timed while another process computed, and seems five times as slow."""
    disturbed = replace(pointwise(1000, 50e-6), processor_s=20e-6)
    other = replace(product(64, 64, 64, 20e-6), processor_s=40e-6)
    added = overheads(model=1e-6)
    known = calibration_of(
        disturbed, other, overheads=added, processor_overheads=overheads(model=2e-6), processor_step_s=6e-6
    )
    works = [pointwise(1000, caller="optimizer"), product(64, 64, 64, caller="optimizer")]
    found = known.by_processor_time(works)
    assert sum(map(found.seconds, works)) == pytest.approx(sum(map(known.seconds, works)))
    assert found.seconds(works[1]) == pytest.approx(2 * found.seconds(works[0]))
    scale = 70 / 60
    assert found.seconds(pointwise(1000, caller="model")) == pytest.approx(scale * 22e-6)
    assert found.step_s == pytest.approx(scale * 6e-6)
    assert known.seconds(works[0]) == 50e-6, "the wall times stay"
    assert found.source == f"{known.source}, by ratios of processor time"


def test_without_processor_times_the_wall_times_are_used():
    """Those of a GPU, and of a table that another version stored."""
    for known in (calibration_of(pointwise(1000, 7e-6), overheads=overheads(model=1e-6)), calibration_of()):
        assert known.by_processor_time([pointwise(1000)]) is known


# The file.


def test_what_is_stored_comes_back(tmp_path):
    added = overheads(model=(1e-6, 2e-6))
    timed = replace(pointwise(1000, 7e-6), processor_s=9e-6)
    known = calibration_of(
        timed, product(8, 9, 10, 1e-5, cold=3), overheads=added, processor_overheads=added, processor_step_s=1e-4
    )
    assert op_times.save(known, tmp_path / "new") == op_times.path_for(MACHINE, tmp_path / "new")
    assert op_times.load(MACHINE, tmp_path / "new") == known
    assert [path.name for path in (tmp_path / "new").iterdir()] == [op_times.path_for(MACHINE).name]


def test_it_lies_in_the_cache_folder_that_the_user_chose(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert op_times.path_for(MACHINE).parent == tmp_path / "gcbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert op_times.path_for(MACHINE).parent == tmp_path / "home" / ".cache" / "gcbench"


def test_the_newer_of_two_points_for_a_call_stays():
    added = overheads(model=1e-6, policy=9e-6)
    old = calibration_of(pointwise(1000, 1e-6), pointwise(2000, 2e-6), overheads=added, step_s=1e-3)
    new = calibration_of(pointwise(1000, 5e-6), created="2026-11-25T08:00:00+00:00")
    both = old.merged(new)
    assert both.seconds(pointwise(1000, caller="optimizer")) == 5e-6
    assert len(both.points) == 2
    assert (both.overheads, both.step_s) == (old.overheads, 1e-3)
    newest = both.merged(calibration_of(overheads=overheads(model=2e-6), step_s=2e-3))
    assert (newest.overheads, newest.step_s) == (overheads(model=2e-6), 2e-3)
    assert both.source == "a calibration of this machine, 2026-11-25"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"schema":2', '"schema":99'),
        lambda text: text.replace('"nbytes":8000', '"nbytes":"8000"'),
        lambda text: text.replace('"points"', '"pints"'),
        lambda text: text.replace("7e-06", "NaN"),
        lambda text: text.replace("7e-06", "-7e-06"),
        lambda text: text.replace("1e-06", '"fast"'),
        lambda text: text.replace(MACHINE, "cpu, another"),
    ],
    ids=["cut off", "empty", "list", "null", "deep", "schema", "type", "field", "nan", "negative", "word", "machine"],
)
def test_a_file_that_cannot_be_used_is_no_calibration(tmp_path, spoil):
    """The trap: a cache that was damaged, or came with the home folder from another machine, must not end a plan."""
    known = calibration_of(pointwise(1000, 7e-6), overheads=overheads(model=1e-6))
    path = op_times.save(known, tmp_path)
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    assert op_times.load(MACHINE, tmp_path) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert op_times.save(calibration_of(), tmp_path / "file") is None
    assert op_times.load(MACHINE, tmp_path / "file") is None
    (tmp_path / op_times.path_for(MACHINE).name).write_bytes(b"\xff\xfe")
    assert op_times.load(MACHINE, tmp_path) is None


def test_a_machine_is_identified_by_what_affects_operator_times():
    machine = backends.open_device("cpu").describe()
    key = machine_key(machine)
    assert machine.device_name in key and f"torch {machine.versions['torch']}" in key
    others = [
        replace(machine, device_name="another"),
        replace(machine, versions=machine.versions | {"torch": "1.0"}),
        replace(machine, settings=machine.settings | {"torch_threads": "77"}),
        replace(machine, settings=machine.settings | {"OMP_WAIT_POLICY": "active"}),
    ]
    assert len({key, *map(machine_key, others)}) == 5
    assert machine_key(replace(machine, platform="moved", device_memory_bytes=1)) == key
