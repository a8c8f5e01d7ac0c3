"""Applies a plan to a model: the only module that knows how a Hugging Face layer checkpoints."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from gcbench.checkpointing import own_checkpointing, policy_contexts
from gcbench.checkpointing.policy_contexts import SavedOutputMutated
from gcbench.checkpointing.random_draws import has_dropout, in_step
from gcbench.checkpointing.segments import ContextFn, LayersNotSequential, Segment
from gcbench.core.errors import UsageError
from gcbench.core.units import counted
from gcbench.operators.schema import operator_name, targets
from gcbench.strategies import Plan, Policy
from gcbench.strategies.selective import NAMED

Groups = Sequence[tuple[Sequence[int], Policy]]


_NAMED = frozenset(op for ops in NAMED.values() for op in ops)
"""Operators that gcbench's own strategies name; not every torch has every one of them."""


class RecomputeCounter:
    """Counts the layers that a backward pass really ran a second time.

    Attributes:
        layers: the numbers of the layers recomputed since the last `reset`.
        is_blind: layers are compiled, so that what they recompute cannot be seen.
    """

    def __init__(self, *, is_blind: bool = False) -> None:
        self.layers: set[int] = set()
        self.is_blind = is_blind

    def reset(self) -> None:
        self.layers.clear()

    def counted(self, layer: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that each call after the first counts `layer` as recomputed."""
        is_first = True

        def counting(*args: Any) -> Any:
            nonlocal is_first
            if not is_first:
                self.layers.add(layer)
            is_first = False
            return function(*args)

        return counting


def checkpointable_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """List the layers that transformers' `every_n_layers` counts, in its order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """List the layers that plans number; of a model with only its own checkpointing, those that its code loops over."""
    if own_checkpointing.is_all(model):
        return list(own_checkpointing.layers_without_entry(model).values())
    return [*checkpointable_layers(model)]


@dataclass(frozen=True, kw_only=True)
class LayersRun:
    """The numbers of the layers that a step runs.

    Attributes:
        forward: layers that the forward pass runs.
        order: the same, in the order of their first run.
        backward: those of them that a gradient passes back through: all, unless parameters are frozen.
    """

    forward: set[int] = field(default_factory=set)
    order: list[int] = field(default_factory=list)
    backward: set[int] = field(default_factory=set)


@contextmanager
def layers_run(model: torch.nn.Module) -> Iterator[LayersRun]:
    """Note which layers a forward pass inside the context runs."""
    ran = LayersRun()

    def enter(layer: int, module: torch.nn.Module, inputs: object) -> None:
        if layer not in ran.forward:
            ran.forward.add(layer)
            ran.order.append(layer)

    def leave(layer: int, module: torch.nn.Module, inputs: object, outputs: object) -> None:
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in tree_leaves(outputs)):
            ran.backward.add(layer)

    hooks = []
    layers = layers_of(model)
    for number, layer in enumerate(layers):
        # Code of its own may call a layer's `forward`, which fires none of its hooks.
        for module in own_checkpointing.parts(layer, layers) if own_checkpointing.is_all(model) else [layer]:
            hooks.append(module.register_forward_pre_hook(partial(enter, number)))
            hooks.append(module.register_forward_hook(partial(leave, number)))
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def refusal(model: torch.nn.Module) -> str | None:
    """Say why this model cannot checkpoint, in a clause; None where it can."""
    name = type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False):
        return f"{name} does not support gradient checkpointing in this transformers version"
    if not checkpointable_layers(model) and not own_checkpointing.exists(model):
        return f"{name} has no layer that can be checkpointed on its own"
    return None


def refusal_of(model: torch.nn.Module, plan: Plan) -> str | None:
    """Say why a plan cannot be applied to a model whose own checkpointing is the only one; None where it can."""
    return own_checkpointing.advice(model) if plan.groups and not plan.own and own_checkpointing.is_all(model) else None


