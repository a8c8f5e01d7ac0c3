"""Records the operator calls of a layer's forward pass: what each reads, and what the backward pass needs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcbench.operators.schema import is_question, is_random, operator_name, targets
from gcbench.simulate.costs import Work
from gcbench.simulate.op_work import is_mutable, of_call, storage_of
from gcbench.simulate.trace.fake_model import FakeModel, NotComposable


@dataclass(kw_only=True)
class InnerCall:
    """One call of an operator in a layer's forward pass.

    Attributes:
        name: as in plans, `mm#3` for the fourth call of `mm` in the layer.
        nbytes: bytes allocated for its outputs; 0 for a view.
        reads: numbers of the earlier calls in the layer whose memory it reads.
        needed: the backward pass reads an output.
        is_changed: a later call writes into an output, so that it cannot be saved.
        is_random: it draws random numbers.
        is_view: its output is a view.
        is_in_place: it writes into memory that other calls allocated.
    """

    name: str
    work: Work
    nbytes: int
    reads: tuple[int, ...]
    needed: bool = False
    is_changed: bool = False
    is_random: bool = False
    is_view: bool = False
    is_in_place: bool = False

    @property
    def can_keep(self) -> bool:
        """Whether its outputs can be saved for the recomputation."""
        return not (self.is_changed or self.is_random or self.is_view or self.is_in_place)


@dataclass
class _Watch:
    """The calls of a running layer; memory is identified by its storage."""

    calls: list[InnerCall] = field(default_factory=list)
    owner: dict[int, int] = field(default_factory=dict)
    """Storage -> the call that allocated it or wrote into it last."""
    inside: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Storage -> all calls with an output in it."""
    counts: Counter[str] = field(default_factory=Counter)
    held: list[torch.Tensor] = field(default_factory=list)
    """Every output, so that no storage is reused while the layer runs."""


def inner_calls(
    fake_model: FakeModel, layers: Sequence[int], *, batch_size: int, seq_len: int
) -> Mapping[int, tuple[InnerCall, ...]]:
    """The calls in the forward pass of each of `layers`, without checkpointing.

    Raises NotComposable where a layer does not run exactly once, and what the model's own code raises.
    """
    found: dict[int, tuple[InnerCall, ...]] = {}

    with ExitStack() as stack:
        for number in layers:
            stack.enter_context(_watched(fake_model.layers[number], number, found))
        fake_model.run_forward(layers, batch_size=batch_size, seq_len=seq_len)
    if set(found) != set(layers):
        raise NotComposable("a layer does not run")
    return found


@contextmanager
def _watched(layer: torch.nn.Module, number: int, found: dict[int, tuple[InnerCall, ...]]) -> Iterator[None]:
    """Within the context, a run of the layer is recorded in `found`."""
    forward = layer.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        if number in found:
            raise NotComposable("a layer runs several times")
        watch = _Watch()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            owner = watch.owner.get(storage_of(tensor))
            if owner is not None:
                watch.calls[owner].needed = True
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Calls(watch):
            result = forward(*args, **kwargs)
        found[number] = tuple(watch.calls)
        return result

    layer.forward = noted
    try:
        yield
    finally:
        del layer.forward


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every call, and which earlier calls made what it reads."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_question(func):
            return func(*args, **(kwargs or {}))
        kwargs, watch = kwargs or {}, self.watch
        inputs = {storage_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        reads = {watch.owner[storage] for storage in inputs if storage in watch.owner}
        result = func(*args, **kwargs)
        made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        name = operator_name(func)
        place = watch.counts[name]
        watch.counts[name] += 1
        number = len(watch.calls)
        fresh = {storage_of(value): value for value in made if storage_of(value) not in inputs}
        written = set(targets(func, args))
        for storage in written:
            for earlier in watch.inside[storage]:
                watch.calls[earlier].is_changed = True
        watch.calls.append(
            InnerCall(
                name=f"{name}#{place}",
                work=of_call(func, args, kwargs, result),
                nbytes=sum(int(value.untyped_storage().nbytes()) for value in fresh.values()),
                reads=tuple(sorted(reads)),
                is_random=is_random(func, args, kwargs),
                is_view=not is_mutable(func) and not fresh,
                is_in_place=is_mutable(func),
            )
        )
        # A view depends on its base, and a tensor on what is written into it.
        for storage in (*fresh, *written):
            watch.owner[storage] = number
        for storage in {storage_of(value) for value in made}:
            watch.owner[storage] = number
            watch.inside[storage].append(number)
        watch.held.extend(made)
        return result
