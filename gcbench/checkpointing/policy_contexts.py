"""Recomputes a layer without computing what nothing needs: the two contexts of `torch.utils.checkpoint` for a policy.

torch's own selective checkpointing runs every operator again that is not kept. Where an output is kept that was made in
several steps, the steps before it are run for nothing: a rotated query is kept, and the query is projected once more.
Here the calls that a plan says to skip compute nothing. What they return is hollow: a shape without memory, loud where
something needs it after all. Both runs must call the same operators; one that does not is told, not believed.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gcbench.operators.schema import is_question, operator_name, targets
from gcbench.strategies import Policy


class SavedOutputMutated(NotImplementedError):
    """A recomputation needs what was kept, and the layer has changed it in place since.

    torch notices by version counters, which what `matmul` returns does not share with the product inside it: torch 2.13
    then computes wrong gradients without a word.
    """

    def __init__(self, op: str) -> None:
        super().__init__(
            f"what is to be kept is changed in place ({op}) by this model's layers, so that a recomputation from "
            "it would be wrong"
        )


class SkippedButNeeded(RuntimeError):
    """A plan skips a call whose result this layer needs: it was made for other layers, or another version of them."""

    def __init__(self, call: str) -> None:
        super().__init__(
            f"the plan skips what {call} needs, so it was made for other layers than these; make it again with "
            "gcbench plan for this model and this version of its code"
        )


def contexts(policy: Policy) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the first run of a group of layers and for the second."""
    names = [name.removeprefix("aten::") for name in policy.keep]
    store = _Store(keep=frozenset(names))
    skip = frozenset(name.removeprefix("aten::") for name in policy.skip)
    return _FirstRun(store), _SecondRun(store, skip)


class RecomputeMismatch(RuntimeError):
    """A layer calls other operators the second time, so that calls cannot be told by their number."""

    def __init__(self, call: str) -> None:
        super().__init__(
            f"a layer calls {call} when it is recomputed and something else the first time, so that a plan cannot say "
            "what to keep of it; take a strategy that keeps nothing inside of layers, such as per-layer"
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    """All of a tensor but its numbers."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Shape:
        return cls(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)


class _Store:
    """What is kept from the first run to the second."""

    def __init__(self, keep: frozenset[str]) -> None:
        self.keep = keep
        self.outputs: dict[str, Any] = {}
        self.versions: dict[str, list[int]] = {}
        """Of what is kept, as autograd counts changes in place: some come when the layer is done."""
        self.shapes: dict[str, Any] = {}
        """What every call of the first run returned: shapes for tensors."""
        self.names: list[str] = []
        """Of all calls of the first run, in order."""
        self.spoilt: dict[str, str] = {}
        """Call -> the operator that changed what was kept of it."""

    def is_kept(self, func: Any, name: str, call: str) -> bool:
        """What writes into its arguments has to do so again, kept or not."""
        return (call in self.keep or name in self.keep) and not func._schema.is_mutable


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names each call, as plans do: the operator and how many of it came before."""

    def __init__(self, store: _Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.counts: Counter[str] = Counter()

    def _call(self, name: str) -> str:
        place = self.counts[name]
        self.counts[name] += 1
        return f"{name}#{place}"


class _FirstRun(_Counting):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_question(func) or _is_view(func):
            return func(*args, **(kwargs or {}))
        store, name = self.store, operator_name(func)
        call = self._call(name)
        store.names.append(name)
        for target in targets(func, args):
            for kept, outputs in store.outputs.items():
                if any(_storage(value) == target for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)):
                    store.spoilt[kept] = name
        result = func(*args, **(kwargs or {}))
        store.shapes[call] = tree_map_only(torch.Tensor, _Shape.of, result)
        if store.is_kept(func, name, call):
            store.outputs[call] = tree_map_only(torch.Tensor, _detached, result)
            store.versions[call] = _versions(store.outputs[call])
        return result


class _SecondRun(_Counting):  # type: ignore[no-untyped-call]
    def __init__(self, store: _Store, skip: frozenset[str]) -> None:
        super().__init__(store)
        self.skip = skip
        self.num_calls = 0
        self.unwritten: dict[int, torch.Tensor] = {}
        """Memory -> a tensor that a skipped call was to write into: as good as hollow."""

    def __enter__(self) -> Any:
        """Each backward pass through the same forward pass counts from 0 on."""
        self.counts.clear()
        self.num_calls = 0
        self.unwritten = {}
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        hollow = sum(self._is_hollow(value) for value in given)
        if is_question(func) or _is_view(func):
            if not hollow or func.namespace == "prim":
                return func(*args, **kwargs)
            if not isinstance(args[0], Placeholder):
                raise SkippedButNeeded(operator_name(func))
            return _seen_another_way(func, args, kwargs)
        name, expected = operator_name(func), self.store.names[self.num_calls : self.num_calls + 1]
        if hollow and [_MIRRORED.get(name)] == expected:
            name = _MIRRORED[name]
        call = self._call(name)
        if expected != [name]:
            raise RecomputeMismatch(call)
        self.num_calls += 1
        if call in self.store.spoilt:
            raise SavedOutputMutated(self.store.spoilt[call])
        if call in self.store.outputs:
            kept = self.store.outputs.pop(call)
            if _versions(kept) != self.store.versions[call]:
                raise SavedOutputMutated("when the layer had run")
            return kept
        if self.store.is_kept(func, name, call):
            raise RuntimeError(
                f"what was kept of {call} is gone: a second backward pass through one forward pass cannot recompute; "
                "leave retain_graph out, or keep nothing"
            )
        writes = func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Placeholder)
        is_skipped = call in self.skip or name in self.skip
        if not hollow and (writes or not is_skipped):
            return func(*args, **kwargs)
        if hollow < len(given) and not is_skipped:
            raise SkippedButNeeded(call)
        if writes:
            if not args[0].requires_grad:  # autograd may save it unasked
                raise SkippedButNeeded(call)
            self.unwritten[_storage(args[0])] = args[0]
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(_Shape, Placeholder, self.store.shapes[call])

    def _is_hollow(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, Placeholder) or (bool(self.unwritten) and _storage(tensor) in self.unwritten)


class Placeholder(torch.Tensor):
    """Stands for a result that nothing needs: on its device, so that autocast takes it for what it is; no memory."""

    @staticmethod
    def __new__(cls, shape: _Shape) -> Placeholder:
        make = torch.Tensor._make_wrapper_subclass
        return make(cls, shape.size, strides=shape.stride, dtype=shape.dtype, device=shape.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever asks for values."""
        raise SkippedButNeeded(operator_name(func))


_MIRRORED = {"ge": "le", "le": "ge", "gt": "lt", "lt": "gt"}
"""Python asks the right side of a comparison first where that is of a subclass, as `Placeholder` is of `Tensor`."""


@cache
def _is_view(op: Any) -> bool:
    """Whether a call only looks at memory another way: autograd makes views of hollow tensors again after a change in
    place, so that the second run may call more of them."""
    return not op._schema.is_mutable and any(result.alias_info for result in op._schema.returns)


def _seen_another_way(view: Any, args: Any, kwargs: Any) -> Any:
    """A view of a hollow tensor, hollow too."""
    device = args[0].device
    args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))

    def hollow(made: torch.Tensor) -> Placeholder:
        return Placeholder(_Shape(made.size(), made.stride(), made.dtype, device))

    return tree_map_only(torch.Tensor, hollow, view(*args, **kwargs))


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Or the graph above would hang on to itself; changes in place are still counted with those of the tensor."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(outputs: Any) -> list[int]:
    return [value._version for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
