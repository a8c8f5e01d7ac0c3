"""A step composed from a few layers equals the step traced in full, to the byte, whatever the family and the plan."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from gcbench import strategies
from gcbench.core.records import PHASES, Lora
from gcbench.devices.target import Target
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.simulate import timeline
from gcbench.simulate.compose.block_kinds import Kind
from gcbench.simulate.device_model import device_model_for
from gcbench.simulate.predictor import Predictor
from gcbench.training.step import parameter_dtype

BATCH_SIZE = 2

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

UNIFORM = {
    # Tied weights: one block, one gradient, one state.
    "llama": {**tiny.CONFIGS["llama"], "tie_word_embeddings": True},
    "gpt2": tiny.CONFIGS["gpt2"],
    # Its layers return tuples.
    "bloom": tiny.CONFIGS["bloom"],
    "gpt_neox": tiny.CONFIGS["gpt_neox"],
    "opt": tiny.CONFIGS["opt"],
    "falcon": {"model_type": "falcon", **tiny.LLAMA_LIKE},
    "mixtral": tiny.CONFIGS["mixtral"],
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "head_dim": 8, **EXPERTS, **tiny.LLAMA_LIKE},
    "mamba": tiny.CONFIGS["mamba"],
}
"""Families whose layers are all of one kind."""

ALTERNATING = {
    # Two kinds of attention, and with them two masks and two rotary tables, each held up to its last layer.
    "gemma2": tiny.CONFIGS["gemma2"],
    # Convolutions and attention.
    "lfm2": {"model_type": "lfm2", **tiny.LLAMA_LIKE, "layer_types": ["conv", "full_attention"] * 4},
    # Mamba and attention, both with experts.
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **MAMBA2,
        **tiny.LLAMA_LIKE,
        "layer_types": ["mamba", "attention"] * 4,
    },
}
"""Families in which two kinds of layers alternate."""

LOOPING = ("mamba", "granitemoehybrid")
"""Families that go through the sequence token by token or chunk by chunk: four tokens are enough for them."""

LEAST_LAYERS = {"off": 5, "per-layer": 5, "reentrant": 5, "every:2": 8, "every:3": 12}
"""Numbers of layers of which some are left out, if all are of one kind."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def predictor(config, layers, *, lora=None, precision="fp32", **kwargs):
    source = ModelSource(name=config["model_type"], origin="", config=config, location="")
    built = models.build_config(source, layers=layers, overrides={})
    model = models.build_meta(built, dtype=parameter_dtype(precision), lora=lora)
    return Predictor(model, precision=precision, **{"optim": "adamw_torch_fused", **kwargs})


def steps(config, strategy, *, layers, seq_len=16, **kwargs):
    """The composed step and the step traced in full."""
    both = []
    for exact in (False, True):
        one = predictor(config, layers, exact=exact, **kwargs)
        plan = strategies.parse(strategy).plan_for(layers)
        both.append(one.step(plan, batch_size=BATCH_SIZE, seq_len=seq_len))
    return both


def assert_composed_is_full(config, strategy, *, layers, **kwargs):
    """Check that both are equal in every phase, with layers left out."""
    composed, full = steps(config, strategy, layers=layers, **kwargs)
    assert composed.why_in_full is None
    assert composed.layers_traced < layers == full.layers_traced
    few, all_of_them = (timeline.exact(step.timeline).memory for step in (composed, full))
    for phase in PHASES:
        assert few.of_phase(phase) == all_of_them.of_phase(phase), phase
    assert few == all_of_them
    return composed, full


