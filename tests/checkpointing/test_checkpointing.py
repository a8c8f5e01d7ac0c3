"""Plans on real models: the layers are those that transformers would choose, and the count is of what really ran."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import random_draws
from gcbench.devices.backends import open_device
from gcbench.measure import take_fingerprint
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.strategies import Plan, Policy
from gcbench.training import step as training

EVERY = tuple(range(1, tiny.NUM_LAYERS + 1))


def build(tmp_path: Path, family: str) -> torch.nn.Module:
    source = sources.resolve(str(tiny.write_model(tmp_path / family, family)))
    config = models.build_config(source, layers=None, overrides={})
    return models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)


def enable(model: torch.nn.Module, *, every_n_layers: int) -> None:
    """As a user's own run would, in the spelling of this transformers."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs, every_n_layers=every_n_layers)
    else:
        model.gradient_checkpointing_enable(kwargs, every_n_layers=every_n_layers)


def flags(model: torch.nn.Module) -> list[bool]:
    return [layer.gradient_checkpointing for layer in checkpointing.checkpointable_layers(model)]


def one_step(model: torch.nn.Module) -> training.TrainingStep:
    batch = training.random_batch(model, batch_size=2, seq_len=32, seed=0)
    return training.TrainingStep(model, batch=batch, precision="fp32", optim="adamw_torch", seed=0)


@pytest.mark.parametrize("stride", EVERY)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba"])
def test_every_k_takes_the_layers_that_transformers_takes(tmp_path, family, stride):
    """The trap: counting from the end, or the layers left out, which is the other common meaning of "every"."""
    theirs, ours = build(tmp_path, family), build(tmp_path, family)
    enable(theirs, every_n_layers=stride)
    checkpointing.apply(ours, strategies.parse(f"every:{stride}").plan_for(tiny.NUM_LAYERS))
    assert flags(ours) == flags(theirs)
    assert flags(ours) == [layer % stride == 0 for layer in range(tiny.NUM_LAYERS)]


