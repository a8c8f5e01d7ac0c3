"""`off`: no checkpointing, the reference for everything else."""

from gcbench.strategies._base import Kind, Plan, without_argument

KIND = Kind(
    syntax="off",
    kept="every layer's activations",
    recomputed="nothing",
    elsewhere="the default of every trainer",
    parse=without_argument("off", lambda num_layers: Plan(num_layers=num_layers)),
)