@pytest.mark.parametrize("strategy", ["off", "per-layer", "every:2"])
@pytest.mark.parametrize("family", [*UNIFORM, *ALTERNATING])
def test_a_few_layers_represent_all(family, strategy):
    """The traps: a layer's input, held by it or by the layer before, by their policies; what layers of one kind share,
    which the last of them frees; gradients that wait for the optimizer in the order of the layers.
    """
    layers = LEAST_LAYERS["every:2"] if family in ALTERNATING else LEAST_LAYERS[strategy]
    config = {**UNIFORM, **ALTERNATING}[family]
    assert_composed_is_full(config, strategy, layers=layers, seq_len=4 if family in LOOPING else 16)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_wider_stride_is_composed(family):
    """Two kinds of neighbours of a layer that is not checkpointed: before and behind a checkpointed one."""
    assert_composed_is_full(UNIFORM[family], "every:3", layers=LEAST_LAYERS["every:3"])


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_the_update_of_every_layer_follows_the_passes(optim):
    """Optimizers that go through the parameters one after the other, each with its own gradient."""
    assert_composed_is_full(UNIFORM["llama"], "per-layer", layers=5, optim=optim)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_copies_of_the_weights_of_layers_that_are_left_out_count(precision):
    """The trap: autocast's copies live from a layer's forward pass to the end of the whole model's."""
    assert_composed_is_full(UNIFORM["llama"], "off", layers=5, precision=precision)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *(("llama", strategy) for strategy in ("off", "per-layer", "every:2", "reentrant")),
        *(("mixtral", strategy) for strategy in ("off", "every:2")),
    ],
)
def test_with_cudas_allocator_the_peaks_are_the_same(family, strategy):
    """Sizes alone are not enough here: what is reserved depends on the order of every event."""
    device = device_model_for(Target(kind="cuda", name="x"))
    composed, full = assert_composed_is_full(
        UNIFORM[family],
        strategy,
        layers=LEAST_LAYERS[strategy],
        optim="adamw_torch",
        trace_mode=device.trace_mode,
        resident=device.resident,
        steps_on_device=False,
    )
    few, all_of_them = (timeline.cached(step.timeline).memory for step in (composed, full))
    assert few == all_of_them
    assert few.reserved_bytes > few.allocated_bytes > sum(term.nbytes for term in device.resident) > 0


@pytest.mark.parametrize("strategy", ["off", "reentrant"])
def test_the_loss_is_held_until_the_optimizer_has_stepped(strategy):
    """And with it what its graph holds: with reentrant checkpointing, what the layers share."""
    for step in steps(UNIFORM["llama"], strategy, layers=5, optim="adamw_torch"):
        line = step.timeline
        last_update = max(place for place, event in enumerate(line.events) if event >= 0)
        assert last_update > line.marks[2][0]
        held = [int(line.nbytes[~event]) for event in line.events[last_update:] if event < 0]
        assert held[-1] == 4  # the loss itself
        rotary_bytes = 16 * 8 * 4
        assert (held.count(rotary_bytes) >= 2) == (strategy == "reentrant")


def bytes_by_kind(step):
    """Bytes of a kind that the measured step finds allocated or allocates, at any time."""
    kinds, line = step.assembly.kinds, step.timeline
    before, within = np.split(line.events, [line.marks[0][0]])
    there = {*before[before >= 0], *within[within >= 0]} - {*~before[before < 0]}
    return {kind: sum(int(line.nbytes[n]) for n in there if kinds[n] == kind) for kind in Kind}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_counted_once(tied):
    """Their memory, their gradient and their states; by hand, from the model itself."""
    config = {**tiny.CONFIGS["llama"], "tie_word_embeddings": tied}
    one = predictor(config, 5)
    model = one.fake_model.model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    nbytes = sum(param.nbytes for param in model.parameters())  # which gives each parameter once
    step = one.step(strategies.parse("per-layer").plan_for(5), batch_size=BATCH_SIZE, seq_len=16)
    assert step.why_in_full is None
    sizes = bytes_by_kind(step)
    assert sizes[Kind.PARAMETERS] == nbytes
    assert sizes[Kind.GRADIENTS] == nbytes
    assert sizes[Kind.OPTIMIZER] == 2 * nbytes + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("strategy", ["off", "per-layer"])
def test_frozen_parameters_have_no_gradient_and_no_state(strategy):
    """The trap: adapters are in every layer, and the frozen weights beside them get neither."""
    lora = Lora(r=4, target_modules=None)
    composed, _ = assert_composed_is_full(UNIFORM["llama"], strategy, layers=5, lora=lora)
    params = list(predictor(UNIFORM["llama"], 5, lora=lora).fake_model.model.parameters())
    trained = [param for param in params if param.requires_grad]
    nbytes = sum(param.nbytes for param in trained)
    assert 0 < len(trained) < len(params)
    sizes = bytes_by_kind(composed)
    assert sizes[Kind.PARAMETERS] == sum(param.nbytes for param in params)
    assert sizes[Kind.GRADIENTS] == nbytes
    assert sizes[Kind.OPTIMIZER] == 2 * nbytes + 4 * len(trained)


