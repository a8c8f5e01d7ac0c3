"""The plans that other methods choose, on gcbench's ground: its bytes, its seconds, the very layers of the model.

- `sac_ilp`: `torch.distributed._tools.sac_ilp` (S. Purandare et al., 2024). Its estimator watches a layer's forward
  pass on fake tensors, with gcbench's seconds in place of its own (those need a GPU); its greedy order, its fit by two
  straight lines, its integer program and its choice of operators are torch's own. It needs `pulp` and `pwlf`.
- `activation_memory_budget`: the min-cut partitioner of `torch.compile`, given one layer's joint graph. What it saves
  and what it runs again is priced as eager operators; compiled code fuses many of them, and it does not bound the peak.

Either becomes an ordinary plan (operators to keep, and to skip), which is traced like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from plan_ground import FULL, OFF, CannotRun, Ground, Point
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.distributed._tools import ilp_utils
from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP, SACEstimator, SACStats
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from gcbench.operators.schema import operator_name
from gcbench.plan.policies.layer_calls import InnerCall
from gcbench.simulate.costs import Figures
from gcbench.simulate.op_work import of_call
from gcbench.strategies import Policy
from gcbench.training.step import PRECISIONS

BUDGETS = tuple(round(0.05 * step, 2) for step in range(21))
"""Values of activation_memory_budget."""
SOLVER_S = 15
"""For one of sac_ilp's programs, in place of its own 180: equal layers keep the solver busy proving what it has."""


# torch.distributed._tools.sac_ilp


