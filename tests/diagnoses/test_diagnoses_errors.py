"""Causes of errors and of no saving, provoked by real code on models of four layers or toys.

Simulated, because they do not happen on a CPU: FSDP's casts, and a compiled layer that is recomputed by another graph.
Each such test says what it substitutes.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.utils import logging as transformers_logging
from trials import IDS, Block, Step, Trial, build, checkpointed, layers_of, linear, told, train, train_toy

pytestmark = pytest.mark.usefixtures("one_thread")

# Nothing gained


def test_a_model_in_eval_mode_recomputes_nothing():
    model = build("llama")
    off = Trial(model, train(model), strategy="off")
    again = checkpointed(model, use_reentrant=False)
    facts = {"layers_expected": 4, "num_layers": 4}
    assert told(Trial(model, train(model), off, again, training=model.training, **facts)) is None
    again.clear()
    model.eval()
    trial = Trial(model, train(model), off, again, training=model.training, **facts)
    assert trial.seen.layers_recomputed == 0
    assert told(trial) == "eval-mode"


@pytest.mark.parametrize("strategy", ["off", "per-layer"])
def test_a_cache_that_training_builds(strategy):
    transformers_logging.warning_once.cache_clear()  # it says a thing once in a process, to whichever test was first
    model = build("llama")
    if strategy != "off":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old name, which is the only one before 5.23
            model.gradient_checkpointing_enable()
    trial = Trial(model, train(model, use_cache=True), strategy=strategy, use_cache=True)
    assert trial.seen.warned_of("incompatible with gradient checkpointing") == (strategy != "off")
    assert (model(input_ids=IDS, use_cache=True).past_key_values is not None) == (strategy == "off")
    assert told(trial) == "cache-left-on"
    assert told(Trial(model, train(model), strategy=strategy)) is None


# Errors


def test_trained_parameters_in_fp16():
    def step(model: nn.Module) -> torch.Tensor:
        scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(model.parameters())
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return loss

    model = build("llama")
    assert told(Trial(model, partial(step, model), precision="fp16-mixed")) is None
    trial = Trial(model.half(), partial(step, model), precision="fp16-mixed")
    assert trial.seen.error_type == "ValueError"
    assert told(trial) == "fp16-weights-with-scaler"


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    if not distributed.is_available():
        pytest.skip("this torch has no distributed package")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_and_a_backward_pass_inside_the_backward_pass():
    for reentrant in (True, False):
        model = build("llama")
        checkpointed(model, use_reentrant=reentrant)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        trial = Trial(parallel, train(parallel), reentrant=reentrant)
        if reentrant:
            assert told(trial) == "ddp-marked-twice"
        else:
            assert told(trial) is None, trial.seen


def test_a_backward_pass_with_named_inputs():
    layer = linear()

    def step(*, reentrant: bool) -> torch.Tensor:
        x = torch.randn(4, 8, requires_grad=True)
        loss = checkpoint(layer, x, use_reentrant=reentrant).square().sum()
        torch.autograd.grad(loss, x)
        return loss

    trial = Trial(layer, partial(step, reentrant=True), reentrant=True)
    assert told(trial) == "reentrant-with-autograd-grad"
    assert told(Trial(layer, partial(step, reentrant=False))) is None


def test_tensors_in_a_tuple():
    outer, model = linear(), nn.Sequential(Block(lambda hidden, pair: hidden * pair[0]), Block())

    def step(x: torch.Tensor) -> torch.Tensor:
        pair = (torch.tanh(outer(x)),)
        return model[1](model[0](model[0](x, pair), pair))

    checkpointed(model, use_reentrant=True)
    trial = Trial(model, train_toy(step), reentrant=True)
    assert told(trial) == "reentrant-nested-inputs"
    checkpointed(model, use_reentrant=False)
    assert told(Trial(model, train_toy(step))) is None


def test_a_state_that_retains_its_graph_between_steps():
    class Recurrent(nn.Module):
        def __init__(self, *, detach: bool) -> None:
            super().__init__()
            self.block, self.state, self.detach = Block(), torch.zeros(4, 8), detach

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.block(x + self.state)
            self.state = out.detach() if self.detach else out
            return out

    trials = {}
    for detach in (False, True):
        model = Recurrent(detach=detach)
        checkpointed(model, use_reentrant=False)
        trials[detach] = Trial(model, train_toy(model, times=2))
    trial = trials[False]
    assert told(trial) == "graph-kept-between-steps"
    assert told(trials[True]) is None


def test_a_saved_output_that_is_changed_in_place():
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    layer = linear()

    def step(activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: activation(layer(x)).sin(), x, use_reentrant=False, context_fn=contexts)

    trial = Trial(layer, train_toy(partial(step, torch.relu_)), strategy="selective")
    assert told(trial) == "selective-kept-then-mutated"
    assert told(Trial(layer, train_toy(partial(step, torch.relu)), strategy="selective")) is None


def test_a_cast_that_autocast_had_cached():
    """The trap: it makes no difference whether the policy saves casts."""
    layer = linear()
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    run = partial(checkpoint, lambda x: layer(x).sin(), use_reentrant=False, context_fn=contexts)

    def twice(x: torch.Tensor, *, cache: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            return run(run(x))

    facts = {"strategy": "selective", "precision": "bf16-mixed"}
    trial = Trial(layer, train_toy(partial(twice, cache=True)), **facts)
    assert told(trial) == "selective-autocast-cache"
    assert told(Trial(layer, train_toy(partial(twice, cache=False)), **facts)) is None


def test_autocast_that_is_off_in_the_recomputation():
    model, autocast = nn.Sequential(linear(), nn.GELU(), linear()), {"enabled": True}

    def layer(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
            return model(x)

    def step(*, switch: bool) -> torch.Tensor:
        autocast["enabled"] = True
        loss = checkpoint(layer, torch.randn(4, 8), use_reentrant=False).float().sum()
        autocast["enabled"] = not switch
        loss.backward()
        return loss

    trial = Trial(model, partial(step, switch=True), precision="bf16-mixed")
    assert trial.seen.error_type == "CheckpointError"
    assert told(trial) == "autocast-differs"
    assert told(Trial(model, partial(step, switch=False), precision="bf16-mixed")) is None


def test_a_cast_of_inputs_that_the_recomputation_skips():
    """Simulated: FSDP2 casts again from PyTorch 2.13 on. A cast only in the first pass reproduces it."""
    model = nn.Sequential(linear(), nn.GELU(), linear()).bfloat16()
    trials = {}
    for skip in (True, False):
        calls = itertools.count()

        def layer(x: torch.Tensor, skip: bool = skip, calls: Iterator[int] = calls) -> torch.Tensor:
            scaled = x if next(calls) and skip else x.bfloat16()
            return model((scaled * scaled).bfloat16())

        step = train_toy(lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False))
        trials[skip] = Trial(model, step, sharded=True, precision="bf16-mixed")
    trial = trials[True]
    assert trial.seen.error_type == "CheckpointError"
    assert told(trial) == "sharded-cast-skipped"
    assert told(trials[False]) is None


def test_a_layer_that_takes_another_branch():
    layer, training_step = linear(), {"number": 0}

    def forward(*, counting: bool, x: torch.Tensor) -> torch.Tensor:
        training_step["number"] += counting
        hidden = layer(x).sin()
        return hidden.exp().sin() if training_step["number"] % 2 else hidden.cos()

    def step(*, counting: bool) -> Step:
        training_step["number"] = 0
        return train_toy(lambda x: checkpoint(lambda x: forward(counting=counting, x=x), x, use_reentrant=False))

    trial = Trial(layer, step(counting=True))
    assert "A different number of tensors was saved" in trial.seen.error_text
    assert told(trial) == "recompute-took-another-branch"
    assert told(Trial(layer, step(counting=False))) is None


def test_a_compiled_layer_that_another_graph_recomputes():
    """Simulated: the recomputation runs without any graph, in place of a different graph."""
    torch._dynamo.reset()
    model = nn.Sequential(linear(), nn.GELU(), linear(), nn.Tanh())
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")

    def step(*, stance: str) -> torch.Tensor:
        loss = checkpoint(compiled, torch.randn(4, 8), use_reentrant=False).sum()
        with torch.compiler.set_stance(stance):
            loss.backward()
        return loss

    trial = Trial(model, partial(step, stance="force_eager"), compiled=True)
    assert trial.seen.error_type == "CheckpointError"
    assert told(trial) == "compiled-recompute-differs"
    assert told(Trial(model, partial(step, stance="default"), compiled=True)) is None
    torch._dynamo.reset()


@pytest.mark.parametrize("own", [False, True], ids=["transformers", "own code"])
def test_a_cache_that_the_recomputation_fills_again(own):
    """transformers drops the cache when its own checkpointing is on, so this needs a user's `checkpoint` around its
    layers, or a user's own cache, where torch finds saved sizes doubled."""
    if own:
        model, kept = linear(), [torch.zeros(0, 8)]

        def attend(x: torch.Tensor, *, use_cache: bool) -> torch.Tensor:
            keys = torch.cat([kept[0], model(x)]) if use_cache else model(x)
            kept[0] = keys.detach()
            return torch.softmax(x @ keys.T, -1) @ keys

        def step(*, use_cache: bool) -> Step:
            return train_toy(lambda x: checkpoint(partial(attend, use_cache=use_cache), x, use_reentrant=False))

    else:
        model = build("llama")
        model.set_attn_implementation("eager")
        for layer in layers_of(model):
            forward = layer.forward
            layer.forward = lambda hidden, forward=forward, **kwargs: checkpoint(
                partial(forward, **kwargs), hidden, use_reentrant=False
            )

        def step(*, use_cache: bool) -> Step:
            return train(model, use_cache=use_cache)

    trial = Trial(model, step(use_cache=True), use_cache=True)
    assert trial.seen.error_type == ("CheckpointError" if own else "RuntimeError")
    assert told(trial) == "cache-grows-in-recompute"
    assert told(Trial(model, step(use_cache=False))) is None