def apply(model: torch.nn.Module, plan: Plan) -> RecomputeCounter:
    """Checkpoint the layers of `plan` through each layer's own flag and function.

    transformers' `activation_checkpointing_enable(every_n_layers=k)` sets the same, so that a measurement shows what a
    user's run does. A model's own checkpointing is switched on as a whole. A plan with a memory budget sets torch's,
    for the whole process, until `clear`.

    Raises ValueError for a plan of another number of layers, and for one that cannot be applied to the model.
    """
    layers = layers_of(model)
    if plan.num_layers != len(layers):
        raise ValueError(f"the plan is for {counted(plan.num_layers, 'layer')} and the model has {len(layers)}")
    why = refusal_of(model, plan)
    if why is not None:
        raise ValueError(why)
    counter = RecomputeCounter(is_blind=plan.compiled)
    if plan.own:
        hooks = own_checkpointing.switch_on(model)
        _HOOKS[model] = Hooks((*hooks, *own_checkpointing.count_recomputed(layers, counter)))
    else:
        apply_groups(model, layers, plan.treated(), counter)
    if plan.compiled:
        if plan.memory_budget is not None:
            functorch_config.activation_memory_budget = plan.memory_budget
        for layer in layers:
            layer.compile()
    return counter


def apply_groups(
    model: torch.nn.Module, layers: Sequence[torch.nn.Module], groups: Groups, counter: RecomputeCounter
) -> None:
    """Checkpoint groups of the `model`'s `layers`, each with its policy."""
    segments: list[Segment] = []
    is_random = has_dropout(model)
    for group, policy in groups:
        context_fn = _context_fn(policy, is_random=is_random)
        segment = None
        if len(group) > 1:
            segment = Segment(len(group), context_fn=context_fn, saving=_saving(policy))
            segments.append(segment)
        for place, number in enumerate(group):
            function: Callable[..., Any]
            if segment is not None:
                function = partial(segment.run, place, partial(counter.counted, number))
            elif counter.is_blind:  # the compiler sees through torch's own function alone
                function = partial(checkpoint, use_reentrant=False)
                if policy.keep:
                    function = partial(function, context_fn=context_fn)
            else:
                function = partial(_checkpoint_one, counter, number, policy, context_fn)
            layers[number]._gradient_checkpointing_func = function  # type: ignore[assignment]
            layers[number].gradient_checkpointing = True  # type: ignore[assignment]

    if segments:
        end_segments(model)
        _HOOKS[model] = model.register_forward_hook(partial(_end_open, segments), always_call=True)


class Hooks(tuple[Any, ...]):
    """Handles of hooks that are removed together."""

    def remove(self) -> None:
        """Remove all of them."""
        for hook in self:
            hook.remove()


_HOOKS: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()


def _end_open(segments: Sequence[Segment], *call: object) -> None:
    """End the open segments after a forward pass, however it ended: one whose last layer never ran would not end.

    Raises LayersNotSequential where a pass that ended well leaves one open.
    """
    still_open = [segment for segment in segments if segment.is_open]
    for segment in reversed(still_open):
        segment.end()
    if still_open and sys.exc_info()[0] is None:
        raise LayersNotSequential("the last layer of a group does not run")


def end_segments(model: torch.nn.Module) -> None:
    """Remove the hooks on the segments of a model, or on its own checkpointing."""
    if model in _HOOKS:
        _HOOKS.pop(model).remove()


def _checkpoint_one(
    counter: RecomputeCounter,
    number: int,
    policy: Policy,
    context_fn: ContextFn,
    function: Callable[..., Any],
    *args: Any,
) -> Any:
    """Run one layer under `torch.utils.checkpoint.checkpoint`, and count its recomputation."""
    counted = counter.counted(number, function)
    if policy.reentrant:
        return checkpoint(counted, *args, use_reentrant=True)
    # Stated, not left to the default: any kwargs without it flip Hugging Face to the reentrant variant.
    with _saving(policy)():
        return checkpoint(counted, *args, use_reentrant=False, context_fn=context_fn)


