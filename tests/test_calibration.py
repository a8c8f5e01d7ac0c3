"""What calls of operators take here: stored, asked for other sizes, and measured by making the calls again."""

from __future__ import annotations

import inspect
import time
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench import calibrated, calibration, calibration_host, calls, devices, models, sources, strategies
from gcbench.calibrated import GENERIC, Calibration, Point, machine_key
from gcbench.calls import form
from gcbench.costs import Work
from gcbench.replay import NotReplayable, Replayer
from gcbench.simulate.predictor import Predictor
from gcbench.simulate.work import CACHED_BYTES, Ages, of_call
from gcbench.tasks import PlanTask

MACHINE = "cpu, a processor, torch 2.13.0"
US = 1e-6


def tensor(*sizes, dtype="float32", strides=None):
    return {"t": dtype, "s": list(sizes)} | ({} if strides is None else {"d": list(strides)})


def pointwise(count, seconds=None, *, op="silu", **changes):
    """A call that reads `count` numbers and writes as many: the point, or the work where no seconds are given."""
    values = {
        "op": op,
        "kind": "pointwise",
        "dtype": "fp32",
        "nbytes": 8 * count,
        "call": calls.write(f"aten::{op}", [tensor(count)], {}),
    } | changes
    return Work(**values) if seconds is None else point(values, seconds)


def product(rows, columns, inner, seconds=None, **changes):
    values = {
        "op": "mm",
        "kind": "matmul",
        "dtype": "fp32",
        "nbytes": 4 * (rows * inner + inner * columns + rows * columns),
        "flops": 2 * rows * columns * inner,
        "dims": (1, rows, columns, inner),
        "call": calls.write("aten::mm", [tensor(rows, inner), tensor(inner, columns)], {}),
    } | changes
    return Work(**values) if seconds is None else point(values, seconds)


def generic(count, seconds):
    call = calls.write(GENERIC, [tensor(count), tensor(count)], {})
    return pointwise(count, seconds, op="mul", nbytes=12 * count, call=call)


def point(values, seconds):
    defaults = {"flops": 0, "dims": (), "is_causal": False, "cold": 0}
    return Point(**(defaults | values), seconds=seconds)


def calibration_of(*points, **changes):
    values = {"machine": MACHINE, "created": "2026-11-24T12:00:00+00:00", "points": points} | changes
    return Calibration(**values)


# What is not measured follows from what is.


def test_a_measured_call_takes_what_it_took_and_what_its_caller_adds():
    known = calibration_of(
        pointwise(1000, 7e-6), product(64, 64, 64, 3e-5), overheads={"model": 5e-6, "backward": -1e-5}
    )
    assert known.seconds(pointwise(1000, caller="optimizer")) == 7e-6
    assert known.seconds(pointwise(1000, caller="model")) == pytest.approx(12e-6)
    assert known.seconds(product(64, 64, 64, caller="optimizer")) == 3e-5
    # No call takes less than nothing.
    assert known.seconds(pointwise(1000, caller="backward")) == 0.0


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


def test_an_operator_takes_its_share_of_the_generic_one_elsewhere():
    """The trap: a small call is all dispatch, and in proportion to it a large one would take minutes."""
    known = calibration_of(generic(1_000, 2e-6), generic(1_000_000, 600e-6), pointwise(1_500, 4e-6))
    assert known.seconds(pointwise(1_500_000)) == pytest.approx(1200e-6, rel=0.01)


def test_a_call_of_another_layout_is_taken_for_its_like_first():
    dense = pointwise(1000, 1e-6)
    gaps = pointwise(1000, 9e-6, call=calls.write("aten::silu", [tensor(1000, strides=(2,))], {}))
    known = calibration_of(dense, gaps)
    assert known.seconds(pointwise(2000)) == 2e-6
    asked = pointwise(2000, call=calls.write("aten::silu", [tensor(2000, strides=(2,))], {}))
    assert known.seconds(asked) == 18e-6


