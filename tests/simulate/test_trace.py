"""The step on fake tensors allocates and frees what the real step does, phase by phase."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.records import PHASES, Lora
from gcbench.devices.backends import open_device
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.simulate import timeline
from gcbench.simulate.events import Block, KernelBuffer, Trace
from gcbench.simulate.predictor import Predictor
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.recorder import Recorder
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH_SIZE, SEQ_LEN = 8, 64
LOOPING = {"mamba": 12}
"""Lengths for families whose layers loop over the sequence."""
SCALARS_BYTES = 128
"""Bytes of the remaining difference: single numbers that real operators allocate and fake ones do not."""

LORA = Lora(r=4, target_modules=None)


def test_the_first_call_in_a_pass_is_sought_in_the_first_step_alone():
    """By hand: a linear layer in the forward pass of the step that is measured is none of the first backward pass."""
    linear, other = Block(8, "addmm.default"), Block(8, "mm.default")
    trace = Trace(blocks=[linear, other, linear, other], events=[0, 1, 2, 3], forward_at=0, backward_at=1)
    trace.marks = [(2, "forward"), (3, "backward"), (4, "optimizer")]
    assert trace.first({"addmm.default"}, backward=False) == 1
    assert trace.first({"mm.default"}, backward=True) == 2
    assert trace.first({"addmm.default"}, backward=True) is None


def prepare(family, strategy, layers=tiny.NUM_LAYERS):
    source = ModelSource(name=family, origin="", config=tiny.CONFIGS[family], location="")
    config = models.build_config(source, layers=layers, overrides={})
    return source, config, strategies.parse(strategy).plan_for(layers)


def measured(family, strategy, precision, optim, *, attn=None, lora=None):
    source, config, plan = prepare(family, strategy)
    dtype = training.parameter_dtype(precision)
    model = models.build(source, config, device="cpu", dtype=dtype, attn_implementation=attn, seed=0, lora=lora)
    checkpointing.apply(model, plan)
    batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=LOOPING.get(family, SEQ_LEN), seed=0)
    step = training.TrainingStep(model, batch=batch, precision=precision, optim=optim, seed=0)
    with open_device("cpu").probe_memory() as probe:
        step()
        step(probe.on_phase)
    return probe.peaks()


def predicted(family, strategy, precision, optim, *, attn=None, lora=None, exact=False):
    _, config, plan = prepare(family, strategy)
    kwargs = {} if attn is None else {"attn_implementation": attn}
    model = models.build_meta(config, dtype=training.parameter_dtype(precision), lora=lora, **kwargs)
    predictor = Predictor(model, precision=precision, optim=optim, exact=exact)
    step = predictor.step(plan, batch_size=BATCH_SIZE, seq_len=LOOPING.get(family, SEQ_LEN))
    return timeline.exact(step.timeline).memory


def assert_same(family, strategy, precision="fp32", optim="adamw_torch", **kwargs):
    fake = predicted(family, strategy, precision, optim, **kwargs)
    kwargs.pop("exact", None)
    real = measured(family, strategy, precision, optim, **kwargs)
    for phase in PHASES:
        assert abs(fake.of_phase(phase) - real.of_phase(phase)) <= SCALARS_BYTES, phase
    assert fake.peak_phase == real.peak_phase


@pytest.mark.parametrize("strategy", ["off", "per-layer", "every:2"])
@pytest.mark.parametrize("family", tiny.CHECKPOINTING)
def test_a_prediction_is_the_real_step(family, strategy):
    """The traps: tied weights counted twice, a mask built only for tracers, the random state saved by each layer, and
    gradients that the engine adds in place for real tensors only (Mamba's loop over the sequence)."""
    assert_same(family, strategy)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_every_optimizer_is_traced(optim):
    assert_same("llama", "per-layer", optim=optim)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_half_precision_is_traced(precision):
    """The trap: autocast keeps a half-precision copy of each weight until the forward pass ends."""
    assert_same("llama", "off", precision)


def test_the_gradient_scaler_is_traced():
    """The trap: it reads whether a gradient overflowed, and fake tensors have no data."""
    assert_same("llama", "every:2", "fp16-mixed")


def test_eager_attention_is_traced():
    assert_same("llama", "off", attn="eager")


@pytest.mark.parametrize("strategy", ["off", "per-layer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_have_no_gradients_and_states(precision, strategy):
    """The trap: in a model of 16 bits the adapters have 32."""
    assert_same("llama", strategy, precision, lora=LORA)


def test_a_full_trace_has_the_same_peaks():
    assert_same("gpt2", "every:2", exact=True)


def test_peaks_are_those_of_the_phases():
    """By hand: 100 resident; forward +50 +30, backward −30 +60 −50 −60, optimizer +20 −20."""
    line = Timeline(
        nbytes=np.array([100, 50, 30, 60, 20]),
        events=np.array([0, 1, 2, ~2, 3, ~1, ~3, 4, ~4]),
        marks=((1, "forward"), (3, "backward"), (7, "optimizer")),
    )
    peak = timeline.exact(line)
    assert [peak.memory.of_phase(phase) for phase in PHASES] == [180, 210, 120]
    assert peak.memory.allocated_bytes == 210
    assert peak.memory.peak_phase == "backward"
    assert peak.at == 4


def test_what_is_alive_when_a_phase_begins_counts():
    line = Timeline(
        nbytes=np.array([100, 10]),
        events=np.array([0, ~0, 1]),
        marks=((1, "forward"), (1, "backward"), (2, "optimizer")),
    )
    peaks = timeline.exact(line).memory
    assert (peaks.backward_bytes, peaks.optimizer_bytes) == (100, 10)


def test_buffers_inside_an_operator_live_as_long_as_they_say():
    """The trap: one set of buffers, alive at one time, after the results: another free block for each of them."""
    inside = (
        KernelBuffer(name="first", nbytes=10, after_results=0),
        KernelBuffer(name="brief", nbytes=20, after_results=0, outlives=1),
        KernelBuffer(name="briefer", nbytes=30, after_results=0, outlives=0),
        KernelBuffer(name="last", nbytes=40),
    )
    recorder = Recorder(lambda func, args, kwargs, result: inside)
    with FakeTensorMode(), recorder:
        kept = torch.empty(8)
    sizes = [block.nbytes for block in recorder.trace.blocks]
    assert sizes == [10, 20, 30, kept.nbytes, 40]
    assert recorder.trace.events == [0, 1, 2, ~2, ~1, 3, 4, ~4, ~0]
