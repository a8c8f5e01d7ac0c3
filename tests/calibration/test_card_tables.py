"""Where times come from: a calibration of this machine, a card's measured table, its published rates, in this order."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from timed_calls import calibration_of, pointwise, product

from gcbench.calibration import card_tables, op_times
from gcbench.calibration.figures import figures_of_card, figures_of_target
from gcbench.calibration.op_times import Calibration
from gcbench.core.json_codec import encode
from gcbench.core.records import Machine
from gcbench.devices.cards import Card, find
from gcbench.devices.target import TargetOptions, resolve_target
from gcbench.simulate.costs import CardFigures, Work

H100 = find("h100")
ON_CARD = "cuda, NVIDIA H100 80GB HBM3, torch 2.13.0"
HERE = Machine(device="cpu", device_name="a processor", device_memory_bytes=2**34, platform="x", versions={})


def on_card(*points):
    return Calibration(machine=ON_CARD, created="2026-12-01T10:00:00+00:00", points=points)


def store(table, folder, name="h100"):
    """A file as benchmarks/gpu_rates.py writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"command": "python benchmarks/gpu_rates.py", "source": "measured", "calibration": encode(table)}
    (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")


def target(**options):
    found = resolve_target(TargetOptions(**options), None)
    assert found is not None
    return found


def test_a_table_gives_the_times_of_what_was_measured_and_names_itself(tmp_path):
    store(on_card(product(64, 64, 64, 3e-5), pointwise(1000, 7e-6)), tmp_path)
    figures = figures_of_card(H100, tmp_path)
    assert figures.seconds(product(64, 64, 64)) == 3e-5
    assert figures.seconds(pointwise(1000)) == 7e-6
    assert figures.source == "the measured operator table of NVIDIA H100 80GB HBM3, 2026-12-01"


def test_what_a_table_lacks_comes_from_the_published_rates(tmp_path):
    """The trap: attention, or another precision, at the rate that a table of one product suggests."""
    store(on_card(product(64, 64, 64, 3e-5)), tmp_path)
    figures, rates = figures_of_card(H100, tmp_path), CardFigures(H100)
    bf16 = replace(product(64, 64, 64), dtype="bf16")
    attention = Work(
        op="_flash_attention", kind="attention", dtype="fp32", nbytes=8, flops=10**12, dims=(1, 8, 4096, 4096, 64)
    )
    for work in (bf16, attention, pointwise(10**6)):
        assert figures.seconds(work) == rates.seconds(work)


def test_views_take_no_time_on_a_card_and_python_launches_every_call(tmp_path):
    view = Work(op="view", kind="view", dtype="fp32", nbytes=0)
    store(on_card(replace(pointwise(1000, 7e-6), kind="view", op="view", call="")), tmp_path)
    figures = figures_of_card(H100, tmp_path)
    assert figures.seconds(view) == 0.0
    assert figures.host_s(view) == CardFigures(H100).host_s(view) > 0


@pytest.mark.parametrize("content", ["", "not JSON", "[]", "{}", '{"calibration": {}}', '{"calibration": null}'])
def test_a_broken_table_is_no_table(tmp_path, content):
    (tmp_path / "h100.json").write_text(content, encoding="utf-8")
    assert isinstance(figures_of_card(H100, tmp_path), CardFigures)


def test_a_table_of_another_schema_without_points_or_with_a_time_of_nothing_is_no_table(tmp_path):
    good = on_card(product(64, 64, 64, 3e-5))
    for bad in (replace(good, schema=1), replace(good, points=()), on_card(product(64, 64, 64, 0.0))):
        store(bad, tmp_path)
        assert card_tables.load(H100, tmp_path) is None


def test_other_cards_do_not_use_it(tmp_path):
    store(on_card(product(64, 64, 64, 3e-5)), tmp_path)
    assert card_tables.load(find("a100-80gb"), tmp_path) is None


def test_a_cpu_has_the_times_of_its_own_calibration_or_none(tmp_path):
    assert figures_of_target(target(device="cpu"), HERE, tmp_path) is None
    known = replace(calibration_of(pointwise(1000, 7e-6)), machine=op_times.machine_key(HERE))
    op_times.save(known, tmp_path)
    assert figures_of_target(target(device="cpu"), HERE, tmp_path) == known
    assert figures_of_target(target(device="cpu"), None, tmp_path) is None


def test_a_card_without_rates_has_no_times(tmp_path):
    """The trap: an A100's rates for a card of which only the memory is known."""
    assert figures_of_target(target(device_memory=2**34), None, tmp_path) is None
    bare = replace(target(device="h100"), card=Card(name="mine", memory_bytes=2**34))
    assert figures_of_target(bare, None, tmp_path) is None
    assert figures_of_target(target(device="h100"), None, tmp_path) is not None


def test_a_gpu_of_this_machine_has_the_rates_of_its_name_until_it_is_calibrated(tmp_path):
    """torch tells its name and memory, not its rates."""
    settings = {"compute_capability": "9.0", "num_sms": "132"}
    machine = Machine(
        device="cuda:0",
        device_name="NVIDIA H100 80GB HBM3",
        device_memory_bytes=2**36,
        platform="x",
        versions={},
        settings=settings,
    )
    here = resolve_target(TargetOptions(), machine)
    assert here is not None
    found = figures_of_target(here, machine, tmp_path)
    assert found is not None and found.source == "the published rates of NVIDIA H100 80GB HBM3"
    other = replace(machine, device_name="NVIDIA Z9000")
    assert (
        figures_of_target(replace(here, card=Card(name="cuda:0", memory_bytes=1, full_name="Z9")), other, tmp_path)
        is None
    )


def test_a_calibration_of_a_gpu_counts_kernels_and_python_apart():
    """On a processor a call's time includes Python's; a GPU computes while Python launches."""
    view = Work(op="view", kind="view", dtype="fp32", nbytes=0)
    gpu, cpu = on_card(pointwise(1000, 7e-6)), calibration_of(pointwise(1000, 7e-6))
    assert gpu.seconds(view) == 0.0 < cpu.seconds(view)
    assert gpu.host_s(pointwise(1000)) > 0.0 == cpu.host_s(pointwise(1000))


def test_how_much_of_a_step_was_never_timed():
    known = calibration_of(pointwise(1000, 1e-6), product(64, 64, 64, 3e-6))
    near, far = pointwise(1010), product(4096, 4096, 4096)
    assert known.unmeasured_frac([near, near]) == 0.0
    assert known.unmeasured_frac([far]) == 1.0
    assert 0.9 < known.unmeasured_frac([near, far]) < 1.0
    assert known.unmeasured_frac([]) == 0.0
