"""Keeps recomputation in step with the first run where an operator that draws random numbers is not run again.

torch restores the generator's state before a layer is recomputed, and each draw then repeats the first run's. An
operator whose saved output is returned instead of running draws nothing, so that every draw after it would be of other
numbers. On CUDA, attention with dropout and dropout itself are such operators; `create_selective_checkpoint_contexts`
of torch 2.13 computes wrong gradients there without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from gcbench.operators.schema import is_random

ContextPair = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def in_step(contexts: ContextPair) -> ContextPair:
    """Extend the contexts of a first run and a recomputation so that both have the same random state after each draw.

    Args:
        contexts: what the `context_fn` of `torch.utils.checkpoint.checkpoint` returns.
    """
    restores: dict[str, Callable[[], None]] = {}
    first, second = contexts
    return (
        _Nested(first, _RandomState(restores, is_recompute=False)),
        _Nested(second, _RandomState(restores, is_recompute=True)),
    )


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a module has dropout; attention modules have its probability as an attribute."""
    return any(
        (isinstance(module, torch.nn.Dropout) and module.p > 0)
        or any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


class _Nested(AbstractContextManager[Any]):
    """Two contexts as one: `inner` sees each call before `outer` does."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._contexts, self._stack = (outer, inner), ExitStack()

    def __enter__(self) -> None:
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)


class _RandomState(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the generator's state after each call that draws, or restores it when recomputing."""

    def __init__(self, restores: dict[str, Callable[[], None]], *, is_recompute: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._restores, self._is_recompute = restores, is_recompute
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Any:
        """Count calls from 0: each backward pass through the same forward pass enters anew."""
        self._counts.clear()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or kwargs.get("generator") is not None or not is_random(func, args, kwargs):
            return func(*args, **kwargs)  # what writes into its arguments is always run again
        call = f"{func.name()}#{self._counts[func.name()]}"
        self._counts[func.name()] += 1
        if self._is_recompute:
            result = func(*args, **kwargs)
            if call in self._restores:
                self._restores[call]()
            return result
        before = {device: _state(device) for device in _devices((args, kwargs))}
        result = func(*args, **kwargs)
        for device in _devices(result):
            after = _state(device)
            if after is not None and not _same(after, before.get(device)):
                self._restores[call] = partial(_set_state, device, after)
                break
        return result


def _devices(values: Any) -> list[torch.device]:
    return list(dict.fromkeys(value.device for value in tree_leaves(values) if isinstance(value, torch.Tensor)))


def _state(device: torch.device) -> Any:
    """The generator's state on the CPU, its offset on CUDA; None for a device without one, as in a prediction."""
    if device.type == "cpu":
        with _disable_current_modes():  # operators make the state as well, and no mode may count them
            return torch.default_generator.get_state()
    generator = _cuda_generator(device)
    return None if generator is None else generator.get_offset()


def _set_state(device: torch.device, state: Any) -> None:
    if device.type == "cpu":
        with _disable_current_modes():
            torch.default_generator.set_state(state)
    elif (generator := _cuda_generator(device)) is not None:
        generator.set_offset(state)


def _cuda_generator(device: torch.device) -> torch.Generator | None:
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or other is None:
        return bool(one == other)
    with _disable_current_modes():
        return torch.equal(one, other)
