"""`segment:K`: checkpoint groups of K consecutive layers, each recomputed as one."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, Strategy, check_depth, number


def _parse(argument: str | None) -> Strategy:
    size = number("segment", argument, example="segment:4")

    def plan_for(num_layers: int) -> Plan:
        check_depth(f"segment:{size}", size, num_layers, use="groups of")
        starts = range(0, num_layers, size)
        groups = tuple(tuple(range(start, min(start + size, num_layers))) for start in starts)
        return Plan(num_layers=num_layers, groups=groups)

    return Strategy(spec=f"segment:{size}", plan_for=plan_for, counts_run=True)


KIND = Kind(
    syntax="segment:K",
    kept="the input of each group of K consecutive layers",
    recomputed="every group as one, with the activations of all K layers in memory at once (for most models worse than "
    "per-layer)",
    elsewhere="Megatron 'uniform' with K layers, torch checkpoint_sequential, Chen et al. 2016",
    parse=_parse,
)
