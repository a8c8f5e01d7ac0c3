"""Replaces the meta tensors of a model by fake ones, and restores a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def unchanged(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Restore the modules' attributes and buffers afterwards."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for now, then in ((vars(module), attributes), (module._buffers, buffers)):
                now.clear()
                now.update(then)


def materialize(
    modules: Iterable[torch.nn.Module], fake: FakeTensorMode, replaced: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Replace the modules' own meta parameters and buffers by fake CPU tensors, each once: tied weights stay tied.

    `replaced` has, by id, each replaced tensor (so that no other gets its id) and its replacement.
    """

    def replacement(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta":
            return tensor
        if id(tensor) not in replaced:
            with fake:
                empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fake_tensor = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
            replaced[id(tensor)] = (tensor, fake_tensor)
        return replaced[id(tensor)][1]

    for module in modules:
        for named in (module._parameters, module._buffers):
            for name, tensor in named.items():
                if tensor is not None:
                    named[name] = replacement(tensor)  # type: ignore[assignment]


@contextmanager
def on_accumulation(params: Iterable[torch.nn.Parameter], note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `note` with each parameter as its gradient is complete."""
    handles = [
        param.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        for param in params
        if param.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
