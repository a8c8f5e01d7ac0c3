"""`gcbench.apply` and `gcbench.remove`: checkpoint a model by a strategy, in the user's own training loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any
from weakref import ref

import torch
from torch._functorch import config as functorch_config
from torch.nn import Module
from transformers import PreTrainedModel

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import own_checkpointing
from gcbench.checkpointing.apply import RecomputeCounter
from gcbench.checkpointing.fsdp_groups import check_gathering
from gcbench.checkpointing.replaced import ReplacementWatch
from gcbench.checkpointing.segments import LayersNotSequential
from gcbench.core.errors import UsageError
from gcbench.core.units import counted
from gcbench.job.twin import order_of_twin, own_plan
from gcbench.strategies import Plan
from gcbench.strategies._for_model import unsupported
from gcbench.training import step as training

_BEFORE = "_gcbench_before"
"""The attribute of a model that stores what `remove` restores."""

_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func", "_compiled_call_impl")
"""The attributes that a strategy sets on modules."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A model's plan, and the layers that its training really recomputes.

    Attributes:
        plan: which layers are recomputed, which of them as one group, and by which policy; layers are numbered from 0
            in `modules()` order.
    """

    plan: Plan
    _counter: RecomputeCounter = field(repr=False)
    _watch: ref[ReplacementWatch] = field(repr=False)

    @property
    def recomputed(self) -> frozenset[int] | None:
        """The numbers of the layers that backward passes have really recomputed since `apply` or `reset`.

        Where other checkpointing has replaced the plan's, its layers count from the first training step that shows it.
        None where layers are compiled, so that what they recompute cannot be seen.
        """
        watch = self._watch()
        is_blind = self._counter.is_blind or (watch is not None and watch.is_unseen)
        return None if is_blind else frozenset(self._counter.layers)

    def reset(self) -> None:
        """Empty `recomputed`, to count from the next backward pass on."""
        self._counter.reset()


@dataclass(frozen=True, kw_only=True)
class _Before:
    """How a model was before `apply`, and what `apply` added to it.

    Attributes:
        attributes: each module that can checkpoint, with those of `_ATTRIBUTES` that were set on it.
        configs: configs whose `use_cache` was on.
        memory_budget: torch's activation memory budget, where the plan changes it.
        watched: the module whose hook ends open segments.
        own: `apply` has switched the model's own checkpointing on.
        hooks: handles of the hooks that `apply` has added.
    """

    attributes: tuple[tuple[Module, dict[str, Any]], ...]
    configs: tuple[Any, ...]
    memory_budget: float | None
    watched: Module
    own: bool
    hooks: list[Any]


def apply(model: Module, strategy_or_plan: str | Plan) -> Applied:
    """Checkpoint a model's layers from now on, as `gcbench run` measures it.

    The model is a Hugging Face model or a wrapper of one: a `PeftModel`, `DistributedDataParallel`, FSDP, what
    `Accelerator.prepare` or `torch.compile` returned. It may be wrapped, sharded or compiled before or after the call
    (call `get_peft_model` before: it changes models that already checkpoint). A second `apply` replaces the first, and
    a call that raises changes nothing.

    The strategy alone decides which layers are checkpointed: the others save all their activations, even where
    transformers' `activation_checkpointing_enable` was called before. A later call of it, which the Trainer makes with
    `activation_checkpointing=True` and trl's SFTTrainer by default, replaces the strategy, and the next training step
    warns; leave that setting out. `config.use_cache` becomes False, as training does not use the cache. In `eval()`
    nothing is recomputed. `compile:BUDGET` sets torch's activation memory budget (a fraction, 0 to 1) for the whole
    process. In a compiled model, layers run uncompiled where they are offloaded, reentrant or in groups of several.

    Methods: recomputation is that of Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174), by
    `torch.utils.checkpoint`; saved outputs are those of its selective checkpointing.

    Args:
        model: the model to train; it stays on its device and in its dtype, and nothing is computed.
        strategy_or_plan: `"per-layer"`, `"every:2+selective:matmul"`, `"plan:FILE.json"` or any other strategy that
            `gcbench strategies` lists, or a `Plan`, whose layers are numbered from 0 in `modules()` order.

    Returns:
        The plan that the strategy resolved to, and the layers that are really recomputed. It need not be stored.

    Raises:
        TypeError: for a model or strategy of another type.
        ValueError: for a strategy that does not exist, for a model that cannot checkpoint or is wrapped in other
            checkpointing, and for a plan that this model, its sharding, this torch or this machine does not support.
        gcbench.LayersNotSequential: later, in a forward pass, where the model does something else between two layers
            of a group than to pass the output of one to the next.
    """
    trained = _trained(model)
    layers = checkpointing.layers_of(trained)
    plan = _plan(trained, layers, strategy_or_plan)
    groups = [group for group, _ in plan.treated() if len(group) > 1]
    _check(model, layers, plan, groups)

    remove(trained)
    watched = _watched(model, trained, layers, groups)
    before = _Before(
        attributes=tuple(_attributes(trained)),
        configs=tuple(_caching_configs(trained)),
        memory_budget=functorch_config.activation_memory_budget if plan.memory_budget is not None else None,
        watched=watched,
        own=plan.own,
        hooks=list(_hooks(trained, watched, layers, plan, groups)),
    )
    setattr(trained, _BEFORE, before)
    own_checkpointing.switch_off(trained)
    for config in before.configs:
        config.use_cache = False
    counter = _switch_own_on(trained, layers, before) if plan.own else _switch_on(trained, watched, layers, plan)
    name = repr(strategy_or_plan) if isinstance(strategy_or_plan, str) else "plan"
    watch = ReplacementWatch(trained, layers, plan, name, counter)
    watch.begin(_modules_to_compare_at(trained, layers))
    before.hooks.append(watch)
    return Applied(plan=plan, _counter=counter, _watch=ref(watch))


def remove(model: Module) -> None:
    """Restore a model to how it was before `apply`: flags, functions, `use_cache`, hooks, torch's memory budget.

    transformers' own checkpointing is on or off again as it was before. A model without `apply` is left unchanged.

    Args:
        model: the model that was passed to `apply`, in the same wrappers or in others.

    Raises:
        TypeError: for what is not a `torch.nn.Module`.
        ValueError: for a module that contains several Hugging Face models.
    """
    trained = _trained(model)
    before: _Before | None = vars(trained).pop(_BEFORE, None)
    if before is None:
        return
    checkpointing.end_segments(before.watched)
    for hook in before.hooks:
        hook.remove()
    if before.own:
        own_checkpointing.switch_off(trained)
    for module, attributes in before.attributes:
        for name in _ATTRIBUTES:
            vars(module).pop(name, None)
        vars(module).update(attributes)
    for config in before.configs:
        config.use_cache = True
    if before.memory_budget is not None:
        functorch_config.activation_memory_budget = before.memory_budget


def _trained(model: Module) -> Module:
    """The Hugging Face model inside of its wrappers; the model itself where there is none."""
    if not isinstance(model, Module):
        raise TypeError(f"{model!r} is not a model; pass the torch.nn.Module that is trained")
    found = {id(one): one for one in _outermost(model)}
    if len(found) > 1:
        names = " and ".join(type(one).__name__ for one in found.values())
        raise ValueError(f"{type(model).__name__} contains several models ({names}); pass the one that is trained")
    return next(iter(found.values()), model)


def _outermost(module: Module) -> Iterator[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


# The plan, and whether the model supports it


def _plan(model: Module, layers: Sequence[Module], strategy_or_plan: str | Plan) -> Plan:
    if not isinstance(strategy_or_plan, str | Plan):
        raise TypeError(
            f"{strategy_or_plan!r} is not a strategy; pass one by name, like 'per-layer', or a gcbench.Plan"
        )
    strategy = strategies.parse(strategy_or_plan) if isinstance(strategy_or_plan, str) else None
    refusal = checkpointing.refusal(model)
    if refusal is not None:
        raise ValueError(f"{refusal}; train it without checkpointing")
    if isinstance(strategy_or_plan, Plan):
        plan = strategy_or_plan
        if plan.num_layers != len(layers):
            raise ValueError(
                f"the plan is for {counted(plan.num_layers, 'layer')} and {type(model).__name__} has {len(layers)}; "
                f"make one with num_layers={len(layers)}"
            )
        why = checkpointing.refusal_of(model, plan)
        if why is not None:
            raise ValueError(why)
        return plan
    assert strategy is not None
    if strategy.is_own:
        return own_plan(model, strategy.plan_for(len(layers)))
    why = checkpointing.refusal_of(model, strategy.plan_for(len(layers)))
    if why is not None:
        raise ValueError(why)
    order = _order_run(model, layers) if strategy.counts_run else None
    if order is None:
        return strategy.plan_for(len(layers))
    return strategy.plan_for(len(order)).renumbered(order, len(layers))


def _check(model: Module, layers: Sequence[Module], plan: Plan, groups: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for a plan that this model, torch or machine does not support."""
    operators = [name for _, policy in plan.treated() for name in (*policy.keep, *policy.skip)]
    try:
        checkpointing.check_operators(tuple(dict.fromkeys(operators)))
    except UsageError as err:
        raise ValueError(str(err).removeprefix("--strategies: ")) from None
    refusal = None if torch.cuda.is_available() else unsupported(plan, "cpu")
    if refusal is not None:
        raise ValueError(refusal)
    wrappers = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    if wrappers is not None and any(isinstance(module, wrappers.CheckpointWrapper) for module in model.modules()):
        raise ValueError(
            "the model's layers are wrapped in torch's CheckpointWrapper and would be recomputed twice; leave "
            "activation checkpointing out of the FSDP settings"
        )
    check_gathering(layers, groups, model)


