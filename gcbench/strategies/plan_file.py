"""`plan:FILE.json`: read any plan, hand-written or made by another program, from a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gcbench.core.units import counted
from gcbench.strategies._base import Kind, Plan, Policy, Strategy

_EXAMPLE = '{"groups": [{"layers": [0, 1]}, {"layers": [2], "keep": ["mm"]}]}'
_GROUP = {"layers", "keep", "skip", "offload", "reentrant"}
_TOP = {"num_layers", "groups", "compiled", "memory_budget", "own"}


def read(path: Path) -> tuple[str, Plan]:
    """Return the text of a plan file and its plan (for the number of layers it names, or the fewest it needs).

    Raises ValueError with the mistake and its remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        why = getattr(err, "strerror", None) or "it is not text"
        raise ValueError(f"plan file {path} cannot be read ({why}); give the path of a JSON file") from None
    try:
        return text, of_json(json.loads(text))
    except json.JSONDecodeError as err:
        raise ValueError(f"plan file {path} is not JSON ({err}); write it like {_EXAMPLE}") from None
    except RecursionError:
        raise ValueError(f"plan file {path} is nested too deep; write it like {_EXAMPLE}") from None
    except ValueError as err:
        raise ValueError(f"plan file {path}: {err}") from None


def of_json(value: object) -> Plan:
    """Return the plan that a JSON document describes; raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("groups", []), list):
        raise ValueError(f"a plan is an object with a list of groups; write it like {_EXAMPLE}")
    _known(value, _TOP, "a plan")
    groups, policies = [], []
    for group in value.get("groups", []):
        if not isinstance(group, dict):
            raise ValueError(f"{group!r} is not a group; write it like {_EXAMPLE}")
        _known(group, _GROUP, "a group")
        layers = group.get("layers")
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ValueError(f"layers {layers!r} is not a list of numbers; write it like [0, 1]")
        groups.append(tuple(layers))
        policies.append(
            Policy(
                keep=_operators(group, "keep"),
                skip=_operators(group, "skip"),
                offload=_flag(group, "offload"),
                reentrant=_flag(group, "reentrant"),
            )
        )
    deepest = max((layer for group in groups for layer in group), default=-1) + 1
    num_layers, budget = value.get("num_layers", deepest), value.get("memory_budget")
    if type(num_layers) is not int or num_layers < 0:
        raise ValueError(f"num_layers {num_layers!r} is not a number of layers; write it like 32, or leave it out")
    if budget is not None and (type(budget) not in (int, float) or not 0 <= budget <= 1):
        raise ValueError(f"memory_budget {budget!r} is not a share of memory; write one from 0 to 1")
    return Plan(
        num_layers=num_layers,
        groups=tuple(groups),
        policies=tuple(policies) if any(policy != Policy() for policy in policies) else (),
        compiled=_flag(value, "compiled"),
        memory_budget=budget,
        own=_flag(value, "own"),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the document that `of_json` reads back as the plan."""
    groups = []
    for layers, policy in plan.treated():
        group: dict[str, Any] = {"layers": list(layers)}
        group |= {name: list(ops) for name in ("keep", "skip") if (ops := getattr(policy, name))}
        groups.append(group | {name: True for name in ("offload", "reentrant") if getattr(policy, name)})
    document: dict[str, Any] = {"num_layers": plan.num_layers, "groups": groups}
    document |= {name: True for name in ("compiled", "own") if getattr(plan, name)}
    return document if plan.memory_budget is None else document | {"memory_budget": plan.memory_budget}


def _known(value: dict[str, Any], legal: set[str], what: str) -> None:
    unknown = sorted(set(value) - legal)
    if unknown:
        raise ValueError(f"{what} has no field {unknown[0]!r}; legal are {', '.join(sorted(legal))}")


def _operators(group: dict[str, Any], field: str) -> tuple[str, ...]:
    names = group.get(field, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} {names!r} is not a list of operators; write it like ['mm']")
    return tuple(names)


def _flag(value: dict[str, Any], name: str) -> bool:
    flag = value.get(name, False)
    if not isinstance(flag, bool):
        raise ValueError(f"{name} {flag!r} is neither true nor false; write one of them")
    return flag


def _parse(argument: str | None) -> Strategy:
    if not argument:
        raise ValueError("'plan' needs a file; write it like plan:my-plan.json")
    text, stored = read(Path(argument))
    operators = tuple(dict.fromkeys(name for policy in stored.policies for name in (*policy.keep, *policy.skip)))
    named = "num_layers" in json.loads(text)

    def plan_for(num_layers: int) -> Plan:
        if (named and stored.num_layers != num_layers) or stored.num_layers > num_layers:
            raise ValueError(
                f"plan:{argument} is for {counted(stored.num_layers, 'layer')} and the model has {num_layers}; change "
                "its num_layers and groups"
            )
        return Plan(
            num_layers=num_layers,
            groups=stored.groups,
            policies=stored.policies,
            compiled=stored.compiled,
            memory_budget=stored.memory_budget,
            own=stored.own,
        )

    return Strategy(spec=f"plan:{argument}", plan_for=plan_for, counts_run=True, content=text, operators=operators)


KIND = Kind(
    syntax="plan:FILE.json",
    kept="the layer inputs, and the outputs of the operators that the file names",
    recomputed="the groups in the file, each with its own policy; layers are numbered in the order in which they run",
    elsewhere="none (only in gcbench)",
    parse=_parse,
)
