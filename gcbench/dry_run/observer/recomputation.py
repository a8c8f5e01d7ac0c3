"""Counts checkpointed calls and those that really ran again, at `torch.utils.checkpoint.checkpoint`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .phases import Phases


def count_recomputation(checkpoint_module: ModuleType, phases: Phases, notes: dict[str, Any]) -> None:
    """Wrap `checkpoint` so that the function that it gets counts its runs.

    It must happen right after the module's import: transformers and others keep a reference to the function.
    """
    original = checkpoint_module.checkpoint

    @functools.wraps(original)
    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return original(function, *args, **kwargs)
        step = phases.step
        layer = _layer_of(function, args)
        step.checkpointed += 1
        step.layers_checkpointed.add(layer)
        notes["checkpoint_reentrant"] = kwargs.get("use_reentrant")
        runs = 0

        def counted(*inner_args: Any, **inner_kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 2:
                step.recomputed += 1
                step.layers_recomputed.add(layer)
            return function(*inner_args, **inner_kwargs)

        return original(counted, *args, **kwargs)

    checkpoint_module.checkpoint = checkpoint  # type: ignore[attr-defined]


def _layer_of(function: Any, args: tuple[Any, ...]) -> int:
    """Return the identity of the module that a checkpointed function belongs to, else of the function."""
    import torch

    while isinstance(function, functools.partial):
        args = (*function.args, *args)
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        return id(owner)
    if isinstance(function, torch.nn.Module):
        return id(function)
    first = args[0] if args else None
    return id(first) if isinstance(first, torch.nn.Module) else id(getattr(function, "__code__", function))
