"""Notices when other checkpointing replaces what `gcbench.apply` did, and warns once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from gcbench.checkpointing import own_checkpointing
from gcbench.checkpointing.apply import RecomputeCounter
from gcbench.strategies import Plan

_SETTINGS = ("activation_checkpointing", "gradient_checkpointing")


class ReplacementWatch:
    """Compares what `apply` set on a model's layers with what is set whenever the model is called in training.

    From the first difference on, every layer that is recomputed is counted, whatever code recomputes it.
    """

    def __init__(
        self, model: Module, layers: Sequence[Module], plan: Plan, name: str, counter: RecomputeCounter
    ) -> None:
        """`name` is the strategy as the user passed it to `apply`, which has been applied already."""
        self.layers = list(layers)
        self.plan = plan
        self.name = name
        self.counter = counter
        # A model with only its own checkpointing has the flag on its body, not on its layers.
        self.holders = [
            module
            for module in (model.modules() if own_checkpointing.is_all(model) else layers)
            if hasattr(module, "gradient_checkpointing")
        ]
        self.expected = [_now(module) for module in self.holders]
        ids = {id(layer) for layer in layers}
        self.homes = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in ids
        ]
        self.has_warned = False
        self.counts_all = False
        self.is_compiled = False
        """The model has been compiled, and checkpointing that replaces the plan's cannot be counted in it."""
        self._hooks: list[Any] = []

    def begin(self, modules: Sequence[Module]) -> None:
        """Compare whenever one of `modules` is called."""
        self._hooks += [module.register_forward_pre_hook(partial(_compare, self)) for module in modules]

    def remove(self) -> None:
        """Stop comparing."""
        for hook in self._hooks:
            hook.remove()

    def compare(self) -> None:
        """Compare; at a difference warn once, and from then on count every layer that is recomputed."""
        now = [_now(module) for module in self.holders]
        wrapped = any(_checkpoints(parent._modules.get(key), child) for parent, key, child in self.homes)
        if not wrapped and all(map(_same, now, self.expected)):
            return
        self.expected = now
        if not self.counts_all:
            self.counts_all = True
            self._hooks += own_checkpointing.count_recomputed(self.layers, self.counter)
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(self._sentence(now, wrapped=wrapped), UserWarning, stacklevel=3)

    @property
    def is_unseen(self) -> bool:
        """Whether layers may have been recomputed that could not be counted."""
        return self.is_compiled and not all(map(_same, map(_now, self.holders), self.expected))

    def _sentence(self, now: Sequence[tuple[bool, Any]], *, wrapped: bool) -> str:
        ours = f"gcbench.apply(model, {self.name})"
        if wrapped:
            return (
                f"torch's CheckpointWrapper has been put around layers since {ours} and recomputes them as well; "
                "leave activation_checkpointing out of the FSDP settings, or call gcbench.remove(model)"
            )
        planned, num = self.plan.layers_checkpointed, sum(flag for flag, _ in now)
        if not num:
            return (
                f"What {ours} did has been switched off since, for example by activation_checkpointing_disable(): no "
                f"layer is recomputed (the plan has {planned}); call gcbench.apply again after it"
            )
        done = f"{num} of {self.plan.num_layers} layers are" if len(now) == self.plan.num_layers else "layers are"
        trainer = _trainer()
        if trainer is None:
            functions = [function for flag, function in now if flag]
            who = (
                "activation_checkpointing_enable()"
                if all(isinstance(each, partial) and each.func is checkpoint for each in functions)
                else "Other code"
            )
            remedy = "leave that call out, or call gcbench.apply after it"
        else:
            who = type(trainer).__name__
            remedy = _setting(trainer.args)
        return (
            f"{who} has replaced {ours} by its own checkpointing: {done} recomputed (the plan has {planned}); {remedy}"
        )


def _compare(watch: ReplacementWatch, module: Module, inputs: object) -> None:
    if torch.compiler.is_compiling():
        watch.is_compiled = True
    elif module.training and not own_checkpointing.in_backward():
        watch.compare()


def _now(module: Module) -> tuple[bool, Any]:
    """A module's flag, and its function where the flag is set."""
    flag = bool(module.gradient_checkpointing)
    return flag, getattr(module, "_gradient_checkpointing_func", None) if flag else None


def _same(now: tuple[bool, Any], expected: tuple[bool, Any]) -> bool:
    return now[0] == expected[0] and now[1] is expected[1]


def _checkpoints(found: Module | None, layer: Module) -> bool:
    """Whether the module that replaced a layer recomputes it."""
    if found is layer or found is None:
        return False
    wrappers = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrappers is not None and any(isinstance(module, wrappers.CheckpointWrapper) for module in found.modules())


def _trainer() -> Any:
    """Find the running trainer whose settings switch checkpointing on; None where there is none."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        found = frame.f_locals.get("self")
        args = None if isinstance(found, Module) else getattr(found, "args", None)
        if any(getattr(args, name, None) is True for name in _SETTINGS):
            return found
    return None


def _setting(args: object) -> str:
    """Say what to write in a trainer's settings, by the name that its users know."""
    name = type(args).__name__
    on = {field.name for field in fields(args) if field.default is True} if is_dataclass(args) else set()
    if hasattr(args, _SETTINGS[0]) and _SETTINGS[1] not in on:
        return f"set activation_checkpointing=False in {name} (gradient_checkpointing=False before transformers 5.23)"
    return f"set gradient_checkpointing=False in {name}"
