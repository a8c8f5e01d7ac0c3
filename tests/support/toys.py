"""Models by hand, a few operators a layer, for what a real family would need seconds to show."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gcbench.simulate.predictor import Predictor
from gcbench.strategies import Plan

VOCAB_SIZE, WIDTH = 50, 16
INNER = {"a": 32, "b": 24, "c": 40}
"""Kinds of layers; those of kinds a and b share a mask with the others of their kind."""


class Layer(GradientCheckpointingLayer):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(WIDTH, INNER[kind])
        self.down = nn.Linear(INNER[kind], WIDTH)

    def forward(self, hidden_states, masks):
        inner = self.up(hidden_states).relu()
        if self.kind in masks:
            inner = inner * masks[self.kind]
        return hidden_states + self.down(inner).tanh()


class Toy(nn.Module):
    """Embedding, layers of the given kinds one after the other, head, loss. A test changes what it overrides."""

    layer = Layer

    def __init__(self, kinds="aaaaaa"):
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.layers = nn.ModuleList(self.layer(kind) for kind in kinds)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)

    def get_output_embeddings(self):
        return self.head

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks)
        return hidden

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids)
        masks = {"a": torch.ones(*hidden.shape[:2], 1) * 1.0, "b": torch.ones(len(hidden), 1, 1) * 1.0}
        hidden = self.run(hidden, masks)
        del masks
        logits = self.head(self.norm(hidden))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class ScaledBetweenLayers(Toy):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks) * 0.5
        return hidden


class ScaledInPlaceBetweenLayers(Toy):
    """The same tensor, and other values."""

    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks)
            hidden.mul_(0.5)
        return hidden


class LastLayerFirst(Toy):
    def run(self, hidden, masks):
        for layer in reversed(self.layers):
            hidden = layer(hidden, masks)
        return hidden


def predictor(make, *, exact=False, optim="sgd", precision="fp32"):
    with torch.device("meta"):
        return Predictor(make(), precision=precision, optim=optim, exact=exact)


def plan(num_layers, chosen):
    return Plan(num_layers=num_layers, groups=tuple((layer,) for layer in chosen))


def step(one, chosen=(), *, batch_size=2, seq_len=4):
    """The step with the `chosen` layers checkpointed; all of them for "all"."""
    layers = len(one.fake_model.layers)
    return one.step(plan(layers, range(layers) if chosen == "all" else chosen), batch_size=batch_size, seq_len=seq_len)
