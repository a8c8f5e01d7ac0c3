"""`every:K`: checkpoint every K-th layer, counted as transformers' `every_n_layers` does."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, Strategy, check_depth, number, singles


def _parse(argument: str | None) -> Strategy:
    stride = number("every", argument, example="every:2")

    def plan_for(num_layers: int) -> Plan:
        check_depth(f"every:{stride}", stride, num_layers, use="a stride from")
        return Plan(num_layers=num_layers, groups=singles(range(0, num_layers, stride)))

    return Strategy(spec=f"every:{stride}", plan_for=plan_for)


KIND = Kind(
    syntax="every:K",
    kept="the inputs of layers 0, K, 2K, …; all activations of the layers between",
    recomputed="layers 0, K, 2K, …, one at a time (a larger K saves less memory and costs less time)",
    elsewhere="transformers every_n_layers=K, torchtitan selective with a layer frequency",
    parse=_parse,
)
