"""Models whose layers do not run one directly after the other: refused, or with the right gradients."""

from __future__ import annotations

import pytest
import torch
from segmented import Boom, apply, assert_nothing_is_switched_on, differing, gradients
from toys import VOCAB_SIZE, LastLayerFirst, Layer, ScaledBetweenLayers, ScaledInPlaceBetweenLayers, Toy

from gcbench.checkpointing.segments import LayersNotSequential

pytestmark = pytest.mark.usefixtures("one_thread", "no_hook_reaches_the_next_test")

TOY_SEGMENTS = ("segment:2", "segment:3", "segment:2+selective:addmm")


class CopiedBetweenLayers(Toy):
    """The same values, and another tensor: whether it is a copy cannot be seen from outside."""

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks).clone()
        return hidden


class EveryLayerTwice(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(layer(hidden, masks), masks)
        return hidden


class FirstLayerLeftOut(Toy):
    def run(self, hidden, masks):
        for layer in self.layers[1:]:
            hidden = layer(hidden, masks)
        return hidden


class HiddenStatesByName(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden_states=hidden, masks=masks)
        return hidden


class LastLayerOfAGroupLeftOut(Toy):
    """As with LayerDrop: a group that is begun and never ended."""

    def run(self, hidden, masks):
        for number, layer in enumerate(self.layers):
            if number != 1:
                hidden = layer(hidden, masks)
        return hidden


class LastLayerOfAllLeftOut(Toy):
    def run(self, hidden, masks):
        for layer in self.layers[:-1]:
            hidden = layer(hidden, masks)
        return hidden


class DropoutLayer(Layer):
    def forward(self, hidden_states, masks):
        return torch.nn.functional.dropout(super().forward(hidden_states, masks), 0.3)


class DrawsBetweenLayers(Toy):
    """As with LayerDrop: a number drawn before each layer, which decides whether it runs."""

    layer = DropoutLayer

    def run(self, hidden, masks):
        for layer in self.layers:
            torch.rand([])
            hidden = layer(hidden, masks)
        return hidden


class AllLayersTwice(Toy):
    """One group after the other, and again: each run of a group is a segment of its own."""

    def run(self, hidden, masks):
        return super().run(super().run(hidden, masks), masks)


class StopsBetweenLayers(Toy):
    stops = True

    def run(self, hidden, masks):
        for number, layer in enumerate(self.layers):
            if number == 1 and self.stops:
                raise Boom
            hidden = layer(hidden, masks)
        return hidden


def toy(cls):
    torch.manual_seed(0)
    return cls().train()


def toy_inputs():
    ids = torch.randint(VOCAB_SIZE, (2, 4), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
@pytest.mark.parametrize(
    "cls",
    [
        ScaledBetweenLayers,
        CopiedBetweenLayers,
        EveryLayerTwice,
        LastLayerFirst,
        FirstLayerLeftOut,
        HiddenStatesByName,
    ],
)
def test_layers_that_are_no_chain_are_refused(cls, spec):
    """And nothing stays switched on: a run goes on with its other strategies, a test process with its other tests."""
    model = toy(cls)
    off = gradients(model, toy_inputs(), "off")
    for _ in range(2):
        with pytest.raises(LayersNotSequential):
            gradients(model, toy_inputs(), spec)
        assert_nothing_is_switched_on()
    assert differing(gradients(model, toy_inputs(), "per-layer"), off) == []


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
@pytest.mark.parametrize(
    "cls",
    [
        Toy,
        AllLayersTwice,
        ScaledInPlaceBetweenLayers,
        DrawsBetweenLayers,
        LastLayerOfAGroupLeftOut,
        LastLayerOfAllLeftOut,
    ],
)
def test_gradients_are_right_or_there_are_none(cls, spec):
    """The traps: hidden states that are changed in place are still the output of the layer before; random numbers that
    are drawn between layers are not drawn again; a group that is never ended takes in all that comes after it."""
    model = toy(cls)
    off = gradients(model, toy_inputs(), "off")
    try:
        ours = gradients(model, toy_inputs(), spec)
    except LayersNotSequential:
        ours = off
    assert differing(ours, off) == []
    assert_nothing_is_switched_on()


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
def test_an_exception_between_two_layers_is_forgotten_by_the_next_step(spec):
    model = toy(StopsBetweenLayers)
    apply(model, spec)
    for _ in range(2):
        with pytest.raises(Boom):
            model(**toy_inputs())
    model.stops = False
    ours = gradients(model, toy_inputs())
    assert_nothing_is_switched_on()
    assert differing(ours, gradients(model, toy_inputs(), "off")) == []


@pytest.mark.parametrize("spec", TOY_SEGMENTS)
def test_an_exception_between_two_layers_leaves_nothing_switched_on(spec):
    """The code of the model runs there, and memory may run out in it."""
    model = toy(StopsBetweenLayers)
    apply(model, spec)
    with pytest.raises(Boom):
        model(**toy_inputs())
    assert_nothing_is_switched_on()