def test_per_layer_is_what_transformers_enables_by_default(tmp_path):
    theirs, ours = build(tmp_path, "llama"), build(tmp_path, "llama")
    enable(theirs, every_n_layers=1)
    checkpointing.apply(ours, strategies.parse("per-layer").plan_for(tiny.NUM_LAYERS))
    assert flags(ours) == flags(theirs) == [True] * tiny.NUM_LAYERS


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_costs_and_computes_what_it_does_in_a_users_run(tmp_path, family, stride):
    """Bit-identical gradients, and the same peak to the byte as with transformers' own switch."""
    found = []
    for own in (True, False):
        model = build(tmp_path, family)
        if own:
            checkpointing.apply(model, strategies.parse(f"every:{stride}").plan_for(tiny.NUM_LAYERS))
        else:
            enable(model, every_n_layers=stride)
        step = one_step(model)
        prints = []

        def take(phase, model=model, prints=prints):
            if phase == "optimizer":
                prints.append(take_fingerprint.take(model, step=0, seed=0))

        with open_device("cpu").probe_memory() as probe:
            step(take)
            step(probe.on_phase)
        peaks = probe.peaks()
        found.append((prints[0].checksum, peaks.forward_bytes, peaks.backward_bytes, peaks.optimizer_bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize("family", tiny.CHECKPOINTING)
def test_the_counter_names_the_recomputed_layers(tmp_path, family):
    model = build(tmp_path, family)
    counter = checkpointing.apply(model, Plan(num_layers=tiny.NUM_LAYERS, groups=((1,), (3,))))
    step = one_step(model)
    seen_before_the_backward = []
    step(lambda phase: seen_before_the_backward.append(set(counter.layers)) if phase == "backward" else None)
    assert seen_before_the_backward == [set()]
    assert counter.layers == {1, 3}
    counter.reset()
    assert counter.layers == set()


def test_nothing_is_recomputed_in_eval_mode(tmp_path):
    """The trap: transformers says that checkpointing is on, and in eval() no layer does it: the count must be 0."""
    model = build(tmp_path, "llama")
    counter = checkpointing.apply(model, strategies.parse("per-layer").plan_for(tiny.NUM_LAYERS))
    model.eval()
    one_step(model)()
    assert counter.layers == set()


def test_the_layers_of_a_forward_pass_are_noted(tmp_path):
    model = build(tmp_path, "gpt2")
    step = one_step(model)
    with checkpointing.layers_run(model) as ran:
        step()
    assert ran.forward == ran.backward == set(range(tiny.NUM_LAYERS))
    with checkpointing.layers_run(model) as ran:
        pass
    assert ran.forward == ran.backward == set()
    assert not any(layer._forward_hooks for layer in checkpointing.checkpointable_layers(model))


def test_a_plan_for_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the plan is for 3 layers and the model has 4"):
        checkpointing.apply(build(tmp_path, "llama"), Plan(num_layers=3))


@pytest.mark.parametrize("family", tiny.CHECKPOINTING)
def test_a_family_that_can_is_not_refused(tmp_path, family):
    model = build(tmp_path, family)
    assert checkpointing.refusal(model) is None
    assert len(checkpointing.checkpointable_layers(model)) == tiny.NUM_LAYERS


@pytest.mark.parametrize("family", tiny.REFUSING)
def test_a_family_that_cannot_is_refused_by_its_name(tmp_path, family):
    model = build(tmp_path, family)
    assert type(model).__name__ in checkpointing.refusal(model)


def test_a_model_without_layers_of_its_own_is_refused():
    class Flat(torch.nn.Module):
        supports_gradient_checkpointing = True

    assert "no layer" in checkpointing.refusal(Flat())


class ChangesAProduct(torch.nn.Module):
    """A layer that adds to a matrix product in place, as Gemma 3n's do; `last`: no backward pass needs the sum."""

    def __init__(self, *, last=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4).repeat(2, 1, 1) * 0.5)
        self.last = last

    def forward(self, x):
        product = torch.matmul(x.sin(), self.weight).permute(1, 0, 2)
        product += 1.0
        return product if self.last else (product.sin() * product).sum()


def test_a_saved_product_that_is_changed_in_place_is_refused():
    """torch misses it: what `matmul` returns has another version counter than the product, and gradients are wrong."""
    layer, x = ChangesAProduct(), torch.ones(2, 3, 4, requires_grad=True)
    for keep in (("bmm",), ("bmm#0",)):
        contexts = checkpointing._context_fn(Policy(keep=keep))
        output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
        with pytest.raises(checkpointing.SavedOutputMutated, match=r"changed in place \(add_\)"):
            output.backward()


@pytest.mark.parametrize(("last", "keep"), [(False, ("sin", "bmm#1")), (True, ("bmm",))])
def test_a_change_that_no_recomputation_sees_is_allowed(last, keep):
    """The trap: Falcon adds to the last product of a layer in place; it is saved, and never read."""
    layer, x = ChangesAProduct(last=last), torch.ones(2, 3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    contexts = checkpointing._context_fn(Policy(keep=keep))
    output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)


def test_torch_still_misses_it():
    """When this fails, torch has fixed it, and `_mark_mutated` may go once no older torch is supported."""
    layer, x = ChangesAProduct(), torch.ones(2, 3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x), x)

    def keep_products(context, op, *args, **kwargs):
        kept = op is torch.ops.aten.bmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    assert not torch.allclose(torch.autograd.grad(output, x)[0], expected)


class DropsTwice(torch.nn.Module):
    """A layer whose first dropout is one operator, as on a card, where attention that drops is one too."""

    def forward(self, x):
        dropped, _ = torch.native_dropout(x.sin(), 0.5, True)
        other, _ = torch.native_dropout(dropped.cos(), 0.5, True)
        return torch.nn.functional.dropout(other.sin() * dropped, 0.5)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(keep=("native_dropout",)),
        Policy(keep=("native_dropout#0",)),
        Policy(keep=("native_dropout#0",), skip=("sin#0",)),
    ],
)
def test_a_saved_draw_leaves_the_draws_after_it_unchanged(policy):
    """The trap, which only a GPU shows: a saved draw is not repeated, and the next draw gets its numbers."""
    layer, x = DropsTwice(), torch.randn(64, 64, requires_grad=True)

    def gradient(run):
        torch.manual_seed(0)
        (found,) = torch.autograd.grad(run().sum(), x)
        return found, torch.rand(1)

    expected, behind = gradient(lambda: layer(x))

    def recomputed(is_random):
        contexts = checkpointing._context_fn(policy, is_random=is_random)
        return gradient(lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts))

    found, after = recomputed(is_random=True)
    assert torch.equal(found, expected) and torch.equal(after, behind)
    assert not torch.equal(recomputed(is_random=False)[0], expected)  # what this mends


def test_a_model_that_drops_is_watched(tmp_path):
    assert random_draws.has_dropout(build(tmp_path, "gpt2"))
    assert not random_draws.has_dropout(build(tmp_path, "llama"))
