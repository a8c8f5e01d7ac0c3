"""Knows some values of fake tensors, so that code which asks for them need not be given up.

A mask that a model makes of ones itself masks nothing; transformers then leaves it to attention's kernel. A LayerDrop
of 0 compares a number from [0, 1) with 0.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from gcbench.simulate.trace.live_storages import LiveStorages


class KnownValues:
    """Follows tensors of ones, and the last single number that was drawn."""

    def __init__(self) -> None:
        self._ones = LiveStorages()
        self._sum: tuple[weakref.ref[torch.Tensor], int] | None = None
        self._drawn: weakref.ref[torch.Tensor] | None = None
        self._compared: weakref.ref[torch.Tensor] | None = None

    def are_ones(self, tensor: object) -> bool:
        """Whether every element of the tensor is known to be 1 or true."""
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.layout is torch.strided
            and self._ones.get(tensor.untyped_storage()) is not None
        )

    def answer(self, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        """What the operator returns: `result`, or a tensor of which the value is known."""
        first = args[0] if args else None
        if func in _ONES or (func is _FULL and args[1] == 1):
            self._ones.add(result.untyped_storage(), 1)
        elif func in _COPIES or (func is _EQUAL and args[1] == 1):
            if self.are_ones(first):
                self._ones.add(result.untyped_storage(), 1)
        elif func is _SUM and self.are_ones(first):
            self._sum = weakref.ref(result), args[0].numel()
        elif func is _RAND and not first:
            self._drawn = weakref.ref(result)
        elif func is _ALL and self.are_ones(first):
            return torch.tensor(True)
        elif func is _LESS and args[1] <= 0 and _is(self._drawn, first):
            below = torch.tensor(False)
            self._compared = weakref.ref(below)
            return below
        elif func._schema.is_mutable and isinstance(first, torch.Tensor):
            self._ones.forget(first.untyped_storage())
        if func is _EQUAL and self._sum is not None and _is(self._sum[0], first):
            return torch.tensor(self._sum[1] == args[1])
        return result

    def is_of_a_draw(self, tensor: object) -> bool:
        """Whether it is the last single number that was drawn, or what it was compared to."""
        return _is(self._drawn, tensor) or _is(self._compared, tensor)


def _is(reference: weakref.ref[torch.Tensor] | None, tensor: object) -> bool:
    return reference is not None and reference() is tensor


_ATEN = torch.ops.aten
_ONES = {_ATEN.ones.default, _ATEN.ones_like.default, _ATEN.new_ones.default}
_COPIES = {_ATEN._to_copy.default, _ATEN.clone.default}
_FULL, _EQUAL, _SUM, _ALL = _ATEN.full.default, _ATEN.eq.Scalar, _ATEN.sum.default, _ATEN.all.default
_RAND, _LESS = _ATEN.rand.default, _ATEN.lt.Scalar
