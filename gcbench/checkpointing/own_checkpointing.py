"""A model's own checkpointing: a flag on its body that its own code reads, instead of one on every layer.

Before transformers had `GradientCheckpointingLayer`, a model looped over a list of layers and called
`torch.utils.checkpoint` in the loop where its `gradient_checkpointing` was set. Code on the Hub still does.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import Module
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_FLAG = "gradient_checkpointing"
_INPUT_HOOKS = ("_require_grads_hook", "_require_grads_hooks")
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
_ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
_DISABLE = ("activation_checkpointing_disable", "gradient_checkpointing_disable")


class Recomputed(Protocol):
    """Gets the numbers of the layers that are recomputed."""

    layers: set[int]
    is_blind: bool


# What the model has


def exists(model: Module) -> bool:
    """Whether the model has checkpointing that transformers' `activation_checkpointing_enable` switches on."""
    return bool(getattr(model, "supports_gradient_checkpointing", False)) and (
        any(hasattr(module, _FLAG) for module in model.modules())
        or any(_overridden(model, name) for name in ("_set_gradient_checkpointing", *_ENABLE))
    )


def listed_layers(model: Module) -> dict[str, Module]:
    """Map path -> layer: the members, with children of their own, of the model's outermost lists of modules.

    Where modules have the flag, only the lists in those count.
    """
    found = dict(_listed(model, ""))
    holders = [path for path, module in model.named_modules() if path and hasattr(module, _FLAG)]
    within = {
        path: layer
        for path, layer in found.items()
        if any(path == holder or path.startswith(f"{holder}.") for holder in holders)
    }
    return within or found


def layers_without_entry(model: Module) -> dict[str, Module]:
    """Select the listed layers that only the model's own code can checkpoint."""
    return {
        path: layer
        for path, layer in listed_layers(model).items()
        if not any(isinstance(part, GradientCheckpointingLayer) for part in layer.modules())
    }


def _listed(module: Module, path: str) -> Iterator[tuple[str, Module]]:
    members = [(name, child) for name, child in module.named_children() if any(True for _ in child.children())]
    if isinstance(module, _LISTS) and _is_stack(module, [child for _, child in members]):
        yield from ((f"{path}{name}", child) for name, child in members)
        return
    for name, child in members:
        yield from _listed(child, f"{path}{name}.")


def _is_stack(module: Module, members: Sequence[Module]) -> bool:
    """Whether a list holds layers: a `Sequential` may hold anything, so its members have to be of one class."""
    if not members or all(isinstance(member, _LISTS) for member in members):
        return False
    if isinstance(module, torch.nn.ModuleList):
        return True
    return len(members) > 1 and len({type(member) for member in members}) == 1


def advice(model: Module) -> str:
    """Say why layers cannot be chosen, and the remedy, for a model whose own checkpointing is the only one."""
    layers = layers_without_entry(model)
    reason = f"{type(model).__name__} has only checkpointing of its own, which is on or off as a whole; take own"
    if not layers:
        return reason
    path, layer = next(iter(layers.items()))
    return (
        f"{reason}, or make {type(layer).__name__}, the class of the layers in {path.rpartition('.')[0] or 'its list'},"
        " a transformers.modeling_layers.GradientCheckpointingLayer, with which every strategy is possible"
    )


# On and off


