"""`last:N`: checkpoint exactly the last N layers."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, Strategy, check_depth, number, singles


def _parse(argument: str | None) -> Strategy:
    count = number("last", argument, example="last:8")

    def plan_for(num_layers: int) -> Plan:
        check_depth(f"last:{count}", count, num_layers, use="a number from")
        return Plan(num_layers=num_layers, groups=singles(range(num_layers - count, num_layers)))

    return Strategy(spec=f"last:{count}", plan_for=plan_for, counts_run=True)


KIND = Kind(
    syntax="last:N",
    kept="the inputs of the last N layers; all activations of the others",
    recomputed="the last N layers, one at a time (any share of the layers; every:K allows only 100 %, 50 %, 33 %, …)",
    elsewhere="none (the mirror image of first:N)",
    parse=_parse,
)
