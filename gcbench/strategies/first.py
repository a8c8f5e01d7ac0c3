"""`first:N`: checkpoint exactly the first N layers."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, Strategy, check_depth, number, singles


def _parse(argument: str | None) -> Strategy:
    count = number("first", argument, example="first:8")

    def plan_for(num_layers: int) -> Plan:
        check_depth(f"first:{count}", count, num_layers, use="a number from")
        return Plan(num_layers=num_layers, groups=singles(range(count)))

    return Strategy(spec=f"first:{count}", plan_for=plan_for, counts_run=True)


KIND = Kind(
    syntax="first:N",
    kept="the inputs of the first N layers; all activations of the others",
    recomputed="the first N layers, one at a time (any share of the layers; every:K allows only 100 %, 50 %, 33 %, …)",
    elsewhere="Megatron 'block' with N layers",
    parse=_parse,
)
