"""What a strategy becomes for a model, and why a model or a device cannot have it."""

from __future__ import annotations

from dataclasses import replace

from gcbench.core.records import ModelFacts
from gcbench.strategies import Plan, Strategy


def plan_of(strategy: Strategy, facts: ModelFacts) -> Plan:
    """What a strategy becomes for a model; raises ValueError when it cannot be had for it."""
    if strategy.is_own and facts.own_groups is not None:
        return replace(strategy.plan_for(facts.num_layers), groups=facts.own_groups)
    order = facts.layers_in_order
    if not strategy.counts_run or order is None:
        return strategy.plan_for(facts.num_layers)
    return strategy.plan_for(len(order)).renumbered(order, facts.num_layers)


def not_for(plan: Plan, facts: ModelFacts) -> str | None:
    """Why a model cannot have a plan, with what to do; None when it can, or can have none at all."""
    if plan.groups and not plan.own:
        return facts.only_own
    if plan.own and not plan.groups and facts.num_layers:
        return "the model's own flag for checkpointing changes nothing: no layer runs again; take off"
    return None


def unsupported(plan: Plan, kind: str, *, is_predicted: bool = False) -> str | None:
    """Why a plan cannot be had on a kind of device, with what to do; None when it can."""
    if plan.any_policy("offload") and kind == "cpu":
        return "offload moves what layers keep to the host's memory, and on a CPU it is there already; leave it out"
    if is_predicted and plan.compiled:
        return "what a compiler keeps is known once it has compiled; measure it with gcbench run"
    return None