def _saving(policy: Policy) -> Callable[[], AbstractContextManager[Any]]:
    return save_on_host if policy.offload else nullcontext


def save_on_host() -> AbstractContextManager[Any]:
    """Move what autograd saves inside the context to pinned host memory, as transformers' `offload=True` does."""
    return torch.autograd.graph.save_on_cpu(pin_memory=True, device_type="cuda")


def _context_fn(policy: Policy, *, is_random: bool = False) -> ContextFn:
    """Return a function that makes the contexts for the two runs of a group: a new pair for each call of the group.

    Args:
        policy: which outputs to save, and which calls to skip.
        is_random: layers may draw random numbers, whose generator then is kept in step, at some microseconds a call.
    """
    if not policy.keep and not policy.skip:
        return noop_context_fn
    make = partial(policy_contexts.contexts, policy) if policy.skip else _selective(policy)
    return (lambda: make() if torch.compiler.is_compiling() else in_step(make())) if is_random else make


def _selective(policy: Policy) -> ContextFn:
    """Return a maker of torch's contexts of selective checkpointing, which refuse saved outputs changed in place."""
    names = [name.removeprefix("aten::") for name in policy.keep]
    operators = frozenset(name for name in names if "#" not in name)
    numbered = frozenset(name for name in names if "#" in name)

    def make() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        calls: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        saved: set[int] = set()
        store: list[Callable[[], Any]] = []

        def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            name, is_recompute = operator_name(op), context.is_recompute
            is_saved = name in operators or (bool(numbered) and f"{name}#{calls[is_recompute][name]}" in numbered)
            calls[is_recompute][name] += 1
            if not is_recompute:
                for target in saved.intersection(targets(op, args)):
                    _mark_mutated(store[0]().storage, target, name)
                if is_saved:
                    outputs = tree_leaves(getattr(context, "op_output", None))
                    saved.update(_storage(out) for out in outputs if isinstance(out, torch.Tensor))
            return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = create_selective_checkpoint_contexts(choose)  # type: ignore[no-untyped-call]
        store.append(ref(contexts[0]))  # weak: a saved output must be freed with its last user
        return contexts  # type: ignore[no-any-return]

    return make


class _Mutated:
    """Replaces a saved output that has been changed; a recomputation that never reads it is right."""

    def __init__(self, op: str) -> None:
        self.op = op

    def get_val(self, allow_cache_entry_mutation: bool) -> torch.Tensor:
        raise SavedOutputMutated(self.op)


def _mark_mutated(storage: Mapping[Any, Any], target: int, op: str) -> None:
    """Replace the saved outputs in that memory. `storage` is torch's own: operator -> entries by number."""
    for entries in storage.values():
        for place, entry in list(entries.items() if isinstance(entries, dict) else enumerate(entries)):
            values = (getattr(leaf, "val", None) for leaf in tree_leaves(entry))
            if any(isinstance(value, torch.Tensor) and _storage(value) == target for value in values):
                entries[place] = _Mutated(op)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def check_operators(names: Sequence[str]) -> None:
    """Check operators that strategies name; raises UsageError for a name that this torch does not have."""
    known = {name.partition(".")[0].removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names()}
    for name in names:
        op = name.partition("#")[0].removeprefix("aten::")
        if op not in known and op not in _NAMED:
            near = ", ".join(difflib.get_close_matches(op, known, n=3))
            raise UsageError(
                f"--strategies: torch {torch.__version__} has no operator {op!r}"
                + (f"; near names: {near}" if near else "; write them as torch does, like mm/addmm/_softmax")
            )


def clear(model: torch.nn.Module) -> None:
    """Undo `apply`: no layer is checkpointed or compiled."""
    end_segments(model)
    own_checkpointing.switch_off(model)
    for layer in layers_of(model):
        layer._compiled_call_impl = None
    functorch_config.activation_memory_budget = 1.0
