"""`per-layer`: every layer recomputed on its own, keeping only its input."""

from gcbench.strategies._base import Kind, Plan, without_argument


def _plan(num_layers: int) -> Plan:
    return Plan(num_layers=num_layers, groups=tuple((layer,) for layer in range(num_layers)))


KIND = Kind(
    syntax="per-layer",
    kept="each layer's input",
    recomputed="every layer, on its own",
    elsewhere="transformers activation_checkpointing=True (gradient_checkpointing before 5.23), "
    "torchtitan 'full', Megatron 'uniform' with 1 layer",
    parse=without_argument("per-layer", _plan),
)
