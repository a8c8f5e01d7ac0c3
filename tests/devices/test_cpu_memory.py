"""The CPU's peaks are exact to the byte, compared with all allocations since before the model was built."""

from __future__ import annotations

import gc
from itertools import product

import pytest
import tiny
import torch
from built import BATCH_SIZE, SEQ_LEN, build, run_until_state
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

from gcbench.core.records import PHASES, Phase
from gcbench.devices.backends import open_device
from gcbench.devices.backends.cpu import tensor_bytes
from gcbench.models import sources
from gcbench.report import report_file as reports
from gcbench.training import optimizers
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")


FAMILIES = ("llama", "gpt2", "mixtral")
CASES = [
    # Every family with every precision and with every optimizer: 24 cases stand for 96.
    (family, precision, optimizers.names()[(f + p) % 4], strategy)
    for (f, family), (p, precision) in product(enumerate(FAMILIES), enumerate(training.PRECISIONS))
    for strategy in ("off", "per-layer")
]


@pytest.mark.parametrize(("family", "precision", "optim", "strategy"), CASES)
def test_the_peak_of_each_phase_is_exact(tmp_path, family, precision, optim, strategy):
    """The traps: what the optimizer replaces in the measured step was allocated before it, so that its release counts
    for nothing; storages shared by tied weights counted twice; and the caches of autocast forgotten."""
    source = sources.resolve(str(tiny.write_model(tmp_path / family, family)))
    truth = account(source, precision, optim, strategy)
    device = open_device("cpu")
    step = build(source, precision, optim, strategy)
    with device.probe_memory() as probe:
        run_until_state(step)
        device.settle()
        step(probe.on_phase)
    peaks = probe.peaks()
    assert {phase: peaks.of_phase(phase) for phase in PHASES} == truth
    assert peaks.allocated_bytes == max(truth.values())


def account(source: sources.ModelSource, precision: str, optim: str, strategy: str) -> dict[Phase, int]:
    """The reference: every allocation and release since before the model was built, and the memory before it."""
    gc.collect()
    live = bytes_of_all_tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build(source, precision, optim, strategy)
        run_until_state(step)

        def mark(phase: Phase) -> None:
            with record_function(f"mark {phase}"):
                pass

        step(mark)
    peaks: dict[Phase, int] = {}
    current: Phase | None = None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        for phase in PHASES:
            if event.name() == f"mark {phase}":
                current, peaks[phase] = phase, live
        if event.name() == "[memory]":
            live += event.nbytes()
            if current:
                peaks[current] = max(peaks[current], live)
    return peaks


def bytes_of_all_tensors() -> int:
    """Bytes of real tensors: a fake tensor left alive by another test has no storage."""
    tensors = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor)
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_storage_counts_once_and_whole():
    """The traps: two views of one storage, a view of a part of it, and tensors without CPU storage."""
    gc.collect()
    before = tensor_bytes()
    base = torch.zeros(1000, dtype=torch.float64)
    views = [base[990:], base.view(10, 100), base.t(), base.detach()]
    nowhere = [torch.empty(10**9, device="meta"), torch.zeros(3).to_sparse()]
    assert tensor_bytes() - before == 8000
    del base, views[1:], nowhere
    assert tensor_bytes() - before == 8000  # the part holds the whole
    del views
    assert tensor_bytes() == before


def test_the_optimizer_phase_by_hand(tmp_path):
    """Fused AdamW works in place: parameters, gradients and two states in fp32, and next to nothing beside them."""
    source = sources.resolve(str(tiny.write_model(tmp_path / "llama", "llama")))
    step = build(source, "fp32", "adamw_torch_fused", "off")
    num_params = sum(p.numel() for p in step.model.parameters())
    with open_device("cpu").probe_memory() as probe:
        run_until_state(step)
        step(probe.on_phase)
    step_counters = 4 * len(list(step.model.parameters()))
    batch = BATCH_SIZE * SEQ_LEN * 8
    buffers = sum(b.numel() * b.element_size() for b in step.model.buffers())
    by_hand = 16 * num_params + step_counters + batch + buffers
    assert by_hand <= probe.peaks().optimizer_bytes < by_hand + 8192


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_two_runs_of_one_config_have_the_same_peaks(cli, model, tmp_path, family):
    """Each in its own process, with dropout or routing: identical to the byte, as are the gradients."""
    found = []
    for name in ("first", "second"):
        result = cli(
            *("run", "-m", model(family), "--batch", 4, "--seq-len", 64, "--strategies", "off,per-layer,every:2"),
            *("--rounds", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / name),
        )
        assert result.code == 0, result.err
        rounds = [outcome.rounds[0] for outcome in reports.load(tmp_path / name).outcomes]
        found.append(
            [
                (r.memory.forward_bytes, r.memory.backward_bytes, r.memory.optimizer_bytes, r.grad_checksum)
                for r in rounds
            ]
        )
    assert found[0] == found[1]


def test_a_run_reports_the_exact_peak(cli, model, tmp_path):
    """From the child process to the table, compared with the same reference."""
    folder = model("gpt2")
    result = cli(
        *("run", "-m", folder, "--batch", BATCH_SIZE, "--seq-len", SEQ_LEN, "--strategies", "off,per-layer"),
        *("--rounds", 1, "--steps", 1, "--device", "cpu", "--json"),
    )
    assert result.code == 0, result.err
    gc.collect()
    held_here = bytes_of_all_tensors()  # by this process, which has imported more than a child has
    for strategy, row in result.rows.items():
        truth = account(sources.resolve(str(folder)), "fp32", "adamw_torch", strategy)
        assert row["peak_allocated_bytes"] == max(truth.values()) - held_here
        assert row["peak_phase"] == max(PHASES, key=lambda phase: truth[phase])