def test_products_go_at_the_rate_of_the_nearest_dimensions():
    known = calibration_of(product(64, 64, 64, 2 * 64**3 / 1e9), product(1024, 1024, 1024, 2 * 1024**3 / 1e11))
    assert known.seconds(product(1100, 1000, 1024)) == pytest.approx(2 * 1100 * 1000 * 1024 / 1e11, rel=0.1)
    times = [known.seconds(product(rows, 1024, 1024)) for rows in (1024, 2048, 4096, 8192)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(8 * times[0], rel=0.6)


def test_a_view_takes_as_long_whatever_it_looks_at():
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


def test_missing_are_those_without_their_like_and_what_costs_most_comes_first():
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


# The file.


def test_what_is_stored_comes_back(tmp_path):
    known = calibration_of(pointwise(1000, 7e-6), product(8, 9, 10, 1e-5, cold=3), overheads={"model": 1e-6})
    assert calibrated.save(known, tmp_path / "new") == calibrated.path_for(MACHINE, tmp_path / "new")
    assert calibrated.load(MACHINE, tmp_path / "new") == known
    assert [path.name for path in (tmp_path / "new").iterdir()] == [calibrated.path_for(MACHINE).name]


def test_it_lies_in_the_cache_folder_that_the_user_chose(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibrated.path_for(MACHINE).parent == tmp_path / "gcbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibrated.path_for(MACHINE).parent == tmp_path / "home" / ".cache" / "gcbench"


def test_the_newer_of_two_points_for_a_call_stays():
    old = calibration_of(pointwise(1000, 1e-6), pointwise(2000, 2e-6), overheads={"model": 1e-6, "policy": 9e-6})
    new = calibration_of(pointwise(1000, 5e-6), created="2026-11-25T08:00:00+00:00", overheads={"model": 2e-6})
    both = old.merged(new)
    assert both.seconds(pointwise(1000, caller="optimizer")) == 5e-6
    assert len(both.points) == 2
    assert both.overheads == {"model": 2e-6, "policy": 9e-6}
    assert both.source == "a calibration of this machine, 2026-11-25"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"schema":1', '"schema":99'),
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
    known = calibration_of(pointwise(1000, 7e-6), overheads={"model": 1e-6})
    path = calibrated.save(known, tmp_path)
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    assert calibrated.load(MACHINE, tmp_path) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert calibrated.save(calibration_of(), tmp_path / "file") is None
    assert calibrated.load(MACHINE, tmp_path / "file") is None
    (tmp_path / calibrated.path_for(MACHINE).name).write_bytes(b"\xff\xfe")
    assert calibrated.load(MACHINE, tmp_path) is None


def test_a_machine_is_told_by_what_moves_its_figures():
    machine = devices.open_device("cpu").describe()
    key = machine_key(machine)
    assert machine.device_name in key and f"torch {machine.versions['torch']}" in key
    others = [
        replace(machine, device_name="another"),
        replace(machine, versions=machine.versions | {"torch": "1.0"}),
        replace(machine, settings=machine.settings | {"torch_threads": "77"}),
    ]
    assert len({key, *map(machine_key, others)}) == 4
    assert machine_key(replace(machine, platform="moved", device_memory_bytes=1)) == key


# Calls as text.


def test_calls_that_differ_in_size_alone_are_alike():
    def of(batch, heads, tokens):
        transposed = tensor(batch, heads, tokens, 64, strides=(tokens * heads * 64, 64, heads * 64, 1))
        return form(calls.write("aten::mul.Tensor", [transposed, tensor(batch, 1, tokens, 64)], {}))

    # One sequence, or one head, alone too, whose strides say nothing.
    assert of(2, 8, 128) == of(16, 12, 77) == of(1, 8, 128)
    dense = calls.write("aten::mul.Tensor", [tensor(2, 8, 128, 64), tensor(2, 1, 128, 64)], {})
    assert form(dense) != of(2, 8, 128)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["aten::sum.dim_IntList", [tensor(64, 32), [0]]], ["aten::sum.dim_IntList", [tensor(64, 32), [1]]]),
        (["aten::mul.Tensor", [tensor(64, 32), tensor(32)]], ["aten::mul.Tensor", [tensor(64, 32), tensor(64, 1)]]),
        (["aten::mm", [tensor(64, 32), tensor(32, 8)]], ["aten::mm", [tensor(64, 32), tensor(32, 8, strides=(1, 32))]]),
        (["aten::silu", [tensor(64)]], ["aten::silu", [tensor(64, dtype="bfloat16")]]),
        (["aten::pow.Tensor_Scalar", [tensor(64), 2]], ["aten::pow.Tensor_Scalar", [tensor(64), 3]]),
        (["aten::silu", [tensor(64, 32)]], ["aten::silu", [tensor(64, 32, strides=(64, 1))]]),
    ],
    ids=["dimension", "broadcasting", "layout", "dtype", "exponent", "gaps"],
)
def test_calls_that_take_other_roads_are_not_alike(one, two):
    assert form(calls.write(*one, {})) != form(calls.write(*two, {}))


