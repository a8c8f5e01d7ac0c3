"""`offload`: move the saved inputs of checkpointed layers to pinned host memory until the backward pass needs them."""

from __future__ import annotations

from gcbench.strategies._base import Change, Kind


def _parse(argument: str | None) -> Change:
    if argument is not None:
        raise ValueError(f"'offload:{argument}' names no layers; combine it with a choice, like every:2+offload")
    return Change(spec="offload", to=lambda plan: plan.with_policies(offload=True))


KIND = Kind(
    syntax="offload[:LAYERS]",
    kept="each layer's input, in host memory (offload:every:2 is the same as every:2+offload)",
    recomputed="every layer, one at a time, after its input is copied back",
    elsewhere="transformers offload=True (5.17), torch save_on_cpu, Unsloth 'offloaded' checkpointing",
    parse=_parse,
)
