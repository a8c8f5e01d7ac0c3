"""`first:N`: exactly N layers, the first N layers."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, Strategy, check_depth, number, singles


def _parse(argument: str | None) -> Strategy:
    count = number("first", argument, example="first:8")

    def plan_for(num_layers: int) -> Plan:
        check_depth(f"first:{count}", count, num_layers, take="a number from")
        return Plan(num_layers=num_layers, groups=singles(range(count)))

    return Strategy(spec=f"first:{count}", plan_for=plan_for, counts_run=True)


KIND = Kind(
    syntax="first:N",
    kept="the inputs of the first N layers; everything in the others",
    recomputed="the first N layers, each on its own (any share of the layers, where a stride has 100 %, 50 %, 33 %, …)",
    elsewhere="Megatron 'block' with N layers",
    parse=_parse,
)
