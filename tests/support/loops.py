"""Models in a user's own loop: what each pass runs, its gradients, and the state of all that could be changed."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import tiny
import torch
from toys import Toy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gcbench.checkpointing import apply as checkpointing

ALL = (0, 1, 2, 3)
RECOMPUTED = {
    "off": (),
    "per-layer": ALL,
    "every:2": (0, 2),
    "first:3": (0, 1, 2),
    "last:1": (3,),
    "segment:2": ALL,
    "segment:3": ALL,
    "selective:matmul": ALL,
    "every:2+selective:attention": (0, 2),
    "segment:2+selective:matmul": ALL,
    "reentrant": ALL,
}
LLAMA_LIKE = {**tiny.LLAMA_LIKE, "pad_token_id": 0}
GEMMA3 = {
    "text_config": {"head_dim": 8, "sliding_window": 16, **LLAMA_LIKE},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 250,
    "eoi_token_index": 251,
    "image_token_index": 252,
}


def config_of(family, **changes):
    values = {**tiny.CONFIGS[family], **changes}
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def build(family="llama", **changes):
    """In train(), and without a cache, as with one the attention of gpt2 rounds otherwise."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **{"use_cache": False, **changes})).train()


class Calls(Counter):
    """How often each layer's part has run, by (phase, number): what really runs, whoever counts.

    A layer's own hooks are outside of what is checkpointed, those of its parts are not.
    """

    def __init__(self, model):
        super().__init__()
        self.phase = "forward"
        self.hooks = []
        for number, layer in enumerate(checkpointing.checkpointable_layers(model)):
            part = list(layer.children())[-1]
            self.hooks.append(part.register_forward_pre_hook(lambda *call, number=number: self.note(number)))

    def note(self, number):
        self[self.phase, number] += 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()


def step(model, inputs, calls=None):
    """The gradients of one pass of a user's own loop, dropout the same in each."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**inputs).loss
    if calls is not None:
        calls.phase = "backward"
    loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def runs_again(model, inputs):
    """The layers that a backward pass runs again; each must do so once."""
    with Calls(model) as calls:
        step(model, inputs, calls)
    assert set(calls.values()) == {1}
    return tuple(sorted(number for phase, number in calls if phase == "backward"))


def differing(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def state(model):
    """All that `apply` could leave behind: each module's attributes and hooks, and torch's global settings."""
    tables = ("_parameters", "_buffers", "_modules")
    modules = {
        name: {
            key: sorted(map(repr, value)) if isinstance(value, dict) else value if value is None else id(value)
            for key, value in vars(module).items()
            if key not in tables
        }
        for name, module in model.named_modules()
    }
    caches = [getattr(module.config, "use_cache", None) for module in model.modules() if hasattr(module, "config")]
    return modules, caches, torch._functorch.config.activation_memory_budget


def enable(model, **kwargs):
    """Transformers' own checkpointing, in the spelling of this version."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False}, **kwargs)


class Compilable(Toy):
    supports_gradient_checkpointing = True

    def forward(self, input_ids, labels):
        hidden = self.run(self.embed(input_ids), {})
        logits = self.head(self.norm(hidden))
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class Broken(Exception):
    pass


def assert_nothing_is_watched():
    watching = torch._C._autograd._top_saved_tensors_default_hooks(True)
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # the next test shall not suffer
        torch._C._autograd._pop_saved_tensors_default_hooks()
    assert watching is None
