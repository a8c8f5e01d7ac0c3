"""Models whose layers are recomputed in segments, their gradients, and what must not be left behind."""

from __future__ import annotations

from collections import Counter

import tiny
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.training import step as training

BATCH_SIZE, SEQ_LEN, WIDTH = 2, 8, 32
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
FAMILIES = {
    **tiny.CHECKPOINTING,
    # Its layers return tuples.
    "falcon": {"model_type": "falcon", **tiny.LLAMA_LIKE},
    # A mask and rotary tables for each kind of attention.
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4, **tiny.LLAMA_LIKE},
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **MAMBA2,
        **tiny.LLAMA_LIKE,
        "layer_types": ["mamba", "attention"] * 2,
    },
}
SEGMENTS = ("segment:2", "segment:3", "segment:4")


def build(family, layers=tiny.NUM_LAYERS):
    source = ModelSource(name=family, origin="", config=FAMILIES[family], location="")
    config = models.build_config(source, layers=layers, overrides={})
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
    return model.train()


def apply(model, spec):
    plan = spec
    if isinstance(spec, str):
        plan = strategies.parse(spec).plan_for(len(checkpointing.checkpointable_layers(model)))
    return checkpointing.apply(model, plan)


def inputs_of(model, seed=0):
    batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=seed)
    return training.forward_inputs(model, batch)


def gradients(model, inputs, spec=None):
    """Of one pass, dropout on and the same for every call; with `spec`, under that strategy."""
    if spec is not None:
        checkpointing.clear(model)
        apply(model, spec)
    model.zero_grad()
    torch.manual_seed(7)
    model(**inputs).loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_nothing_is_switched_on():
    """No hook takes what is saved for a backward pass, and no mode sees operators.

    The trap: with checkpointing's hooks left on, all that comes later is part of a segment that is never run again.
    """
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert _get_current_dispatch_mode_stack() == []
    assert torch.is_grad_enabled()


class Boom(Exception):
    pass


def count_calls(model):
    """How often each layer runs, by (phase, number); the phase is what the test says it is.

    A layer's own hooks are outside of what is checkpointed, those of its parts are not.
    """
    calls, phase = Counter(), ["forward"]
    for number, layer in enumerate(checkpointing.checkpointable_layers(model)):

        def count(*args, number=number):
            calls[phase[0], number] += 1

        layer.mlp.register_forward_pre_hook(count)
    return calls, phase