def test_a_call_is_affine_in_the_batch():
    def at(batch):
        wide = tensor(batch, 16, 4, strides=(64, 1, 16))
        return calls.write("aten::cat", [[wide, tensor(batch * 16, 4)], -1], {"dim": 1})

    assert calls.between(at(2), at(4), 5 - 2, 4 - 2) == at(5)
    assert calls.between(at(2), at(2), 3, 2) == at(2)
    low, high = (calls.write("aten::div", [tensor(tokens), 1 / tokens], {}) for tokens in (2, 4))
    assert calls.between(low, high, 3, 2) == calls.write("aten::div", [tensor(5), 1 / 2], {})
    assert calls.between(at(2), calls.write("aten::cat", [[tensor(2)], -1], {"dim": 1}), 3, 2) == ""


# Calls made again.


class Reads(TorchDispatchMode):
    """What every call had the device do."""

    def __init__(self):
        super().__init__()
        self.works = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.works.append(of_call(func, args, kwargs or {}, result))
        return result


def step_of(tmp_path, family, strategy="off", *, precision="fp32", optim="adamw_torch", batch_size=2):
    """The calls of a tiny model's step, in order."""
    source = sources.resolve(
        str(tiny.write_model(tmp_path / family, family)), pretrained=False, trust_remote_code=False
    )
    meta = models.build_meta(models.build_config(source, layers=None, overrides={}))
    predictor = Predictor(meta, precision=precision, optim=optim)
    plan = strategies.parse(strategy).plan_for(tiny.NUM_LAYERS)
    step = predictor.step(plan, batch_size=batch_size, seq_len=16)
    return [work for _, part in step.works for work in part] + list(step.update.works)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"strategy": "per-layer"}),
        ("gpt2", {"precision": "bf16-mixed"}),
        ("mixtral", {}),
        ("gpt_neox", {"optim": "adamw_torch_fused"}),
    ],
)
def test_every_call_of_a_step_can_be_made_again_and_does_the_same_work(tmp_path, family, changes):
    """Indices within bounds, layouts as they were, results in memory of their own: the same bytes and dimensions."""
    replayer = Replayer(torch.device("cpu"), cold_bytes=2**16, most_bytes=2**26)
    works = list(dict.fromkeys(step_of(tmp_path, family, **changes)))
    assert {work.op for work in works if not work.call} <= {"_record_function_enter_new", "_record_function_exit"}
    for work in works:
        if not work.call:
            continue
        made = replayer.make(work.call, work.cold)
        with torch.no_grad(), Reads() as read:
            made()
        [again] = read.works
        assert 0.7 * work.nbytes <= again.nbytes <= 1.3 * work.nbytes, work
        assert form(again.call) == form(work.call)
        assert (again.kind, again.dtype, again.dims, again.is_causal) == (
            work.kind,
            work.dtype,
            work.dims,
            work.is_causal,
        )


