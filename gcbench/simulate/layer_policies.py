"""The policies worth having for a model: which outputs each kind of layer could keep, and what need not run then."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from gcbench.costs import Figures
from gcbench.policies import Call, policies
from gcbench.simulate.inside import InnerCall, inner_calls
from gcbench.simulate.stage import Stage
from gcbench.strategies import Plan, Policy

_BATCH_SIZE = 4
"""At which calls are weighed against each other: times and bytes of all that matters grow with the batch alike."""


def uniform_plans(stage: Stage, layers: Sequence[int], figures: Figures, *, seq_len: int, most: int) -> list[Plan]:
    """Plans in which every layer has one of its policies: from the fewest bytes kept to the least time, at most `most`.

    Where a model has several kinds of layers the n-th plan gives each its n-th policy. Raises NotComposable where
    layers cannot be looked into one by one, and what the model's own code raises.
    """
    kinds = {layer: stage.kinds[layer] for layer in layers}
    examples: dict[Hashable, int] = {}
    for layer in layers[1:] or layers:
        examples.setdefault(kinds[layer], layer)
    examples.setdefault(kinds[layers[0]], layers[0])
    looked_at = sorted({*examples.values(), layers[0], layers[-1]})
    calls = inner_calls(stage, looked_at, batch_size=_BATCH_SIZE, seq_len=seq_len)
    by_kind = {kind: _policies(calls[layer], figures, most) for kind, layer in examples.items()}
    longest = max(map(len, by_kind.values()))
    plans = []
    for number in range(longest):
        chosen = {layer: by_kind[kinds[layer]] for layer in layers}
        plans.append(
            Plan(
                num_layers=len(stage.layers),
                groups=tuple((layer,) for layer in sorted(layers)),
                policies=tuple(chosen[layer][min(number, len(chosen[layer]) - 1)] for layer in sorted(layers)),
            )
        )
    return plans


def _policies(calls: Sequence[InnerCall], figures: Figures, most: int) -> list[Policy]:
    """Those of one kind of layer; the one that keeps nothing and skips nothing is left out."""
    weighed = [
        Call(
            name=call.name,
            seconds=figures.seconds(call.work),
            nbytes=call.nbytes,
            reads=call.reads,
            needed=call.needed,
            can_keep=not (call.is_changed or call.is_random or call.is_view or call.is_in_place),
            must_run=call.is_random,
        )
        for call in calls
    ]
    found = []
    for choice in policies(weighed, most):
        keep = tuple(calls[number].name for number in choice.keep)
        # What only looks at memory another way costs nothing, and follows by itself what it looks at.
        skip = tuple(calls[number].name for number in choice.skip if not calls[number].is_view)
        found.append(Policy(keep=keep, skip=skip))
    return [policy for policy in found if policy != Policy()] or [Policy()]
