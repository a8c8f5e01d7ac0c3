"""`compile` and `compile:BUDGET`: compile each layer with `torch.compile`, which chooses what to recompute."""

from __future__ import annotations

from dataclasses import replace

from gcbench.strategies._base import Change, Kind, Plan


def _parse(argument: str | None) -> Change:
    if argument is None:
        return Change(spec="compile", to=lambda plan: replace(plan, compiled=True), alone="off")
    try:
        budget = float(argument) + 0.0  # -0 is 0
    except ValueError:
        budget = -1.0
    if not 0 <= budget <= 1:
        raise ValueError(f"'compile:{argument}' needs a share of memory from 0 to 1; write it like compile:0.5")

    def to(plan: Plan) -> Plan:
        return replace(plan, compiled=True, memory_budget=budget)

    return Change(spec=f"compile:{budget:g}", to=to, alone="off")


KIND = Kind(
    syntax="compile[:BUDGET]",
    kept="the activations that the compiler's min-cut saves; with a budget, about that share of them",
    recomputed="operators that fuse into the backward pass; with a budget below 1, more (per-layer+compile also "
    "checkpoints)",
    elsewhere="torch.compile of each layer, torch._functorch.config.activation_memory_budget",
    parse=_parse,
)
