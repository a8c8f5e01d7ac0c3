"""Recomputes a layer without computing what nothing needs: the two contexts of `torch.utils.checkpoint` for a policy.

torch's own selective checkpointing runs every operator again whose output is not saved. Where the saved output took
several calls, the calls before the last run for nothing: a rotated query is saved, and the query is projected once
more. Here the calls that a plan says to skip compute nothing. They return placeholder tensors without storage, which
raise if their values are read. Both runs must call the same operators; a layer that does not raises RecomputeMismatch.
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
    """A recomputation needs a saved output that the layer has changed in place since.

    torch notices by version counters, which what `matmul` returns does not share with the product inside it: torch 2.13
    then computes wrong gradients without a word.
    """

    def __init__(self, op: str) -> None:
        super().__init__(
            f"a saved output is changed in place ({op}) by this model's layers, so that a recomputation from it would "
            "be wrong"
        )


class SkippedButNeeded(RuntimeError):
    """A plan skips a call whose result this layer needs: it was made for other layers, or another version of them."""

    def __init__(self, call: str) -> None:
        super().__init__(
            f"the plan skips what {call} needs, so it was made for other layers than these; make it again with "
            "gcbench plan for this model and this version of its code"
        )


class RecomputeMismatch(RuntimeError):
    """A layer calls other operators when it is recomputed, so that calls cannot be identified by their number."""

    def __init__(self, call: str) -> None:
        super().__init__(
            f"a layer calls {call} when it is recomputed and another operator the first time, so that a plan cannot "
            "say which outputs to save; take a strategy that saves nothing inside of layers, such as per-layer"
        )


def contexts(policy: Policy) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Make the contexts for the first run of a group of layers and for its recomputation."""
    names = [name.removeprefix("aten::") for name in policy.keep]
    store = _Store(save=frozenset(names))
    skip = frozenset(name.removeprefix("aten::") for name in policy.skip)
    return _FirstRun(store), _SecondRun(store, skip)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Size, strides, dtype and device of a tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Layout:
        return cls(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)


class _Store:
    """What the first run leaves to the second.

    Attributes:
        save: operators, or calls of them, whose outputs are saved.
        outputs: call -> its saved output.
        versions: call -> autograd's counts of in-place changes to its saved output; some come when the layer is done.
        layouts: call -> its result with a `_Layout` for each tensor, of every call of the first run.
        names: the operator of every call of the first run, in order.
        mutated: call -> the operator that changed its saved output in place.
    """

    def __init__(self, save: frozenset[str]) -> None:
        self.save = save
        self.outputs: dict[str, Any] = {}
        self.versions: dict[str, list[int]] = {}
        self.layouts: dict[str, Any] = {}
        self.names: list[str] = []
        self.mutated: dict[str, str] = {}

    def is_saved(self, func: Any, name: str, call: str) -> bool:
        """Whether the output of a call is saved; what writes into its arguments has to do so again in any case."""
        return (call in self.save or name in self.save) and not func._schema.is_mutable


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names each call, as plans do: the operator and how many calls of it came before."""

    def __init__(self, store: _Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.counts: Counter[str] = Counter()

    def _call(self, name: str) -> str:
        number = self.counts[name]
        self.counts[name] += 1
        return f"{name}#{number}"


class _FirstRun(_Counting):  # type: ignore[no-untyped-call]
    """Runs every call, and saves the outputs that the policy names."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_question(func) or _is_view(func):
            return func(*args, **(kwargs or {}))
        store, name = self.store, operator_name(func)
        call = self._call(name)
        store.names.append(name)
        for target in targets(func, args):
            for saved, outputs in store.outputs.items():
                if any(_storage(value) == target for value in _tensors(outputs)):
                    store.mutated[saved] = name
        result = func(*args, **(kwargs or {}))
        store.layouts[call] = tree_map_only(torch.Tensor, _Layout.of, result)
        if store.is_saved(func, name, call):
            store.outputs[call] = tree_map_only(torch.Tensor, _detached, result)
            store.versions[call] = _versions(store.outputs[call])
        return result


