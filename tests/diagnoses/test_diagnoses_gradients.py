"""Causes of gradients that are lost or wrong, provoked by real code on models of four layers or toys.

Simulated, because they do not happen on a CPU: a quantised base (bitsandbytes), and a router whose scores change.
Each such test says what it substitutes.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import own_ways
import pytest
import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from trials import (
    IDS,
    Block,
    Trial,
    build,
    checkpointed,
    layers_of,
    linear,
    relative,
    told,
    train,
    train_toy,
    with_lora,
)

from gcbench.checkpointing import own_checkpointing
from gcbench.diagnoses.known_causes import Observation

pytestmark = pytest.mark.usefixtures("one_thread")

# Gradients that are lost


def test_lora_behind_a_frozen_embedding_and_reentrant_checkpointing():
    model = with_lora(build("llama"))
    off = Trial(model, train(model), strategy="off")
    facts = {"layers_expected": 4, "num_layers": 4, "frozen_base": True, "reentrant": True}
    trial = Trial(model, train(model), off, checkpointed(model, use_reentrant=True), **facts)
    assert "does not require grad" in trial.seen.error_text
    assert told(trial) == "reentrant-frozen-base"
    facts["reentrant"] = False
    assert told(Trial(model, train(model), off, checkpointed(model, use_reentrant=False), **facts)) is None


def test_model_code_that_leaves_use_reentrant_to_torch():
    """The trap: trained layers behind a frozen embedding, no error, and a warning that names transformers' settings."""
    for way, cause in (("old-setter", "own-way-reentrant"), ("function", None)):
        model = own_ways.build(way)
        for module in (model.text.tok, *model.text.blocks[:2]):
            module.requires_grad_(False)

        def step(model=model):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            return loss

        off = Trial(model, step, strategy="off")
        own_checkpointing.switch_on(model)
        trial = Trial(model, step, off, strategy="own", num_layers=4, frozen_base=True)
        assert bool(trial.seen.params_without_grad) is (cause is not None)
        if cause is None:
            assert told(trial) is None
        else:
            assert told(trial) == "own-way-reentrant"


def test_a_quantised_base_that_was_not_prepared_for_training():
    """Simulated: bitsandbytes needs a GPU. A frozen fp32 model replaces its quantised one, with the flag that makes
    peft's real preparation treat it as a 4-bit model."""
    peft = pytest.importorskip("peft")

    def adapted(*, prepare: bool) -> nn.Module:
        model = build("llama")
        model.is_loaded_in_4bit = True
        if prepare:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its name for activation checkpointing is the old one
                model = peft.prepare_model_for_kbit_training(model)
        model.is_loaded_in_4bit = False  # or peft would look for bitsandbytes
        return with_lora(model)

    facts = {"frozen_base": True, "quantised": True, "reentrant": True, "num_layers": 4}
    for prepare in (False, True):
        model = adapted(prepare=prepare)
        again = checkpointed(model, use_reentrant=True)
        trial = Trial(model, train(model), None, again, **facts)
        if prepare:
            assert told(trial) is None, trial.seen
            assert len(again) == 4
        else:
            assert told(trial) == "quantised-base-unprepared"


def test_only_the_last_layer_is_trained():
    """The trap: no error, because the head is trained too, and a loss that goes down."""
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3." in name or "lm_head" in name)
    off = Trial(model, train(model), strategy="off")
    facts = {"num_layers": 4, "frozen_base": True, "reentrant": True}
    trial = Trial(model, train(model), off, checkpointed(model, use_reentrant=True), **facts)
    assert trial.seen.error_text is None and len(trial.seen.params_without_grad) == 9
    assert told(trial) == "last-layer-without-gradient"
    model.enable_input_require_grads()
    assert told(Trial(model, train(model), off, checkpointed(model, use_reentrant=True), **facts)) is None


def test_hidden_states_passed_by_keyword():
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 8))

    def by_keyword(x: torch.Tensor) -> torch.Tensor:
        first, *blocks, last = model
        hidden = first(x)
        for block in blocks:
            hidden = block(hidden=hidden)
        return last(hidden)

    off = Trial(model, train_toy(by_keyword), strategy="off")
    checkpointed(model, use_reentrant=True)
    trial = Trial(model, train_toy(by_keyword), off, reentrant=True)
    assert trial.seen.error_text is None and "0.weight" in trial.seen.params_without_grad
    assert told(trial) == "reentrant-keyword-inputs"
    assert told(Trial(model, train_toy(model), off, reentrant=True)) is None


