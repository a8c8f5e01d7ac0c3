"""The named strategies among the candidates, and the notice on how far predictions are validated. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gcbench.core.errors import UsageError
from gcbench.core.records import ModelFacts
from gcbench.devices.target import CPU, Target
from gcbench.job.resolve import default_strategies
from gcbench.strategies import OWN, Plan, parse
from gcbench.strategies._for_model import not_for, plan_of, unsupported

COMPARED_WITH = (
    "an H100 (torch 2.11, 135 cells: allocated peaks within 0.08 %, reserved ones within 9 %, in the median 0.08 %) "
    "and on other cards emulated alone"
)
"""Figures of `make accuracy`."""


def unconfirmed(target: Target, is_here: bool) -> tuple[str, ...]:
    """Which predictions for a card were compared with measurements, as notices."""
    if target.kind == CPU:
        return ()
    how = "add --measure" if is_here else "run gcbench plan --measure there"
    return (
        f"Memory was compared with measurements on {COMPARED_WITH}; times are estimates from rates and were not "
        f"measured. To confirm both, {how}.",
    )


def named(specs: Sequence[str], facts: ModelFacts, target: Target, *, is_default: bool) -> tuple[tuple[str, Plan], ...]:
    """The strategies with their plans; default ones that the model or target does not support are left out.

    Raises UsageError for any other that is not supported.
    """
    if facts.checkpointing_refusal is not None:
        return (("off", Plan(num_layers=facts.num_layers)),)
    if is_default and facts.only_own is not None:
        specs = default_strategies(facts)
    named: list[tuple[str, Plan]] = []
    for spec in dict.fromkeys(("off", *specs)):
        try:
            found = plan_of(parse(spec), facts)
        except ValueError as err:
            if is_default:
                continue
            raise UsageError(f"--strategies: {err}") from None
        why = not_for(found, facts) or unsupported(found, target.kind, is_predicted=True)
        if why is None:
            named.append((spec, found))
        elif not is_default:
            raise UsageError(f"--strategies {spec}: {why}")
    return tuple(named)


def own_plan(facts: ModelFacts) -> Plan | None:
    """The plan of a model's own checkpointing, where it supports no other; else None."""
    own = None if facts.only_own is None else plan_of(parse(OWN), facts)
    return own if own is not None and not_for(own, facts) is None else None


def in_run_order(plan: Plan, order: Sequence[int] | None) -> Plan:
    """The plan with layers numbered in the order in which they run, as in plan files; the reverse of `renumbered`."""
    if order is None:
        return plan
    place = {layer: number for number, layer in enumerate(order)}
    pairs = [(tuple(place[layer] for layer in group), policy) for group, policy in plan.treated()]
    pairs.sort(key=lambda pair: pair[0])
    return replace(
        plan,
        num_layers=len(order),
        groups=tuple(group for group, _ in pairs),
        policies=tuple(policy for _, policy in pairs) if plan.policies else (),
    )
