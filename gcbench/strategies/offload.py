"""`offload`: what checkpointed layers keep goes to pinned host memory until the backward pass needs it."""

from __future__ import annotations

from gcbench.strategies._base import Change, Kind


def _parse(argument: str | None) -> Change:
    if argument is not None:
        raise ValueError(f"'offload:{argument}' names no layers; join it to a choice, like every:2+offload")
    return Change(spec="offload", to=lambda plan: plan.with_policies(offload=True))


KIND = Kind(
    syntax="offload[:LAYERS]",
    kept="each layer's input, in the host's memory (offload:every:2 and every:2+offload take a choice of layers)",
    recomputed="every layer, on its own, after its input has come back",
    elsewhere="transformers offload=True (5.17), torch save_on_cpu, Unsloth 'offloaded' checkpointing",
    parse=_parse,
)
