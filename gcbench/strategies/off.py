"""`off`: no checkpointing, the reference that every other strategy is compared with."""

from gcbench.strategies._base import Kind, Plan, without_argument

KIND = Kind(
    syntax="off",
    kept="all activations of every layer",
    recomputed="nothing",
    elsewhere="the default of every trainer",
    parse=without_argument("off", lambda num_layers: Plan(num_layers=num_layers)),
)