@pytest.mark.parametrize("strategy", ["off", "per-layer", "every:2"])
def test_how_many_layers_are_traced_does_not_depend_on_the_depth(strategy):
    traced = [
        predictor(UNIFORM["llama"], layers, optim="sgd")
        .step(strategies.parse(strategy).plan_for(layers), batch_size=1, seq_len=8)
        .layers_traced
        for layers in (12, 48)
    ]
    assert traced[0] == traced[1] <= 6


def test_a_layer_more_costs_what_a_layer_costs():
    """Far from any edge the peak is a line in the number of layers, so that depth can be trusted beyond what a full
    trace could check."""
    plan = strategies.parse("off")
    peaks = []
    for layers in (10, 11, 40, 41):
        step = predictor(UNIFORM["llama"], layers, optim="sgd").step(plan.plan_for(layers), batch_size=2, seq_len=16)
        peaks.append(timeline.exact(step.timeline).memory.backward_bytes)
    assert peaks[1] - peaks[0] == peaks[3] - peaks[2] > 0
    assert peaks[2] - peaks[0] == 30 * (peaks[1] - peaks[0])


def test_one_predictor_predicts_every_cell_as_a_new_one_would():
    """The traps: weights that were materialized for an earlier cell, hooks and flags that it left on the layers."""
    shared = predictor(UNIFORM["gpt2"], 5)
    for strategy, batch_size, seq_len in (("off", 1, 8), ("every:2", 2, 16), ("off", 1, 8)):
        plan = strategies.parse(strategy).plan_for(5)
        asked = {"batch_size": batch_size, "seq_len": seq_len}
        again = timeline.exact(shared.step(plan, **asked).timeline)
        assert again == timeline.exact(predictor(UNIFORM["gpt2"], 5).step(plan, **asked).timeline)


# What memory is called. A large vocabulary and few tokens, so that weights are larger than logits.

WIDE = {**tiny.CONFIGS["llama"], "vocab_size": 2048}


def shapes_of(step, kind, phase):
    """Shapes of the blocks of a kind that a phase allocates."""
    start, end = next((start, end) for name, start, end in step.timeline.spans() if name == phase)
    taken = [int(event) for event in step.timeline.events[start:end] if event >= 0]
    return {step.assembly.block(block).shape for block in taken if step.assembly.kinds[block] == kind}


def test_logits_are_classified_as_logits():
    """By their tokens: 2 sequences of 3."""
    for step in steps(WIDE, "off", layers=4, seq_len=3, optim="sgd"):
        for phase in ("forward", "backward"):
            shapes = shapes_of(step, Kind.LOGITS, phase)
            assert {(2, 3, 2048), (6, 2048)} & shapes


def test_the_batch_is_no_state_of_the_optimizer():
    _, full = steps(tiny.CONFIGS["llama"], "off", layers=4, optim="sgd")
    assert bytes_by_kind(full)[Kind.OPTIMIZER] == 0


def test_what_the_optimizer_allocates_for_an_embedding_is_no_logits():
    """The trap: a hint that a chunked loss would reduce the peak of the optimizer step."""
    composed, full = steps(WIDE, "off", layers=4, seq_len=2, optim="adamw_torch")
    assert shapes_of(composed, Kind.LOGITS, "optimizer") == set()
    assert shapes_of(full, Kind.LOGITS, "optimizer") == set()


def test_the_gradients_of_a_tied_embedding_are_no_logits():
    """Two are computed, for the head and for the embedding, and then added: none of them is per token."""
    composed, _ = steps({**WIDE, "tie_word_embeddings": True}, "off", layers=4, seq_len=2, optim="sgd")
    assert (2048, 32) not in shapes_of(composed, Kind.LOGITS, "backward")
