"""`reentrant`: torch's old variant of checkpointing (use_reentrant=True), for comparison."""

from __future__ import annotations

from gcbench.strategies._base import Change, Kind


def _parse(argument: str | None) -> Change:
    if argument is not None:
        raise ValueError(f"strategy 'reentrant' takes no argument; combine it with a choice, like {argument}+reentrant")
    return Change(spec="reentrant", to=lambda plan: plan.with_policies(reentrant=True))


KIND = Kind(
    syntax="reentrant",
    kept="each layer's input",
    recomputed="every layer, in a nested backward pass of its own; layer inputs must require gradients",
    elsewhere="torch use_reentrant=True, the default of transformers 4",
    parse=_parse,
)