def test_arguments_of_a_call_do_not_share_memory_and_cold_ones_come_round_late():
    replayer = Replayer(torch.device("cpu"), cold_bytes=4 * 4096, most_bytes=2**20)
    call = calls.write("aten::addcmul_", [tensor(1024), tensor(1024), tensor(1024)], {})
    made = replayer.make(call, 0b110)
    assert len({value.data_ptr() for value in made.args}) == 3
    assert [memory.data_ptr() for memory in made.hot] == [made.args[0].data_ptr()]
    cold = [replayer.make(call, 0b010).args[1].data_ptr() for _ in range(3)]
    assert len(set(cold)) == 3
    hot = [replayer.make(calls.write("aten::silu", [tensor(512)], {}), 0).args[0].data_ptr() for _ in range(3)]
    assert len(set(hot)) == 1


def test_memory_for_calls_is_bounded():
    replayer = Replayer(torch.device("cpu"), cold_bytes=2**16, most_bytes=2**16)
    for count in range(100, 4000, 100):
        replayer.make(calls.write("aten::silu", [tensor(count)], {}), 1)
        assert replayer._held_bytes <= 2**16


def test_an_operator_that_this_torch_lacks_is_said_not_to_be_replayable():
    replayer = Replayer(torch.device("cpu"), cold_bytes=0, most_bytes=2**20)
    with pytest.raises(NotReplayable):
        replayer.make(calls.write("aten::no_such_operator.Tensor", [tensor(4)], {}), 0)
    with pytest.raises(NotReplayable):
        replayer.make(calls.write("aten::silu", [tensor(4, dtype="float3")], {}), 0)


def test_works_say_what_calls_them(tmp_path):
    def callers(strategy):
        return {work.caller for work in step_of(tmp_path, "llama", strategy)}

    assert callers("every:2") == {"model", "checkpoint", "recompute", "backward", "optimizer"}
    assert "policy" in callers("every:2+selective:matmul")


