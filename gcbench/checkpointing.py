"""Applies a plan to a model: the only module that knows how a Hugging Face layer checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gcbench.strategies import Plan


class RecomputeCounter:
    """Counts the layers that a backward pass really ran a second time.

    Attributes:
        layers: the numbers of the layers recomputed since the last `reset`.
    """

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def reset(self) -> None:
        self.layers.clear()

    def checkpoint(self, layer: int, function: Callable[..., Any], *args: Any) -> Any:
        """`torch.utils.checkpoint.checkpoint` with a note of each call of `function` after the first."""
        first = True

        def counted(*inner_args: Any) -> Any:
            nonlocal first
            if not first:
                self.layers.add(layer)
            first = False
            return function(*inner_args)

        # Stated, not left to the default: any kwargs without it flip Hugging Face to the reentrant variant.
        return checkpoint(counted, *args, use_reentrant=False)


def checkpointable_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that `every_n_layers` counts, in its order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass(frozen=True, kw_only=True)
class LayersRun:
    """The numbers of the layers that a step runs.

    Attributes:
        forward: those that the forward pass runs.
        backward: those of them that a gradient passes back through: all, unless parameters are frozen.
    """

    forward: set[int] = field(default_factory=set)
    backward: set[int] = field(default_factory=set)


@contextmanager
def layers_run(model: torch.nn.Module) -> Iterator[LayersRun]:
    """What a forward pass inside the context runs."""
    ran = LayersRun()

    def note(layer: int, module: torch.nn.Module, inputs: object, outputs: object) -> None:
        ran.forward.add(layer)
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in tree_leaves(outputs)):
            ran.backward.add(layer)

    hooks = [
        layer.register_forward_hook(partial(note, number)) for number, layer in enumerate(checkpointable_layers(model))
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def refusal(model: torch.nn.Module) -> str | None:
    """Why this model cannot checkpoint, as transformers would say it; None when it can."""
    name = type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False):
        return f"{name} does not support gradient checkpointing in this transformers version"
    if not checkpointable_layers(model):
        return f"{name} has no layer that can be checkpointed on its own"
    return None


def apply(model: torch.nn.Module, plan: Plan) -> RecomputeCounter:
    """Checkpoint the layers of `plan` through each layer's own flag and function.

    That is what `activation_checkpointing_enable(every_n_layers=k)` sets, so what is measured is what a user's run
    does. Raises ValueError for a group of several layers, and for a plan of another number of layers.
    """
    layers = checkpointable_layers(model)
    if plan.num_layers != len(layers):
        raise ValueError(f"the plan is for {plan.num_layers} layers and the model has {len(layers)}")
    counter = RecomputeCounter()
    for group in plan.groups:
        if len(group) > 1:
            raise ValueError(f"layers {group[0]} to {group[-1]} cannot be recomputed as one")
        layer = layers[group[0]]
        layer._gradient_checkpointing_func = partial(counter.checkpoint, group[0])
        layer.gradient_checkpointing = True
    return counter


def clear(model: torch.nn.Module) -> None:
    """Undo `apply`: no layer is checkpointed."""
    for layer in checkpointable_layers(model):
        layer.gradient_checkpointing = False
