"""A model's own checkpointing: the flag on its body that its own code reads, as models had it before every layer could.

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


class Noting(Protocol):
    """What is told of layers that run again."""

    layers: set[int]
    is_blind: bool


# What there is


def exists(model: Module) -> bool:
    """Whether the model has checkpointing that transformers' `activation_checkpointing_enable` switches on."""
    return bool(getattr(model, "supports_gradient_checkpointing", False)) and (
        any(hasattr(module, _FLAG) for module in model.modules())
        or any(_overridden(model, name) for name in ("_set_gradient_checkpointing", *_ENABLE))
    )


def listed_layers(model: Module) -> dict[str, Module]:
    """Path -> layer: the members of the model's outermost lists of modules that have parts of their own.

    Where a module has the flag, of the lists in it alone.
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
    """Those of the listed layers that nothing but the model's own code can checkpoint."""
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
    """Whether a list holds layers: a `Sequential` may hold anything, and does where its members differ."""
    if not members or all(isinstance(member, _LISTS) for member in members):
        return False
    if isinstance(module, torch.nn.ModuleList):
        return True
    return len(members) > 1 and len({type(member) for member in members}) == 1


def advice(model: Module) -> str:
    """Why layers cannot be chosen, and what can be done instead, in a sentence; for a model whose own way is all."""
    layers = layers_without_entry(model)
    reason = f"{type(model).__name__} checkpoints in a way of its own, all that it does or nothing; take own"
    if not layers:
        return reason
    path, layer = next(iter(layers.items()))
    return (
        f"{reason}, or make {type(layer).__name__}, of which {path.rpartition('.')[0] or 'its list'} is made, a "
        "transformers.modeling_layers.GradientCheckpointingLayer, with which every strategy is possible"
    )


# On and off


def switch_on(model: Module) -> tuple[Any, ...]:
    """Switch the model's own checkpointing on, not reentrant where the model leaves that open.

    Returns what has to be removed besides switching off: the hooks that have embeddings ask for gradients.
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
    """Switch all checkpointing of the model off, whoever switched it on."""
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
    """Whether this transformers can call it: in the old form, once per module, or with all that it passes today."""
    accepted = inspect.signature(setter).parameters
    ours = inspect.signature(PreTrainedModel._set_gradient_checkpointing).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    return "value" in accepted or anything or set(ours) - {"self"} <= set(accepted)


def _call(method: Callable[..., Any], **kwargs: Any) -> None:
    """Call it with those of the arguments that it takes."""
    accepted = inspect.signature(method).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    method(**{name: value for name, value in kwargs.items() if anything or name in accepted})


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the remarks on forms and names that are out of date: the model's author can mend them, its user not."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# What it does


def watch(layers: Sequence[Module], counter: Noting) -> tuple[Any, ...]:
    """Count the layers that run again in backward passes, whoever has them do so; returns the hooks."""
    return tuple(
        module.register_forward_pre_hook(partial(_note, counter, number))
        for number, layer in enumerate(layers)
        for module in parts(layer, layers)
    )


def parts(layer: Module, layers: Sequence[Module]) -> list[Module]:
    """A layer and the modules in it that are no other layer's: its code may have a part of it alone run again."""
    users = Counter(id(child) for each in layers for child in each.children())
    return [layer, *(child for child in layer.children() if users[id(child)] == 1)]


def in_backward() -> bool:
    """Whether this is called by a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _note(counter: Noting, number: int, module: Module, inputs: object) -> None:
    if torch.compiler.is_compiling():
        counter.is_blind = True
    elif in_backward():
        counter.layers.add(number)


class GroupsSeen:
    """Which layers a training step in the context recomputes, and which of them together.

    Attributes:
        groups: ordered and disjoint; to be read after the context.
    """

    def __init__(self, layers: Sequence[Module]) -> None:
        self.layers = layers
        self.groups: tuple[tuple[int, ...], ...] = ()
        self._again: list[int | None] = []
        """Numbers of layers as they run again; None where a gradient comes to one."""
        self._hooks: list[Any] = []

    def __enter__(self) -> GroupsSeen:
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
        for number in self._again:
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
            self._again.append(number)

    def _leave(self, module: Module, inputs: object, outputs: object) -> None:
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._again.append(None))  # type: ignore[no-untyped-call]


def is_all(model: Module) -> bool:
    """Whether a model's own way is the only one: it has no layer that can be checkpointed by itself.

    Code from the Hub may put a vision tower of transformers beside its own, larger stack of layers.
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