def test_what_was_touched_long_ago_is_cold():
    ages = Ages()
    small, large = torch.zeros(1), torch.zeros(CACHED_BYTES // 4 + 8)

    def cold(*args):
        with Reads() as read:
            result = torch.add(*args)
        return ages.aged(read.works[0], args, {}, result).cold

    assert cold(small, small) == 0b11  # never seen before
    assert cold(small, small) == 0
    assert cold(small, large) == 0b10
    assert cold(large, small) == 0  # what a call touches, it has touched last
    assert cold(large, large) == 0
    ages.aged(pointwise(CACHED_BYTES), (), {}, None)
    assert cold(small, large) == 0b11


# Measuring.


def test_a_short_calibration_times_the_costliest_calls_within_its_budget(tmp_path):
    device = devices.open_device("cpu")
    works = step_of(tmp_path, "llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    start = time.monotonic()
    found = calibration.calibrate_for(works, device=device, budget_s=1.0, folder=tmp_path)
    took = time.monotonic() - start
    assert took < 4.0  # a budget, and what a busy machine takes beyond
    assert torch.equal(torch.rand(4), expected), "random numbers go on as if none had been drawn"
    assert found.machine == machine_key(device.describe())
    assert found.points and all(point.seconds > 0 for point in found.points)
    assert all(found.seconds(work) > 0 for work in works)
    assert calibrated.load(found.machine, tmp_path) == found
    # What is there is not measured again.
    again = calibration.measure(works, device=device, budget_s=0.6, known=found)
    assert [point for point in again.points if point.key in {p.key for p in found.points}] == list(found.points)


@pytest.mark.parametrize(("times", "anew"), [(1, True), (0.001, False)])
def test_where_what_is_missing_matters_all_is_measured_anew(monkeypatch, times, anew):
    """The trap: calls timed an hour ago beside calls timed now, and in between the machine got slower."""
    known = calibration_of(generic(64, 1e-6), pointwise(10**6, 1e-3), overheads={"model": 1e-6})
    asked: list[Work] = []
    monkeypatch.setattr(calibration.Timer, "points", lambda self, works, **kwargs: asked.extend(works) or ())
    there, lacking = pointwise(10**6), pointwise(10, op="gelu")
    by_itself = known.by_itself
    monkeypatch.setattr(
        Calibration, "by_itself", lambda self, work: times * 1e-3 if work.op == "gelu" else by_itself(work)
    )
    calibration.measure([there, lacking], device=devices.open_device("cpu"), budget_s=1.0, known=known)
    assert {work.op for work in asked} == ({"silu", "gelu"} if anew else {"gelu"})


def test_a_call_that_fails_or_is_too_large_is_left_out():
    device = devices.open_device("cpu")
    fails = product(8, 8, 8, call=calls.write("aten::mm", [tensor(8, 8), tensor(9, 8)], {}))
    too_large = pointwise(2**50)
    good = pointwise(64)
    timer = calibration.Timer(device)
    found = timer.points([too_large, fails, good], expected=lambda work: US, until=time.monotonic() + 5)
    assert [(point.op, point.nbytes) for point in found] == [("silu", 512)]


def test_no_call_is_begun_that_the_budget_does_not_bear():
    made = []
    timer = calibration.Timer(devices.open_device("cpu"))
    timer._time = lambda call, before: made.append(call) or (US, call())
    works = [pointwise(1000), pointwise(10)]
    found = timer.points(works, expected=lambda w: 1e3 if w.nbytes > 100 else US, until=time.monotonic() + 60)
    assert [point.nbytes for point in found] == [80]
    assert 1 < len(made) < 100
    assert not timer.points(works, expected=lambda w: US, until=time.monotonic() - 1)


def test_overheads_are_what_a_step_takes_beyond_its_calls():
    """Two calls of 10 us in each phase; what is left is laid on the calls that cause it."""

    def work(caller, **changes):
        return pointwise(10, caller=caller, **changes)

    def timed(first, again, forward, backward):
        view = Work(op="t", kind="view", dtype="fp32", nbytes=0, caller="backward")
        works = {
            "forward": (work(first), work(first)),
            "backward": (work("backward"), view, *again),
            "optimizer": (work("optimizer"), work("optimizer")),
        }
        seconds = {"forward": forward * US, "backward": backward * US, "optimizer": 14 * US}
        return calibration_host._Timed(works=works, seconds=seconds)

    steps = {
        "off": timed("model", (), 30, 16),
        "per-layer": timed("checkpoint", (work("recompute"), work("recompute")), 50, 66),
        "selective:matmul": timed("policy", (work("recompute"),), 100, 131),
    }
    alone = {w: (4 if w.kind == "view" else 10) * US for s in steps.values() for part in s.works.values() for w in part}
    found = {caller: round(seconds / US, 6) for caller, seconds in calibration_host._solved(steps, alone).items()}
    assert found == {
        "model": 5.0,
        "recompute": 5.0,
        "backward": 1.0,
        "optimizer": -3.0,
        # 116 us, less four calls of 10, one of 4, two overheads of a recomputation and two of the backward pass.
        "checkpoint": (50 + 66 - 54 - 10 - 2) / 2,
        "policy": (100 + 131 - 44 - 5 - 2) / 2,
    }


def test_the_reference_model_gives_an_overhead_for_every_caller():
    timer = calibration.Timer(devices.open_device("cpu"))
    found = calibration_host.overheads(timer, until=0.0, least_s=0.3)
    assert found.keys() == {"model", "checkpoint", "policy", "recompute", "backward", "optimizer"}
    assert found["policy"] >= found["model"] >= 0 and found["checkpoint"] >= found["model"]


def test_what_the_command_allows_is_enough_for_what_callers_add(tmp_path, monkeypatch):
    """The trap, met on a whole grid: a budget too short for it, so that keeping outputs costs nothing, and found plans
    are chosen that are a third slower than what they beat."""
    asked = inspect.signature(PlanTask).parameters["calibration_s"].default
    given = []

    def overheads(timer, *, until):
        given.append(until - time.monotonic())
        return {"model": 1e-5, "policy": 1e-4}

    monkeypatch.setattr(calibration_host, "overheads", overheads)
    found = calibration.calibrate_for((), device=devices.open_device("cpu"), budget_s=asked, folder=tmp_path)
    assert found.overheads == {"model": 1e-5, "policy": 1e-4}
    assert given == [pytest.approx(calibration_host.LEAST_S, abs=0.5)]
    calibration.calibrate_for((), device=devices.open_device("cpu"), budget_s=asked, folder=tmp_path)
    assert len(given) == 1, "once per machine"