# The order in which layers run


def _order_run(model: Module, layers: Sequence[Module]) -> tuple[int, ...] | None:
    """Find the numbers of the layers that training on text runs, in the order in which they run.

    Runs a twin of the model on fake tensors (shapes and dtypes, no data), as the model itself may be sharded. None
    means all layers in `modules()` order: for layers of one class in one list, whose order is known without a run, and
    for models whose code fails in such a run, because it reads values or needs other inputs than text.
    """
    if not isinstance(model, PreTrainedModel) or _in_one_list(model, layers):
        return None
    try:
        with torch.device("cpu"):
            return order_of_twin(model, len(layers))
    except Exception:  # a model's own code
        return None


def _in_one_list(model: Module, layers: Sequence[Module]) -> bool:
    """Whether the layers are one list and of one class: those of another may be for images, and not run on text."""
    if len({type(layer) for layer in layers}) > 1:
        return False
    ids = {id(layer) for layer in layers}
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return any(ids == {id(child) for child in one.children()} for one in lists)


# Switching on


def _switch_on(trained: Module, watched: Module, layers: Sequence[Module], plan: Plan) -> RecomputeCounter:
    """Apply the plan such that the model may be compiled, now or later."""
    if plan.compiled:
        return checkpointing.apply(trained, plan)
    traceable = [
        (group, policy)
        for group, policy in plan.treated()
        if len(group) == 1 and not (policy.skip or policy.offload or policy.reentrant)
    ]
    checkpointing.apply_groups(watched, layers, traceable, RecomputeCounter(is_blind=True))
    traced: dict[int, Any] = {number: layers[number]._gradient_checkpointing_func for (number,), _ in traceable}
    counter = RecomputeCounter()
    checkpointing.apply_groups(watched, layers, plan.treated(), counter)
    for number in (number for group, _ in plan.treated() for number in group):
        counted: Any = layers[number]._gradient_checkpointing_func
        if number in traced:
            function = partial(_traced_or_counted, counter, traced[number], counted)
        else:
            function = partial(_uncompiled, counted)
        layers[number]._gradient_checkpointing_func = function  # type: ignore[assignment]
    return counter


