"""`per-layer`: checkpoint every layer separately, saving only its input."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, singles, without_argument

KIND = Kind(
    syntax="per-layer",
    kept="each layer's input",
    recomputed="every layer, one at a time",
    elsewhere="transformers activation_checkpointing=True (gradient_checkpointing before 5.23), "
    "torchtitan 'full', Megatron 'uniform' with 1 layer",
    parse=without_argument(
        "per-layer", lambda num_layers: Plan(num_layers=num_layers, groups=singles(range(num_layers)))
    ),
)
