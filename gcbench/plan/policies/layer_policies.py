"""The useful policies of a model: which outputs each kind of layer saves, and which calls need not run again then."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from gcbench.plan.policies.layer_calls import InnerCall, inner_calls
from gcbench.plan.policies.min_cut import Call, fewer, frontier
from gcbench.simulate.costs import Figures
from gcbench.simulate.trace.fake_model import FakeModel
from gcbench.strategies import Plan, Policy

_BATCH_SIZE = 4
"""Batch size at which calls are compared: the times and bytes that matter all grow in proportion to it."""
_AT_ONCE = 0.002
"""As a fraction of the longest recomputation: faster policies are as good as no checkpointing."""


def uniform_plans(
    fake_model: FakeModel, layers: Sequence[int], figures: Figures, *, seq_len: int, most: int
) -> list[Plan]:
    """Plans that give every layer of a kind the same policy: at most `most`, by rising saved bytes and falling time.

    Where a model has several kinds of layers the n-th plan gives each its n-th policy. Raises NotComposable where
    layers cannot be traced one by one, and what the model's own code raises.
    """
    kinds = {layer: fake_model.kinds[layer] for layer in layers}
    examples: dict[Hashable, int] = {}
    for layer in layers[1:] or layers:
        examples.setdefault(kinds[layer], layer)
    examples.setdefault(kinds[layers[0]], layers[0])
    traced = sorted({*examples.values(), layers[0], layers[-1]})
    calls = inner_calls(fake_model, traced, batch_size=_BATCH_SIZE, seq_len=seq_len)
    by_kind = {kind: _policies(calls[layer], figures, most) for kind, layer in examples.items()}
    chosen = {layer: by_kind[kinds[layer]] for layer in layers}
    # The first and last layer may call other operators than their kind, in another dtype for example.
    for layer in (layers[0], layers[-1]):
        if _relevant(calls[layer]) != _relevant(calls[examples[kinds[layer]]]):
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


def _relevant(calls: Sequence[InnerCall]) -> list[Hashable]:
    """The facts about a layer's calls on which its policies depend."""
    return [(call.name, call.work.nbytes, call.nbytes, call.reads, call.needed, call.is_changed) for call in calls]


def weighed(calls: Sequence[InnerCall], figures: Figures) -> list[Call]:
    """The calls of a layer with their times, as input of `min_cut`."""
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
    """The policies of one kind of layer, without the one that saves and skips nothing."""
    timed = weighed(calls, figures)
    last = max((number for number, call in enumerate(calls) if call.needed), default=-1)
    found = []
    corners = frontier(timed)
    for choice in fewer(corners, most + 2):
        if choice.seconds <= _AT_ONCE * corners[0].seconds:
            continue  # as fast as no checkpointing, which saves no more
        # Views cost nothing, and are skipped with what they are views of.
        idle = [number for number in _idle(timed, choice.keep, last) if not calls[number].is_view]
        if choice.keep or any(number < last for number in idle):
            found.append(Policy(keep=_names(calls, choice.keep), skip=_names(calls, idle)))
    return found or [Policy()]


def _idle(calls: Sequence[Call], keep: Sequence[int], last: int) -> list[int]:
    """The calls that need not run again with these outputs saved.

    `last` is the last call of which the backward pass reads an output.
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