def _switch_own_on(trained: Module, layers: Sequence[Module], before: _Before) -> RecomputeCounter:
    """Switch the model's own checkpointing on, and count what it recomputes; removes everything where that fails."""
    counter = RecomputeCounter()
    try:
        before.hooks.extend(own_checkpointing.switch_on(trained))
        before.hooks.extend(own_checkpointing.count_recomputed(layers, counter))
    except Exception:  # a model's own code
        remove(trained)
        raise
    return counter


def _modules_to_compare_at(trained: Module, layers: Sequence[Module]) -> list[Module]:
    """The modules at whose calls `ReplacementWatch` compares: the innermost that contains all layers.

    Where that is the model itself also the first layer, since a wrapper may call the model's `forward`, not its hooks.
    """
    stack = _enclosing(trained, layers)
    return [stack] if stack is not trained else [trained, *layers[:1]]


def _traced_or_counted(
    counter: RecomputeCounter, traced: Callable[..., Any], counted: Callable[..., Any], *call: Any
) -> Any:
    """Run `traced` while compiling: only torch's own function can be traced, and its recomputation is not counted."""
    if torch.compiler.is_compiling():
        counter.is_blind = True
        return traced(*call)
    return counted(*call)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(function: Callable[..., Any], *call: Any) -> Any:
    """Run a layer uncompiled: compiled, its recomputation would not agree with its first run."""
    try:
        return function(*call)
    except LayersNotSequential as err:
        raise LayersNotSequential(f"{err}; take groups of one layer, such as per-layer or every:2") from None