def test_keys_that_later_layers_share():
    """As in Gemma 3n: a layer leaves its keys in a dictionary, and no gradient comes back from those that read them."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, reentrant: bool | None) -> torch.Tensor:
            shared: dict[str, torch.Tensor] = {}

            def write(x: torch.Tensor) -> torch.Tensor:
                shared["keys"] = self.first(x)
                return x + shared["keys"].sin()

            def read(x: torch.Tensor) -> torch.Tensor:
                return self.second(x) * shared["keys"]

            for layer in (write, read):
                x = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
            return x.square().mean()

    torch.manual_seed(0)
    model = Shares()

    def step(reentrant: bool | None) -> torch.Tensor:
        loss = model(torch.ones(4, 8, requires_grad=True), reentrant)
        loss.backward()
        return loss

    off = Trial(model, partial(step, None), strategy="off")
    reentrant = Trial(model, partial(step, True), off, reentrant=True)
    assert reentrant.seen.is_wrong
    assert told(reentrant) == "reentrant-shared-state"
    assert told(Trial(model, partial(step, False), off)) is None


def test_kwargs_without_use_reentrant():
    """The trap: with one kwarg passed, transformers no longer fills in use_reentrant=False."""
    model = build("llama")
    off = Trial(model, train(model), strategy="off")
    for kwargs in ({"preserve_rng_state": True}, {"preserve_rng_state": True, "use_reentrant": False}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old name, which is the only one before 5.23
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        trial = Trial(model, train(model), off)
        if "use_reentrant" in kwargs:
            assert told(trial) is None
        else:
            assert told(trial) == "reentrant-by-omission"


def test_a_warning_does_not_hide_wrong_gradients():
    seen = Observation(
        strategy="per-layer",
        is_wrong=True,
        has_dropout=True,
        preserve_rng_state=False,
        warnings=("torch.utils.checkpoint: the use_reentrant parameter should be passed explicitly.",),
    )
    assert told(seen) == "rng-not-preserved"


# Gradients that are wrong


def test_dropout_masks_that_are_drawn_again():
    model = build("gpt2")
    off = Trial(model, train(model), strategy="off")
    for preserve in (False, True):
        again = checkpointed(model, use_reentrant=False, preserve_rng_state=preserve)
        trial = Trial(model, train(model), off, again, has_dropout=True, preserve_rng_state=preserve)
        assert trial.seen.loss_identical and len(again) == 4
        if preserve:
            assert told(trial) is None
        else:
            assert trial.seen.grad_rel_diff > 0.1
            assert told(trial) == "rng-not-preserved"


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_router_that_picks_other_experts_in_the_recomputation(experts):
    """Simulated: a hook adds noise to the router's input in the recomputation, as nondeterministic
    kernels do on a GPU to a lesser extent. A loop over experts raises an error, a grouped product does not."""
    model = build("mixtral")
    model.set_experts_implementation(experts)
    off = Trial(model, train(model), strategy="off")
    again = checkpointed(model, use_reentrant=False)
    facts = {"is_moe": True, "layers_expected": 4}
    assert told(Trial(model, train(model), off, again, **facts)) is None

    def nudge(calls: Iterator[int], router: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        generator = torch.Generator().manual_seed(0)
        return (args[0] + 3 * torch.randn(args[0].shape, generator=generator),) if next(calls) else None

    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.register_forward_pre_hook(partial(nudge, itertools.count()))
    trial = Trial(model, train(model), off, again, **facts)
    assert trial.seen.is_wrong == (experts == "grouped_mm")
    assert trial.seen.error_type == (None if experts == "grouped_mm" else "CheckpointError")
    assert told(trial) == "moe-router-flips"


def test_a_memory_budget_that_recomputes_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8), nn.Dropout(0.5))
    budgets: dict[float, Trial] = {}
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager_decomp_partition")
        facts = {"strategy": "budget", "compiled": True, "memory_budget": budget, "has_dropout": True}
        with functorch_config.patch(activation_memory_budget=budget):
            budgets[budget] = Trial(model, train_toy(compiled), budgets.get(1.0), **facts)
    torch._dynamo.reset()
    well, trial = budgets[1.0], budgets[0.0]
    assert trial.seen.loss_identical and trial.seen.grad_rel_diff > 0.1
    assert told(trial) == "memory-budget-dropout"
    assert told(well) is None


def test_what_a_hook_sets_for_the_forward_pass_only():
    """The trap: no error, and the right loss."""
    model = build("llama")

    def step(*, early: bool) -> torch.Tensor:
        hooks = [layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] / 2,)) for layer in layers_of(model)]
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if early:
            [hook.remove() for hook in hooks]
        loss.backward()
        [hook.remove() for hook in hooks]
        return loss

    off = Trial(model, partial(step, early=True), strategy="off")
    again = checkpointed(model, use_reentrant=False)
    trial = Trial(model, partial(step, early=True), off, again)
    assert trial.seen.loss_identical and trial.seen.is_wrong
    assert told(trial) == "state-gone-in-recompute"
    assert told(Trial(model, partial(step, early=False), off, again)) is None


@pytest.mark.parametrize("mixed", [False, True], ids=["every call", "every second call"])
def test_an_optimizer_that_steps_before_a_shared_layer_is_recomputed(mixed):
    """One layer, called four times. Where only some calls are checkpointed, the others still need the old weights and
    autograd notices; where all are, nobody does."""

    def attempt(off: Trial | None, **kwargs: object) -> Trial:
        shared = linear()
        arrived = {name: torch.zeros_like(p) for name, p in shared.named_parameters()}

        def hook(name: str, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
            arrived[name] += parameter.grad
            optimizer.step()
            parameter.grad = None

        for name, parameter in shared.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(hook, name, torch.optim.SGD([parameter], lr=0.5)))

        def layer(hidden: torch.Tensor) -> torch.Tensor:
            return torch.tanh(shared(hidden))

        def four_times(hidden: torch.Tensor) -> torch.Tensor:
            for call in range(4):
                plain = not kwargs or (mixed and call % 2 == 0)
                hidden = layer(hidden) if plain else checkpoint(layer, hidden, **kwargs)
            return hidden

        facts = {"strategy": "per-layer" if kwargs else "off", "reentrant": kwargs.get("use_reentrant", False)}
        trial = Trial(shared, train_toy(four_times), optim="galore_adamw_layerwise", **facts)
        trial.grads = arrived
        if off is not None and trial.seen.error_text is None:
            difference = relative(arrived, off.grads)
            trial.seen = replace(trial.seen, grad_rel_diff=difference, is_wrong=difference > 1e-4, loss_identical=True)
        return trial

    off = attempt(None)
    trial = attempt(off, use_reentrant=True)
    assert trial.seen.is_wrong != ("modified by an inplace operation" in (trial.seen.error_text or ""))
    assert trial.seen.is_wrong is not mixed
    assert told(trial) == "optimizer-in-backward"
    assert told(off) is None
    assert told(attempt(off, use_reentrant=False)) is None


def test_running_statistics_are_updated_twice():
    """The trap: loss and gradients are identical, and what the model evaluates with is not."""

    def attempt(function: Callable[..., torch.Tensor], off: Trial | None = None) -> tuple[Trial, dict[str, object]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        trial = Trial(model, train_toy(partial(function, model)), off)
        return trial, dict(model.named_buffers())

    off, before = attempt(lambda model, x: model(x))
    trial, after = attempt(lambda model, x: checkpoint(model, x, use_reentrant=False), off)
    well, same = attempt(lambda model, x: model[1:](checkpoint(model[0], x, use_reentrant=False)), off)
    for each, buffers in ((trial, after), (well, same)):
        differ = any(not torch.equal(buffers[name], before[name]) for name in before)
        each.seen = replace(each.seen, buffers_differ=differ)
    assert trial.seen.grad_rel_diff == 0.0
    assert told(trial) == "statistics-updated-twice"
    assert told(well) is None
