"""Resolve a strategy into the plan for a model, and report why a model or device does not support it."""

from __future__ import annotations

from dataclasses import replace

from gcbench.core.records import ModelFacts
from gcbench.strategies import Plan, Strategy


def plan_of(strategy: Strategy, facts: ModelFacts) -> Plan:
    """Return the plan that a strategy makes for a model; raises ValueError when the model is too shallow for it."""
    if strategy.is_own and facts.own_groups is not None:
        return replace(strategy.plan_for(facts.num_layers), groups=facts.own_groups)
    order = facts.layers_in_order
    if not strategy.counts_run or order is None:
        return strategy.plan_for(facts.num_layers)
    return strategy.plan_for(len(order)).renumbered(order, facts.num_layers)


def not_for(plan: Plan, facts: ModelFacts) -> str | None:
    """Return why a model does not support a plan, with the remedy; None when it does, or supports none at all."""
    if plan.groups and not plan.own:
        return facts.only_own
    if plan.own and not plan.groups and facts.num_layers:
        return "the model's own flag for checkpointing has no effect: no layer is recomputed; use off"
    return None


def unsupported(plan: Plan, kind: str, *, is_predicted: bool = False) -> str | None:
    """Return why a kind of device does not support a plan, with the remedy; None when it does."""
    if plan.any_policy("offload") and kind == "cpu":
        return "offload moves layer inputs to host memory, and on a CPU they are there already; leave it out"
    if is_predicted and plan.compiled:
        how = "gcbench run, on a card or with --emulate" if kind == "cuda" else "gcbench run"
        return f"which activations a compiler saves is known only after it has compiled; measure it with {how}"
    return None
