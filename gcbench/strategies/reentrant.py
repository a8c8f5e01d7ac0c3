"""`reentrant`: torch's old variant of checkpointing, to show what it does."""

from __future__ import annotations

from gcbench.strategies._base import Change, Kind


def _parse(argument: str | None) -> Change:
    if argument is not None:
        raise ValueError(f"strategy 'reentrant' takes no argument; join it to a choice, like {argument}+reentrant")
    return Change(spec="reentrant", to=lambda plan: plan.with_policies(reentrant=True))


KIND = Kind(
    syntax="reentrant",
    kept="each layer's input",
    recomputed="every layer, by a backward pass of its own inside the backward pass; inputs must ask for gradients",
    elsewhere="torch use_reentrant=True, the default of transformers 4",
    parse=_parse,
)
