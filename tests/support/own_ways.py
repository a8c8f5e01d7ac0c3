"""A model that checkpoints in its own way, as code on the Hub does; its config says in which. Remote code, too."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH = 32


class OwnConfig(PretrainedConfig):
    model_type = "own-ways"

    def __init__(self, way="old-setter", num_hidden_layers=4, vocab_size=64, **kwargs):
        self.way, self.num_hidden_layers, self.vocab_size = way, num_hidden_layers, vocab_size
        super().__init__(**kwargs)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden):
        return self.down(functional.gelu(self.up(hidden)))


class Block(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Inner()
        self.drop = nn.Dropout(0.1)
        if way == "inside":
            self.gradient_checkpointing = False

    def forward(self, hidden):
        if self.way == "inside" and self.gradient_checkpointing and self.training:
            return hidden + self.drop(checkpoint(self.mlp, self.norm(hidden), use_reentrant=False))
        return hidden + self.drop(self.mlp(self.norm(hidden)))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.way = config.way
        self.tok = nn.Embedding(config.vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block(config.way) for _ in range(config.num_hidden_layers))
        self.is_on = False
        if config.way not in ("inside", "own-method"):
            self.gradient_checkpointing = False

    def forward(self, ids):
        hidden = self.tok(ids)
        on = self.training and (self.is_on or getattr(self, "gradient_checkpointing", False))
        if on and self.way == "pairs":
            for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
                hidden = checkpoint(lambda x, a=first, b=second: b(a(x)), hidden, use_reentrant=False)
            return hidden
        for number, block in enumerate(self.blocks):
            hidden = self.step(number, block, hidden) if on else block(hidden)
        return hidden

    def step(self, number, block, hidden):
        if self.way == "old-setter":  # nobody said use_reentrant when it was written
            return checkpoint(block, hidden)
        if self.way == "function":
            return self._gradient_checkpointing_func(block.__call__, hidden)
        if self.way in ("inside", "without-effect") or (self.way == "second" and number % 2):
            return block(hidden)
        return checkpoint(block.forward, hidden, use_reentrant=False)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.text = Body(config)
        self.head = nn.Linear(WIDTH, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, labels=None):
        logits = self.head(self.text(input_ids))
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class OldSetter(OwnForCausalLM):
    """Transformers 4 before 4.35."""

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, Body):
            module.gradient_checkpointing = value


class NewSetter(OwnForCausalLM):
    """From 4.35 on, and before `every_n_layers`."""

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint):
        assert not enable or isinstance(gradient_checkpointing_func, partial)
        self.text.gradient_checkpointing = enable


class OwnMethod(OwnForCausalLM):
    """A switch that transformers knows nothing of."""

    def gradient_checkpointing_enable(self):
        self.text.is_on = True

    def gradient_checkpointing_disable(self):
        self.text.is_on = False


class Shown(OwnForCausalLM):
    """Its embeddings can be asked for."""

    def get_input_embeddings(self):
        return self.text.tok


FORMS = {"old-setter": OldSetter, "new-setter": NewSetter, "own-method": OwnMethod, "function": Shown}
GROUPS = {
    "old-setter": ((0,), (1,), (2,), (3,)),
    "new-setter": ((0,), (1,), (2,), (3,)),
    "own-method": ((0,), (1,), (2,), (3,)),
    "function": ((0,), (1,), (2,), (3,)),
    "inside": ((0,), (1,), (2,), (3,)),
    "second": ((0,), (2,)),
    "pairs": ((0, 1), (2, 3)),
}
"""What each way recomputes, and which of it together."""


def build(way="old-setter", **changes):
    torch.manual_seed(0)
    return FORMS.get(way, OwnForCausalLM)(OwnConfig(way=way, **changes)).train()
