"""Records what building a model allocates, in order: where its tensors lie in the memory that the allocator reserved.

A model's buffers are made between its parameters, and some things only for a moment: a mask that becomes another one, a
head that is then tied to the embedding. What those leave free in the allocator's cache, the training uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench.simulate.allocator.caching_allocator import CachingAllocator
from gcbench.simulate.allocator.pools import PoolBlock, rounded
from gcbench.simulate.trace.live_storages import LiveStorages
from gcbench.simulate.trace.model_blocks import storages


@dataclass(frozen=True, kw_only=True)
class Building:
    """The events of building a model.

    Attributes:
        nbytes: size of each block.
        events: `n` for the allocation of block n, `~n` for its release.
        model: the block of each of the model's storages, in the order of `model_blocks.blocks`.
    """

    nbytes: tuple[int, ...]
    events: tuple[int, ...]
    model: tuple[int, ...]

    def replay(self, allocator: CachingAllocator) -> list[PoolBlock | None]:
        """Allocate and free as the building did; returns the model's blocks, None for empty ones.

        Raises `OutOfMemory` if the allocator's limit is reached.
        """
        held: dict[int, PoolBlock] = {}
        for event in self.events:
            if event < 0:
                if (block := held.pop(~event, None)) is not None:
                    allocator.release(block)
            elif self.nbytes[event]:
                held[event] = allocator.allocate(rounded(self.nbytes[event]))
        return [held.get(number) for number in self.model]

    def replay_and_settle(self, allocator: CachingAllocator) -> list[PoolBlock | None]:
        """The same, with the cache emptied afterwards."""
        blocks = self.replay(allocator)
        allocator.empty_cache()
        return blocks

    def begins(self, nbytes: Sequence[int]) -> bool:
        """Whether blocks of these sizes are the model's."""
        return [self.nbytes[number] for number in self.model] == list(nbytes)


class BuildRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each storage on the meta device when an operator first returns it, and when the last reference goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._start()

    def _start(self) -> None:
        self._nbytes: list[int] = []
        self._events: list[int] = []
        self._alive = LiveStorages(lambda number: self._events.append(~number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor.untyped_storage())
        if func is _POW_OF_A_NUMBER:  # of which CUDA makes a tensor
            self._note(torch.empty((), device="meta").untyped_storage())
        return result

    def move(self, model: torch.nn.Module) -> None:
        """Forget how the model was made: it is loaded on the host, and moved in the order of `Module.to`."""
        self._start()
        for tensor in _in_the_order_of_to(model):
            self._note(tensor.untyped_storage())

    def building_of(self, model: torch.nn.Module) -> Building:
        """What was recorded, for the model that was built; storages that no operator returned come last."""
        numbers = tuple(self._note(storage) for storage in storages(model))
        return Building(nbytes=tuple(self._nbytes), events=tuple(self._events), model=numbers)

    def _note(self, storage: torch.UntypedStorage) -> int:
        """Record a storage if it is new; returns its number."""
        number = self._alive.get(storage)
        if number is None:
            number = len(self._nbytes)
            self._nbytes.append(storage.nbytes())
            self._events.append(number)
            self._alive.add(storage, number)
        return number


_POW_OF_A_NUMBER = torch.ops.aten.pow.Scalar


def _in_the_order_of_to(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A model's tensors in the order in which `torch.nn.Module.to` moves them: children first."""
    for child in model.children():
        yield from _in_the_order_of_to(child)
    for tensor in (*model._parameters.values(), *model._buffers.values()):
        if tensor is not None:
            yield tensor


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors on the meta device among an operator's results."""
    if isinstance(result, torch.Tensor):
        if result.device.type == "meta" and result.layout is torch.strided:
            yield result
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)