def switch_on(model: Module) -> tuple[Any, ...]:
    """Switch the model's own checkpointing on, non-reentrant where the model leaves that open.

    Returns the hooks that make embeddings require gradients; `switch_off` leaves them to the caller.
    """
    before = {name: vars(model)[name] for name in _INPUT_HOOKS if name in vars(model)}
    kwargs = {"use_reentrant": False}
    with _quietly():
        own = next((name for name in _ENABLE if _overridden(model, name)), None)
        setter = getattr(model, "_set_gradient_checkpointing", None)
        if own is not None:
            _call(getattr(model, own), activation_checkpointing_kwargs=kwargs, gradient_checkpointing_kwargs=kwargs)
        elif setter is not None and _overridden(model, setter.__name__) and not _takes_a_stride(setter):
            _call(setter, enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
            model.enable_input_require_grads()  # type: ignore[operator]
        else:
            name = next(name for name in _ENABLE if hasattr(model, name))
            getattr(model, name)(kwargs)
    after = [vars(model).pop(name) for name in _INPUT_HOOKS if name in vars(model)]
    vars(model).update(before)
    known = {id(hook) for hook in tree_leaves(list(before.values()))}
    return tuple({id(hook): hook for hook in tree_leaves(after) if id(hook) not in known}.values())


def switch_off(model: Module) -> None:
    """Switch all checkpointing of the model off, whatever code switched it on."""
    own = next((name for name in _DISABLE if _overridden(model, name)), None)
    if own is not None:
        with _quietly():
            _call(getattr(model, own))
    for module in model.modules():
        if getattr(module, _FLAG, False):
            setattr(module, _FLAG, False)


def _overridden(model: Module, name: str) -> bool:
    """Whether the model's own code has a method of that name, other than transformers'."""
    method = getattr(model, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(PreTrainedModel, name, None)


def _takes_a_stride(setter: Callable[..., Any]) -> bool:
    """Whether this transformers can call the setter: in the old form, once per module, or with today's arguments."""
    accepted = inspect.signature(setter).parameters
    ours = inspect.signature(PreTrainedModel._set_gradient_checkpointing).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    return "value" in accepted or anything or set(ours) - {"self"} <= set(accepted)


def _call(method: Callable[..., Any], **kwargs: Any) -> None:
    """Call a method with those of the arguments that it accepts."""
    accepted = inspect.signature(method).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    method(**{name: value for name, value in kwargs.items() if anything or name in accepted})


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence deprecation warnings, which the model's author can act on, and its user cannot."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# What it recomputes


def count_recomputed(layers: Sequence[Module], counter: Recomputed) -> tuple[Any, ...]:
    """Count the layers that backward passes recompute, whatever code recomputes them; returns the hooks."""
    return tuple(
        module.register_forward_pre_hook(partial(_note, counter, number))
        for number, layer in enumerate(layers)
        for module in parts(layer, layers)
    )


def parts(layer: Module, layers: Sequence[Module]) -> list[Module]:
    """List a layer and its children that it shares with no other layer: code may recompute only a part of a layer."""
    users = Counter(id(child) for each in layers for child in each.children())
    return [layer, *(child for child in layer.children() if users[id(child)] == 1)]


def in_backward() -> bool:
    """Whether this is called by a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _note(counter: Recomputed, number: int, module: Module, inputs: object) -> None:
    if torch.compiler.is_compiling():
        counter.is_blind = True
    elif in_backward():
        counter.layers.add(number)


class RecomputedGroups:
    """Finds which layers a training step in the context recomputes, and which of them as one group.

    Attributes:
        groups: numbers of layers, ordered and disjoint; to be read after the context.
    """

    def __init__(self, layers: Sequence[Module]) -> None:
        self.layers = layers
        self.groups: tuple[tuple[int, ...], ...] = ()
        self._recomputed: list[int | None] = []
        """Numbers of layers as they are recomputed; None where a gradient arrives at the output of one."""
        self._hooks: list[Any] = []

    def __enter__(self) -> RecomputedGroups:
        for number, layer in enumerate(self.layers):
            self._hooks += [
                module.register_forward_pre_hook(partial(self._enter, number)) for module in parts(layer, self.layers)
            ]
            self._hooks.append(layer.register_forward_hook(self._leave))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        groups: list[list[int]] = []
        done: set[int] = set()
        follows = False
        for number in self._recomputed:
            if number is None:
                follows = False
            elif number not in done:
                if follows and groups[-1][-1] == number - 1:
                    groups[-1].append(number)
                else:
                    groups.append([number])
                done.add(number)
                follows = True
        self.groups = tuple(sorted(map(tuple, groups)))

    def _enter(self, number: int, module: Module, inputs: object) -> None:
        if in_backward():
            self._recomputed.append(number)

    def _leave(self, module: Module, inputs: object, outputs: object) -> None:
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._recomputed.append(None))  # type: ignore[no-untyped-call]


def is_all(model: Module) -> bool:
    """Whether a model's own checkpointing is the only one: none of its layers can be checkpointed by itself.

    Code from the Hub may combine a vision tower of transformers with its own, larger stack of layers, which decides.
    """
    if not exists(model):
        return False
    single = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not single or type(model).__module__.startswith("transformers."):
        return not single
    own = layers_without_entry(model).values()
    return bool(own) and _num_params(own) > _num_params(single)


def _num_params(layers: Iterable[Module]) -> int:
    return sum(param.numel() for layer in layers for param in layer.parameters())
