"""Gives the tensors of a model on meta storage that is fake, and puts a model's modules back to how they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def unchanged(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Undo what becomes of the modules' attributes and buffers."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for now, then in ((vars(module), attributes), (module._buffers, buffers)):
                now.clear()
                now.update(then)


def give_storage(
    modules: Iterable[torch.nn.Module], fake: FakeTensorMode, made: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Replace the modules' own meta parameters and buffers by fake CPU tensors, each once: tied weights stay tied.

    `made` remembers, under the id of the tensor that was replaced, that tensor (so that its id is given to no other)
    and what took its place.
    """

    def replacement(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta":
            return tensor
        if id(tensor) not in made:
            with fake:
                empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            given = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
            made[id(tensor)] = (tensor, given)
        return made[id(tensor)][1]

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