class _SecondRun(_Counting):  # type: ignore[no-untyped-call]
    """Answers each call with its saved output, with placeholders where it is skipped, or by running it."""

    def __init__(self, store: _Store, skip: frozenset[str]) -> None:
        super().__init__(store)
        self.skip = skip
        self.num_calls = 0
        self.unwritten: dict[int, torch.Tensor] = {}
        """Storage -> a real tensor that a skipped call was to write into: its values must not be read either."""

    def __enter__(self) -> Any:
        """Count calls from 0: each backward pass through the same forward pass enters anew."""
        self.counts.clear()
        self.num_calls = 0
        self.unwritten = {}
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        num_without_values = sum(self._is_without_values(value) for value in inputs)
        if is_question(func) or _is_view(func):
            if not num_without_values or func.namespace == "prim":
                return func(*args, **kwargs)
            return _view_of_placeholder(func, args, kwargs)
        name, call = self._next_call(func, may_be_mirrored=num_without_values > 0)
        if call in self.store.mutated:
            raise SavedOutputMutated(self.store.mutated[call])
        if call in self.store.outputs or self.store.is_saved(func, name, call):
            return self._saved_output(call)
        is_skipped = call in self.skip or name in self.skip
        if not num_without_values and (not is_skipped or _writes_into_values(func, args)):
            return func(*args, **kwargs)
        if num_without_values < len(inputs) and not is_skipped:
            raise SkippedButNeeded(call)
        return self._skipped(func, args, call)

    def _next_call(self, func: Any, *, may_be_mirrored: bool) -> tuple[str, str]:
        """The operator's name and the call's; raises RecomputeMismatch where the first run called another operator."""
        name, expected = operator_name(func), self.store.names[self.num_calls : self.num_calls + 1]
        if may_be_mirrored and [_MIRRORED.get(name)] == expected:
            name = _MIRRORED[name]
        call = self._call(name)
        if expected != [name]:
            raise RecomputeMismatch(call)
        self.num_calls += 1
        return name, call

    def _saved_output(self, call: str) -> Any:
        """The saved output of a call, for one use: the store holds it no longer."""
        if call not in self.store.outputs:
            raise RuntimeError(
                f"the saved output of {call} is no longer there: a second backward pass through one forward pass "
                "cannot recompute; leave retain_graph out, or save nothing inside of layers"
            )
        output = self.store.outputs.pop(call)
        if _versions(output) != self.store.versions[call]:
            raise SavedOutputMutated("when the layer had run")
        return output

    def _skipped(self, func: Any, args: Any, call: str) -> Any:
        """Placeholders for the result of a call that does not run; what it was to write into is as good as one."""
        if _writes_into_values(func, args):
            if not args[0].requires_grad:  # autograd may save it without a call that shows it
                raise SkippedButNeeded(call)
            self.unwritten[_storage(args[0])] = args[0]
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(_Layout, Placeholder, self.store.layouts[call])

    def _is_without_values(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, Placeholder) or (bool(self.unwritten) and _storage(tensor) in self.unwritten)


class Placeholder(torch.Tensor):
    """The result of a skipped call: a tensor without storage that raises SkippedButNeeded if its values are read.

    It is on the device of the result, so that autocast treats both the same way.
    """

    @staticmethod
    def __new__(cls, layout: _Layout) -> Placeholder:
        make = torch.Tensor._make_wrapper_subclass
        return make(cls, layout.size, strides=layout.stride, dtype=layout.dtype, device=layout.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise, as every call outside of `_SecondRun` reads values."""
        raise SkippedButNeeded(operator_name(func))


_MIRRORED = {"ge": "le", "le": "ge", "gt": "lt", "lt": "gt"}
"""Python asks the right side of a comparison first where that is of a subclass, as `Placeholder` is of `Tensor`."""


@cache
def _is_view(op: Any) -> bool:
    """Whether a call returns another view of its input's memory.

    The second run may call more of them: autograd makes views of placeholders again after a change in place.
    """
    return not op._schema.is_mutable and any(result.alias_info for result in op._schema.returns)


def _view_of_placeholder(view: Any, args: Any, kwargs: Any) -> Any:
    """The view as a placeholder; raises SkippedButNeeded for a view of a real tensor that a skipped call left so."""
    if not isinstance(args[0], Placeholder):
        raise SkippedButNeeded(operator_name(view))
    device = args[0].device
    args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))

    def placeholder(made: torch.Tensor) -> Placeholder:
        return Placeholder(_Layout(made.size(), made.stride(), made.dtype, device))

    return tree_map_only(torch.Tensor, placeholder, view(*args, **kwargs))


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _writes_into_values(func: Any, args: Any) -> bool:
    """Whether a call writes into its first argument and that is a real tensor."""
    if not func._schema.is_mutable:
        return False
    return isinstance(args[0], torch.Tensor) and not isinstance(args[0], Placeholder)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph, which would refer to itself; changes in place still count for both."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(outputs: Any) -> list[int]:
    return [value._version for value in _tensors(outputs)]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