class _Estimator(SACEstimator):
    """torch's estimator for some layers, with our seconds."""

    def __init__(self, layers: Sequence[torch.nn.Module], figures: Figures) -> None:
        super().__init__()
        self.wanted = {id(layer) for layer in layers}
        self._estimate_runtime = self._ours
        self.figures = figures

    def _ours(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        result = func(*args, **(kwargs or {}))
        return result, 1e3 * self.figures.seconds(of_call(func, args, kwargs or {}, result))

    def _post_fw_hook(self, mod: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        if id(mod) in self.wanted:  # of others it needs nothing, and fails for those in which nothing runs
            super()._post_fw_hook(mod, inputs, outputs)

    def names(self, fqn: str) -> list[str]:
        """The operators of `SACStats`, as plans name them."""
        counts: Counter[str] = Counter()
        found = []
        for entry in self._sac_mod_metadata[fqn].sac_metadata:
            if entry.func not in OPS_TO_ALWAYS_SKIP:
                name = operator_name(entry.func)
                found.append(f"{name}#{counts[name]}")
                counts[name] += 1
        return found


@dataclass(frozen=True, kw_only=True)
class _Sac:
    """What the estimator found for one kind of layer."""

    stats: SACStats
    names: list[str]
    tradeoff: Any


def _estimated(ground: Ground) -> dict[Any, _Sac]:
    fake_model, examples = ground.fake_model, ground.examples
    modules = [fake_model.layers[layer] for layer in ground.on_stage]
    estimator = _Estimator(modules, ground.figures)
    forward = fake_model.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with estimator:
            return forward(*args, **kwargs)

    fake_model.model.forward = watched  # type: ignore[method-assign]
    try:
        fake_model.run_forward(ground.on_stage, batch_size=ground.batch, seq_len=ground.seq_len)
    finally:
        del fake_model.model.forward
    found = {}
    np.random.seed(0)
    for kind, layer in examples.items():
        fqn = estimator._mod_tracker.get_known_fqn(fake_model.layers[layer])
        assert fqn is not None
        stats = estimator.sac_mod_stats[fqn]
        tradeoff = estimator._get_sac_tradeoff_pwlf_stats(stats, estimator.sac_mod_greedy_order_meta[fqn])
        found[kind] = _Sac(stats=stats, names=estimator.names(fqn), tradeoff=tradeoff)
    return found


def sac_ilp(ground: Ground, budgets_bytes: Sequence[int]) -> tuple[list[Point | None], dict[str, Any]]:
    """The plan that sac_ilp chooses for each budget, as it would run, and facts about its view of a layer."""
    try:
        from torch.distributed._tools import sac_ilp as theirs
    except ImportError as err:
        raise CannotRun(f"{err} It is no dependency of gcbench; install pulp and pwlf to run it.") from err
    try:
        import pwlf  # noqa: F401
    except ImportError as err:
        raise CannotRun("the package pwlf is missing, which its estimator fits its curves with") from err
    found = _estimated(ground)
    graph = _graph(ground, found)
    units = [f"model.layers.{place}" for place in range(len(ground.layers))]
    chosen: list[dict[str, float] | None] = []
    solver = theirs.PULP_CBC_CMD
    with mock.patch.object(theirs, "PULP_CBC_CMD", lambda **options: solver(**options | {"timeLimit": SOLVER_S})):
        for budget in budgets_bytes:
            decisions, _, peak = theirs.sac_milp(graph, budget / 2**30, ac_units=units)
            chosen.append(None if peak == -1 else decisions)
    kinds = [ground.fake_model.kinds[layer] for layer in ground.layers]
    wanted = {
        (kinds[place], decisions[unit])
        for decisions in chosen
        if decisions is not None
        for place, unit in enumerate(units)
        if unit in decisions
    }
    kept: dict[tuple[Any, float], tuple[str, ...]] = {}
    for kind, discarded in wanted:
        decision = theirs.get_optimal_checkpointing_policy_per_module(
            found[kind].stats, max(0.0, round(1 - discarded, 4))
        )
        kept[kind, discarded] = tuple(
            name for name, is_kept in zip(found[kind].names, decision, strict=True) if is_kept
        )
    ratios = sorted({discarded for _, discarded in wanted})
    numbers = ground.add(
        [ground.by_kind({kind: Policy(keep=kept.get((kind, ratio), ())) for kind in found}) for ratio in ratios]
    )
    number_of = dict(zip(ratios, numbers, strict=True))
    points = [
        None
        if decisions is None
        else ground.point(_ratios(decisions), [number_of[decisions[u]] if u in decisions else OFF for u in units])
        for decisions in chosen
    ]
    uses = Counter(ratio for decisions in chosen if decisions for ratio in decisions.values() if ratio < 1)
    commonest = max(uses, key=lambda ratio: uses[ratio], default=None)
    facts = {
        "solver_s": SOLVER_S,
        "outputs_bytes": {str(n): sac.tradeoff.sac_memory for n, sac in enumerate(found.values())},
        "slopes": [sac.tradeoff.slopes for sac in found.values()],
        "intercepts": [sac.tradeoff.intercepts for sac in found.values()],
        "discarded": ratios,
        "kept": {str(ratio): kept[kind, ratio] for kind, ratio in wanted if ratio == commonest},
    }
    return points, facts


def _ratios(decisions: Mapping[str, float]) -> str:
    counts = Counter(decisions.values())
    return ", ".join(f"{count} x {ratio:.3f}" for ratio, count in sorted(counts.items()))


def _graph(ground: Ground, found: Mapping[Any, _Sac]) -> Any:
    """The model as sac_ilp sees one, a root and its layers, in our bytes: the peak it computes is `mix.peak`'s.

    Only that of a layer that is recomputed differs, for which it has no term.
    """
    off, full = ground.uniform[OFF], ground.uniform[FULL]
    layers = [f"model.layers.{place}" for place in range(len(ground.layers))]
    through = [ground.layered.through(place, OFF) for place in range(len(layers))]
    total = sum(through)
    empty = {
        "param_per_module": 0,
        "grad_per_module": 0,
        "act_bw_per_module": 0,
        "input_per_module": 0,
        "output_per_module": 0,
        "fw_runtime_per_module": 0.0,
        "bw_runtime_per_module": 0.0,
        "tradeoff_curve": {},
    }
    root = empty | {
        "fqn": "model",
        "param_per_module": off.standing_bytes,
        "grad_total": 0,
        "act_fw_per_module": total,
        "act_grad_per_module": ground.layered.loss,
        "act_total": total,
        "is_leaf": False,
        "sac_runtime": 1.0,
        "sac_memory": total,
        "n_segments": 0,
        "slopes": [],
        "intercepts": [],
        "breakpoints": [],
    }
    stats = [root]
    kept, gradients = 0, ground.layered.loss_left + sum(ground.layered.gradients)
    for place, layer in enumerate(ground.layers):
        kept += through[place]
        gradients -= ground.layered.gradients[place]
        tradeoff = found[ground.fake_model.kinds[layer]].tradeoff
        stats.append(
            empty
            | {
                "fqn": layers[place],
                "grad_total": gradients,
                "act_fw_per_module": through[place] - full.profiles[place].left_bytes,
                "act_grad_per_module": max(0, off.profiles[place].backward_bytes),
                "act_total": kept,
                "is_leaf": False,
                "sac_runtime": tradeoff.sac_runtime,
                "sac_memory": tradeoff.sac_memory,
                "n_segments": tradeoff.n_segments,
                "slopes": tradeoff.slopes,
                "intercepts": tradeoff.intercepts,
                "breakpoints": tradeoff.fit_breaks,
            }
        )
    order = {
        "fw_pre_order": ["model", *layers],
        "bw_pre_order": ["model", *reversed(layers)],
        "fw_post_order": [*layers, "model"],
        "bw_post_order": [*reversed(layers), "model"],
    }
    return ilp_utils.parse_module_info({"mod_order": order, "mod_stats": stats})  # type: ignore[typeddict-item]


# torch._functorch.config.activation_memory_budget


def memory_budget(ground: Ground) -> tuple[list[Point], dict[str, Any]]:
    """The plan in which every layer keeps what the partitioner keeps, for each budget."""
    calls = ground.calls()
    by_kind = {kind: _partitioned(ground, layer, calls[kind]) for kind, layer in ground.examples.items()}
    points, kept = [], {}
    for budget in BUDGETS:
        plan = ground.by_kind({kind: found[budget] for kind, found in by_kind.items()})
        (number,) = ground.add([plan])
        points.append(ground.point(f"{budget:.2f}", [number] * len(ground.layers)))
        kept[f"{budget:.2f}"] = sorted({name for policy in plan.policies for name in policy.keep})
    return points, {"kept": kept}


def _partitioned(ground: Ground, number: int, calls: Sequence[InnerCall]) -> dict[float, Policy]:
    """Budget -> what torch's partitioner keeps of a layer, as a policy."""
    fake_model = ground.fake_model
    layer = fake_model.layers[number]
    given: list[tuple[Any, Any]] = []
    forward = layer.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        return forward(*args, **kwargs)

    layer.forward = noted
    try:
        fake_model.run_forward(ground.on_stage, batch_size=ground.batch, seq_len=ground.seq_len)
    finally:
        del layer.forward
    (args, kwargs), found = given[0], {}
    args = tuple(_fresh(arg) for arg in args)
    kwargs = {name: _fresh(value) for name, value in kwargs.items()}

    def partition(joint: Any, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        names = _names_of(joint, calls)
        for budget in BUDGETS:
            with functorch_config.patch(activation_memory_budget=budget):
                first, _ = min_cut_rematerialization_partition(
                    joint, inputs, num_fwd_outputs=num_fwd_outputs, **options
                )
            saved = first.graph.find_nodes(op="output")[0].args[0][num_fwd_outputs:]
            owners = {owner.name for owner in map(_owner, saved) if owner is not None}
            keep = tuple(sorted({names[name] for name in owners if name in names}))
            found[budget] = Policy(keep=keep, skip=_skipped(calls, keep))
        return default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)

    with ExitStack() as stack:
        stack.enter_context(fake_model.trace_mode.patches())
        stack.enter_context(fake_model.fake)
        if (dtype := PRECISIONS[fake_model.precision][1]) is not None:
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def run(own: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
            filled = list(leaves)
            for place, leaf in zip(places, inputs, strict=True):
                filled[place] = leaf
            args, kwargs = tree_unflatten(filled, spec)
            return functional_call(layer, dict(zip(tensors, own, strict=True)), args, kwargs)

        compiled = aot_function(
            run, fw_compiler=lambda graph, example: graph, partition_fn=partition, decompositions={}
        )
        compiled(list(tensors.values()), [leaves[place] for place in places])
    return found


def _fresh(value: Any) -> Any:
    """A tensor cut off from the graph that made it, and in need of a gradient where it was."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return type(value)(_fresh(each) for each in value) if isinstance(value, (tuple, list)) else value


def _names_of(joint: Any, calls: Sequence[InnerCall]) -> dict[str, str]:
    """Node of the joint graph -> call of the layer's forward pass, told by the order of calls of each operator."""
    forward = Counter(call.name.partition("#")[0] for call in calls)
    counts: Counter[str] = Counter()
    names = {}
    for node in joint.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = operator_name(node.target)
            if counts[name] < forward[name]:
                names[node.name] = f"{name}#{counts[name]}"
            counts[name] += 1
    missing = {name for name, count in forward.items() if counts[name] < count}
    views = {call.name.partition("#")[0] for call in calls if call.is_view}
    if missing - views:
        raise CannotRun(f"its graph lacks calls of {', '.join(sorted(missing - views))} that the layer makes")
    return names


def _owner(node: Any) -> Any:
    """The node whose memory it is; None for what is given to the graph."""
    while node.op == "call_function":
        target = node.target
        is_item = not isinstance(target, torch._ops.OpOverload)
        is_alias = not is_item and any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in target._schema.returns
        )
        if not is_item and not is_alias and operator_name(target) not in ("_unsafe_view", "_reshape_alias"):
            return node
        node = node.args[0]
    return None


def _skipped(calls: Sequence[InnerCall], keep: Sequence[str]) -> tuple[str, ...]:
    """What need not run again, with these outputs kept."""
    kept = {number for number, call in enumerate(calls) if call.name in keep}
    last = max((n for n, call in enumerate(calls) if call.needed), default=-1)
    waiting = [n for n, call in enumerate(calls[: last + 1]) if (call.needed and n not in kept) or call.is_random]
    again: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number not in again:
            again.add(number)
            waiting += [read for read in calls[number].reads if read not in kept]
    return tuple(call.name for n, call in enumerate(calls) if n not in again and n not in kept and not call.is_view)
