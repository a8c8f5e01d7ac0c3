"""Models with code of their own that draw random numbers in one way or another, in places of choice."""

from __future__ import annotations

import json
from pathlib import Path

_MODELING = """
import os, random, time
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

{module}


def mask(draw, width):
    return torch.tensor([float(draw() > 0.3) for _ in range(width)])


def times(x, factor):
    return x * (factor.to(x.dtype) if isinstance(factor, torch.Tensor) else factor)


class DrawingConfig(PretrainedConfig):
    model_type = "drawing"

    def __init__(self, hidden_size=16, num_hidden_layers=3, vocab_size=64, n_positions=64, **kwargs):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.n_positions = n_positions
        super().__init__(**{{'initializer_range': 0.3, **kwargs}})


class Block(GradientCheckpointingLayer):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        {init}

    def forward(self, x):
        width = x.shape[-1]
        y = self.up(x).relu()
        y = self.down(times(y, {inner}))
        return x + times(y, {factor})


class DrawingForCausalLM(PreTrainedModel):
    config_class = DrawingConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.n_positions, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()
        with torch.no_grad():
            self.head.bias.add_({bias})

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, labels=None, **kwargs):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        width = x.shape[-1]
        x = times(x, {outside})
        for block in self.blocks:
            {skip}
            x = block(x)
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""

FUNCTION = """
class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        kept = torch.tensor(np.random.rand(y.shape[-1]) > 0.3, dtype=y.dtype)
        ctx.save_for_backward(kept)
        return y * kept

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return torch.ones_like(y)

    @staticmethod
    def backward(ctx, grad):
        return grad * random.random() * torch.rand(()) * np.random.rand()
"""
"""Functions of a layer's output that draw: `Masked` in the forward pass, `NoisyBackward` in the backward pass."""

_NOTHING = {"module": "", "init": "", "inner": "1.0", "factor": "1.0", "bias": "0.0", "outside": "1.0", "skip": ""}


def write(folder: Path, *, config: dict[str, object] | None = None, **code: str) -> Path:
    """The folder of a model whose code draws where `code` says.

    Keys: `module` and `init` are statements, of the module and of a layer's constructor. The others are expressions:
    `inner` multiplies inside a layer, so that the result is kept; `factor` multiplies its output; `outside` the
    embedding; `bias` is added to weights when the model is built. `skip` is a statement before each layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modeling_drawing.py").write_text(_MODELING.format(**_NOTHING | code), encoding="utf-8")
    names = {"AutoConfig": "DrawingConfig", "AutoModelForCausalLM": "DrawingForCausalLM"}
    values: dict[str, object] = {
        "model_type": "drawing",
        "auto_map": {auto: f"modeling_drawing.{name}" for auto, name in names.items()},
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
