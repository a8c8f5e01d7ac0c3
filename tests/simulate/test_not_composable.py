"""Models whose layers do not run one by one are traced in full, with a reason; all others are composed, exactly."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
import toys
from toys import LastLayerFirst, Layer, ScaledBetweenLayers, ScaledInPlaceBetweenLayers, Toy

from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.simulate import timeline
from gcbench.simulate.predictor import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(step):
    """The peaks of a step on either kind of device."""
    return timeline.exact(step.timeline).memory, timeline.cached(step.timeline).memory


def compared(make, chosen=(), **kwargs):
    """The step as predicted, which must equal the step traced in full."""
    predicted, in_full = (toys.step(toys.predictor(make, exact=exact, **kwargs), chosen) for exact in (False, True))
    assert in_full.why_in_full == "requested"
    assert seen(predicted) == seen(in_full)
    return predicted


def test_any_layers_under_any_plan_compose():
    """Kinds and plans without a pattern: whatever is left out, the rest represents it.

    The trap: a rule that holds for the families at hand, which are all regular.
    """
    rng = random.Random(0)
    left_out = 0
    for _ in range(16):
        number = rng.randint(1, 12)
        kinds = rng.choice(["a", "ab", "aab", "abc", "".join(rng.choices("abc", k=number))])
        kinds = (kinds * number)[:number]
        chosen = rng.choice([range(0), range(number), range(0, number, 2), range(0, number, 3), None])
        if chosen is None:
            chosen = sorted(rng.sample(range(number), rng.randint(0, number)))
        step = compared(lambda kinds=kinds: Toy(kinds), chosen, optim=rng.choice(["sgd", "adamw_torch"]))
        assert step.why_in_full is None, (kinds, chosen)
        left_out += number - step.layers_traced
    assert left_out > 15


class SharedParameters(Toy):
    def __init__(self):
        super().__init__()
        self.layers[3].up = self.layers[1].up


class EveryLayerTwice(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(layer(hidden, masks), masks)
        return hidden


class AllLayersTwice(Toy):
    def run(self, hidden, masks):
        return super().run(super().run(hidden, masks), masks)


class FrozenBelow(Toy):
    def __init__(self):
        super().__init__()
        for module in (self.embed, *self.layers[:3]):
            module.requires_grad_(False)


class KeepsItsState(Toy):
    """As a recurrent model that carries its state from one batch to the next."""

    def run(self, hidden, masks):
        hidden = super().run(hidden, masks)
        self.state = hidden.detach().repeat(16, 1, 1)
        return hidden


class DictLayer(Layer):
    def forward(self, hidden_states, masks):
        return {"hidden": super().forward(hidden_states, masks)}


class ReturnsDicts(Toy):
    layer = DictLayer

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks)["hidden"]
        return hidden


class ListLayer(Layer):
    def forward(self, hidden_states, masks):
        return super().forward(hidden_states[0], masks)


class TakesLists(Toy):
    layer = ListLayer

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer([hidden], masks)
        return hidden


class SumOfAllLayers(Toy):
    def run(self, hidden, masks):
        outputs = []
        for layer in self.layers:
            hidden = layer(hidden, masks)
            outputs.append(hidden)
        return torch.stack(outputs).sum(0)


class SkipsToTheEnd(Toy):
    def run(self, hidden, masks):
        second = self.layers[1](self.layers[0](hidden, masks), masks)
        hidden = second
        for layer in self.layers[2:]:
            hidden = layer(hidden, masks)
        return hidden + second


class Raises(Toy):
    """Code of its own that depends on the layers between returning the very same tensor."""

    def run(self, hidden, masks):
        for layer in self.layers:
            before, hidden = hidden, layer(hidden, masks)
            if before is hidden:
                raise ZeroDivisionError
        return hidden


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (SharedParameters, "layers share parameters"),
        (EveryLayerTwice, "layers run several times, or out of order"),
        (AllLayersTwice, "layers run several times, or out of order"),
        (LastLayerFirst, "layers run several times, or out of order"),
        (ScaledBetweenLayers, "the hidden states change between layers"),
        (ScaledInPlaceBetweenLayers, "a block is freed twice, or before it is allocated"),
        (FrozenBelow, "the first layers take no part in the backward pass"),
        (KeepsItsState, "the model keeps tensors from one step to the next"),
        (ReturnsDicts, "layers return something other than hidden states"),
        (TakesLists, "layers get something other than hidden states"),
        (SumOfAllLayers, "a block is freed twice, or before it is allocated"),
        (SkipsToTheEnd, "a block is freed twice, or before it is allocated"),
        (Raises, "with layers left out, it raises ZeroDivisionError"),
        (lambda: Toy(""), "the model has no layers"),
    ],
)
def test_a_model_that_does_more_than_run_its_layers_is_traced_in_full(make, why):
    """The traps: layers left out on which the rest of the model depends, gradients that belong to another layer, a step
    that differs from the one before. Each falls back and says why, and no cell is lost."""
    step = compared(make, "all")
    assert step.why_in_full == why
    assert step.layers_traced == len(toys.predictor(make).fake_model.layers)


class Tower(Toy):
    """Three layers that training never runs, as the vision tower of a model trained on text."""

    def __init__(self):
        super().__init__("aaaaaaaa")
        self.embed.tower = torch.nn.ModuleList(Layer("c") for _ in range(3))


class SkippedLayers(Toy):
    def run(self, hidden, masks):
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, masks) if number % 3 != 1 else hidden
        return hidden


@pytest.mark.parametrize(("make", "chosen", "traced"), [(Tower, range(0, 11, 2), 6), (SkippedLayers, "all", 3)])
def test_layers_that_never_run_are_nobodys_neighbours(make, chosen, traced):
    """The trap: a stride counts them, so the layers that run are not checkpointed in the order that it suggests."""
    step = compared(make, chosen)
    assert step.why_in_full is None
    assert step.layers_traced == traced


class TupleLayer(Layer):
    def forward(self, hidden_states, masks):
        return super().forward(hidden_states, masks), None


class ReturnsTuples(Toy):
    layer = TupleLayer

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden, _ = layer(hidden, masks)
        return hidden


class FrozenEmbedding(Toy):
    """No backward pass before the layers, and so no section for it."""

    def __init__(self):
        super().__init__()
        self.embed.requires_grad_(False)


class Unused(Toy):
    """Parameters without a gradient, inside of layers and outside."""

    def __init__(self):
        super().__init__()
        self.never = torch.nn.Linear(WIDE, WIDE)
        for layer in self.layers:
            layer.never = torch.nn.Linear(WIDE, WIDE)


WIDE = 8


class CachesATable(Toy):
    """A table computed in the first step and retained, like one of positions."""

    def run(self, hidden, masks):
        if not hasattr(self, "table"):
            self.table = torch.ones(1, 1, toys.WIDTH) * 2.0
        return super().run(hidden * self.table, masks)


@pytest.mark.parametrize("make", [ReturnsTuples, FrozenEmbedding, Unused, CachesATable])
def test_unusual_models_whose_layers_run_one_by_one_are_composed(make):
    """Tuples, no backward pass before the layers, parameters that are never used, a small table that stays."""
    step = compared(make, "all", optim="adamw_torch")
    assert step.why_in_full is None
    assert step.layers_traced == 3


def test_parameters_that_are_never_used_have_no_gradient_and_no_state():
    step = toys.step(toys.predictor(Unused, optim="adamw_torch"))
    used = toys.step(toys.predictor(Toy, optim="adamw_torch"))
    extra = 7 * (WIDE * WIDE + WIDE) * 4
    for with_unused, without in zip(seen(step)[:1], seen(used)[:1], strict=True):
        assert with_unused.optimizer_bytes - without.optimizer_bytes == extra


class CachesALargeTable(Toy):
    def run(self, hidden, masks):
        if not hasattr(self, "table"):
            self.table = torch.ones(1000, 1, toys.WIDTH) * 2.0
        return super().run(hidden * self.table.mean(0), masks)


@pytest.mark.parametrize("make", [CachesATable, CachesALargeTable])
def test_what_an_earlier_cell_left_in_the_model_counts_in_the_next(make):
    """The trap: a table that the first trace computed exists in the second one, and no operator allocates it again."""
    one = toys.predictor(make)
    toys.step(one)
    assert seen(toys.step(one, "all")) == seen(toys.step(toys.predictor(make, exact=True), "all"))


def test_a_family_that_retains_its_state_is_traced_in_full():
    config = {
        **tiny.CONFIGS["llama"],
        "model_type": "recurrent_gemma",
        "num_hidden_layers": 2,
        "lru_width": 32,
        "head_dim": 8,
        "attention_window_size": 8,
    }
    source = ModelSource(name="recurrent_gemma", origin="", config=config, location="")
    steps = []
    for exact in (False, True):
        model = models.build_meta(models.build_config(source, layers=None, overrides={}), dtype=torch.float32)
        one = Predictor(model, precision="fp32", optim="sgd", exact=exact)
        steps.append(toys.step(one, "all", batch_size=1))
    assert steps[0].why_in_full == "the model keeps tensors from one step to the next"
    assert seen(steps[0]) == seen(steps[1])