def _watched(model: Module, trained: Module, layers: Sequence[Module], groups: Sequence[Sequence[int]]) -> Module:
    """The module whose calls contain those of all groups of several layers, and whose hooks run in every wrapper.

    peft 0.18 calls the `forward` of the Hugging Face model, which runs none of its hooks.
    """
    stack = _enclosing(trained, [layers[number] for group in groups for number in group])
    return model if stack is trained else stack


def _enclosing(trained: Module, modules: Sequence[Module]) -> Module:
    """The innermost module that contains all of these, and is called itself."""
    ids = {id(module) for module in modules}
    paths = [name.split(".")[:-1] for name, module in trained.named_modules() if id(module) in ids]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    stack = trained.get_submodule(".".join(common))
    while isinstance(stack, torch.nn.ModuleList | torch.nn.ModuleDict):
        common = common[:-1]
        stack = trained.get_submodule(".".join(common))
    return stack


def _hooks(
    trained: Module, watched: Module, layers: Sequence[Module], plan: Plan, groups: Sequence[Sequence[int]]
) -> Iterator[Any]:
    if groups:  # the model may be sharded only after this
        yield watched.register_forward_pre_hook(partial(check_gathering, layers, groups))
    if plan.any_policy("reentrant") and (embeddings := training.input_embeddings(trained)) is not None:
        yield embeddings.register_forward_hook(_require_gradients)


def _require_gradients(module: Module, inputs: object, output: torch.Tensor) -> None:
    """Make embeddings require gradients, as transformers does: reentrant layers get none where no input does."""
    output.requires_grad_(True)


def _attributes(model: Module) -> Iterator[tuple[Module, dict[str, Any]]]:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            yield module, {name: vars(module)[name] for name in _ATTRIBUTES if name in vars(module)}


def _caching_configs(model: Module) -> Iterator[Any]:
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return (config for config in configs.values() if getattr(config, "use_cache", None))
