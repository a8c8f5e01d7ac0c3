"""The step on fake tensors takes and gives back what the real step does, phase by phase."""

from __future__ import annotations

import pytest
import tiny

from gcbench import checkpointing, models, strategies, training
from gcbench.devices import open_device
from gcbench.records import PHASES
from gcbench.simulate.trace import Block, Trace, trace_step
from gcbench.sources import ModelSource

BATCH_SIZE, SEQ_LEN = 8, 64
SCALARS_BYTES = 256
"""What is left: single numbers that real operators make and fake ones do not."""

FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "opt", "bloom", "mixtral")


def prepare(family, strategy):
    source = ModelSource(name=family, origin="", config=tiny.CONFIGS[family], location="")
    config = models.build_config(source, layers=None, overrides={})
    return source, config, strategies.parse(strategy).plan_for(tiny.NUM_LAYERS)


def measured(family, strategy, precision, optim):
    source, config, plan = prepare(family, strategy)
    dtype = training.parameter_dtype(precision)
    model = models.build(source, config, device="cpu", dtype=dtype, attn_implementation=None, seed=0)
    checkpointing.apply(model, plan)
    batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0)
    step = training.TrainingStep(model, batch=batch, precision=precision, optim=optim, seed=0)
    with open_device("cpu").probe_memory() as probe:
        step()
        step(probe.on_phase)
    return probe.peaks()


def traced(family, strategy, precision, optim):
    _, config, plan = prepare(family, strategy)
    return trace_step(
        config, plan=plan, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, precision=precision, optim=optim
    ).peaks()


@pytest.mark.parametrize("strategy", ["off", "per-layer", "every:2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_is_the_real_step(family, strategy):
    """The traps: tied weights counted twice, a mask built only for tracers, the random state kept by each layer."""
    real, fake = (peaks(family, strategy, "fp32", "adamw_torch") for peaks in (measured, traced))
    for phase in PHASES:
        assert abs(fake.of_phase(phase) - real.of_phase(phase)) <= SCALARS_BYTES, phase
    assert fake.peak_phase == real.peak_phase


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_every_optimizer_is_traced(optim):
    real, fake = (peaks("llama", "per-layer", "fp32", optim) for peaks in (measured, traced))
    assert abs(fake.optimizer_bytes - real.optimizer_bytes) <= SCALARS_BYTES


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_half_precision_is_traced(precision):
    """The trap: autocast keeps a half-precision copy of each weight until the forward pass ends."""
    real, fake = (peaks("llama", "off", precision, "adamw_torch") for peaks in (measured, traced))
    for phase in PHASES:
        assert abs(fake.of_phase(phase) - real.of_phase(phase)) <= SCALARS_BYTES, phase


def test_peaks_of_a_trace_are_those_of_its_phases():
    """By hand: 100 held; forward +50 +30, backward −30 +60 −50 −60, optimizer +20 −20."""
    sizes = (100, 50, 30, 60, 20)
    trace = Trace(
        blocks=[Block(nbytes=size, op=None) for size in sizes],
        events=[0, 1, 2, ~2, 3, ~1, ~3, 4, ~4],
        marks=[(1, "forward"), (3, "backward"), (7, "optimizer")],
    )
    peaks = trace.peaks()
    assert (peaks.forward_bytes, peaks.backward_bytes, peaks.optimizer_bytes) == (180, 210, 120)
    assert peaks.allocated_bytes == 210
    assert peaks.peak_phase == "backward"


def test_what_is_alive_when_a_phase_begins_counts():
    trace = Trace(
        blocks=[Block(nbytes=100, op=None), Block(nbytes=10, op=None)],
        events=[0, ~0, 1],
        marks=[(1, "forward"), (1, "backward"), (2, "optimizer")],
    )
    peaks = trace.peaks()
    assert (peaks.backward_bytes, peaks.optimizer_bytes) == (100, 10)
