"""The policies worth having for a model: which outputs each kind of layer could keep, and what need not run then."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from gcbench.plan.policies.layer_calls import InnerCall, inner_calls
from gcbench.plan.policies.min_cut import Call, fewer, frontier
from gcbench.simulate.costs import Figures
from gcbench.simulate.trace.fake_model import FakeModel
from gcbench.strategies import Plan, Policy

_BATCH_SIZE = 4
"""At which calls are weighed against each other: times and bytes of all that matters grow with the batch alike."""

_AT_ONCE = 0.002
"""Of the time that the policy with the fewest bytes takes to recompute."""


def uniform_plans(
    fake_model: FakeModel, layers: Sequence[int], figures: Figures, *, seq_len: int, most: int
) -> list[Plan]:
    """Plans in which every layer has one of its policies: from the fewest bytes kept to the least time, at most `most`.

    Where a model has several kinds of layers the n-th plan gives each its n-th policy. Raises NotComposable where
    layers cannot be looked into one by one, and what the model's own code raises.
    """
    kinds = {layer: fake_model.kinds[layer] for layer in layers}
    examples: dict[Hashable, int] = {}
    for layer in layers[1:] or layers:
        examples.setdefault(kinds[layer], layer)
    examples.setdefault(kinds[layers[0]], layers[0])
    looked_at = sorted({*examples.values(), layers[0], layers[-1]})
    calls = inner_calls(fake_model, looked_at, batch_size=_BATCH_SIZE, seq_len=seq_len)
    by_kind = {kind: _policies(calls[layer], figures, most) for kind, layer in examples.items()}
    chosen = {layer: by_kind[kinds[layer]] for layer in layers}
    # What is before the first layer or behind the last may have them call other operators, in another dtype say.
    for layer in (layers[0], layers[-1]):
        if _told(calls[layer]) != _told(calls[examples[kinds[layer]]]):
            chosen[layer] = _policies(calls[layer], figures, most)
    plans = []
    for number in range(max(map(len, chosen.values()))):
        plans.append(
            Plan(
                num_layers=len(fake_model.layers),
                groups=tuple((layer,) for layer in sorted(layers)),
                policies=tuple(chosen[layer][min(number, len(chosen[layer]) - 1)] for layer in sorted(layers)),
            )
        )
    return plans


def _told(calls: Sequence[InnerCall]) -> list[Hashable]:
    """What policies are told of a layer's calls."""
    return [(call.name, call.work.nbytes, call.nbytes, call.reads, call.needed, call.is_changed) for call in calls]


def weighed(calls: Sequence[InnerCall], figures: Figures) -> list[Call]:
    """The calls of a layer as policies are chosen from them."""
    return [
        Call(
            name=call.name,
            seconds=figures.seconds(call.work),
            nbytes=call.nbytes,
            reads=call.reads,
            needed=call.needed,
            can_keep=call.can_keep,
            must_run=call.is_random,
        )
        for call in calls
    ]


def _policies(calls: Sequence[InnerCall], figures: Figures, most: int) -> list[Policy]:
    """Those of one kind of layer; the one that keeps nothing and skips nothing is left out."""
    those = weighed(calls, figures)
    last = max((number for number, call in enumerate(calls) if call.needed), default=-1)
    found = []
    corners = frontier(those)
    for choice in fewer(corners, most + 2):
        if choice.seconds <= _AT_ONCE * corners[0].seconds:
            continue  # as fast as recomputing nothing, which keeps no more
        # What only looks at memory another way costs nothing, and follows by itself what it looks at.
        idle = [number for number in _idle(those, choice.keep, last) if not calls[number].is_view]
        if choice.keep or any(number < last for number in idle):
            found.append(Policy(keep=_names(calls, choice.keep), skip=_names(calls, idle)))
    return found or [Policy()]


def _idle(calls: Sequence[Call], keep: Sequence[int], last: int) -> list[int]:
    """What need not run with these outputs kept: up to the last call too, since what is kept is asked for once more.

    `last` is the last call that the backward pass reads an output of.
    """
    waiting = [number for number, call in enumerate(calls) if call.needed and number not in keep]
    waiting += [number for number, call in enumerate(calls[: last + 1]) if call.must_run]
    again: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number not in again:
            again.add(number)
            waiting += [earlier for earlier in calls[number].reads if earlier not in keep]
    return [number for number in range(len(calls)) if number not in again and number not in keep]


def _names(calls: Sequence[InnerCall], numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(calls[number].name for number in numbers)
