"""How many layers get which policy: the fastest choice for each layer whose peak stays within a budget, exactly.

What a layer keeps lies there from its forward to its backward pass, so one layer's choice moves the peaks of all that
come after it in the forward pass. Taken from the last layer to the first, though, a choice for the layers so far comes
down to two numbers: its seconds, and how high it reaches above what the layers before it will have kept. Of two choices
that are alike in these, no choice for the layers before can tell them apart, which makes this a dynamic program
(G. L. Nemhauser and Z. Ullmann, Discrete dynamic programming and capital allocation, Management Science 15, 1969,
494-505). `mix_search` holds the bounds that keep it short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gcbench.plan.layer_mix.dynamic_program import Layer, Search, Way


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One policy for one layer.

    Attributes:
        seconds: extra time per step against keeping everything.
        kept_bytes: what it keeps, alive from its forward to its backward pass.
        forward_bytes: the highest above what stood when its forward pass began.
        backward_bytes: the highest while its backward pass runs, above what stood before its forward pass; what it
            kept counts, gradients of later layers do not.
    """

    seconds: float
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The layers with their options, and what surrounds them; all in bytes.

    Attributes:
        options: for each layer, in the order in which they run.
        gradient_bytes: for each layer, what its backward pass leaves behind (the gradients of its parameters).
        standing_bytes: alive before the first layer's forward pass begins.
        head_bytes: the highest between the last layer's forward and backward pass, above standing and all that is kept.
        loss_left_bytes: alive when the last layer's backward pass begins, above the same (the head's gradients).
        other_peak_bytes: the step's highest outside of all this, whatever the choice (the optimizer's step).
        budget_bytes: what the peak may reach.
    """

    options: tuple[tuple[Option, ...], ...]
    gradient_bytes: tuple[int, ...]
    standing_bytes: int
    head_bytes: int
    loss_left_bytes: int
    other_peak_bytes: int
    budget_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """A choice for all layers.

    Attributes:
        choice: for each layer, the number of its option.
        seconds: extra time per step against keeping everything.
        peak_bytes: the highest of the step.
        unproven_seconds: no choice within the budget is faster by more than this; 0.0 where this one is the fastest.
    """

    choice: tuple[int, ...]
    seconds: float
    peak_bytes: int
    unproven_seconds: float = 0.0


def _needs(problem: Problem) -> list[list[int]]:
    """For each option of each layer: the peak of its own forward and backward pass, had the layers before kept nothing.

    What those before have kept comes on top of both alike, which is what makes a single number of them.
    """
    found: list[list[int]] = []
    later_gradients = 0
    for options, gradient in zip(reversed(problem.options), reversed(problem.gradient_bytes), strict=True):
        above = problem.loss_left_bytes + later_gradients
        found.append([problem.standing_bytes + max(o.forward_bytes, above + o.backward_bytes) for o in options])
        later_gradients += gradient
    return found[::-1]


def peak(problem: Problem, choice: Sequence[int]) -> int:
    """The highest of the step, in bytes, with this option for each layer."""
    highest, kept = problem.other_peak_bytes, 0
    for options, need, number in zip(problem.options, _needs(problem), choice, strict=True):
        highest = max(highest, kept + need[number])
        kept += options[number].kept_bytes
    return max(highest, problem.standing_bytes + kept + problem.head_bytes)


def lowest_peak(problem: Problem) -> int:
    """The lowest peak that any choice has, in bytes, whatever the budget.

    From the last layer to the first: how high the layers from here on reach at least, above what those before keep.
    """
    reach = problem.standing_bytes + problem.head_bytes
    for options, need in zip(reversed(problem.options), reversed(_needs(problem)), strict=True):
        reach = min(max(own, option.kept_bytes + reach) for option, own in zip(options, need, strict=True))
    return max(reach, problem.other_peak_bytes)


def smallest(problem: Problem) -> Mix:
    """The fastest choice of those with the lowest peak, whatever the budget."""
    found = solve(replace(problem, budget_bytes=lowest_peak(problem)))
    assert found is not None
    return found


def solve(problem: Problem) -> Mix | None:
    """The fastest choice within the budget; None when nothing fits.

    Of choices that are as fast it takes one with the lowest peak, and then tidies it: among layers with the same
    options those that keep most come last, since their memory is given back first in the backward pass, wherever that
    order fits the budget too.
    """
    return frontier(problem, (problem.budget_bytes,))[0]


def frontier(problem: Problem, budgets_bytes: Sequence[int]) -> tuple[Mix | None, ...]:
    """What `solve` finds for each of these budgets in place of the problem's own, with the work shared."""
    lowest = lowest_peak(problem)
    rising = sorted({budget for budget in budgets_bytes if budget >= lowest})
    search = _search(problem)
    ways: dict[int, Way] = {}

    def look(number: int, start: Way | None) -> Way:
        way = search.fastest(rising[number], start=start)
        assert way is not None  # the lowest peak is within the budget
        return ways.setdefault(rising[number], way)

    def fill(low: int, high: int) -> None:
        """Find the ways strictly between two budgets; what is best at both ends is best in between."""
        at_low, at_high = ways[rising[low]], ways[rising[high]]
        if at_low.choice == at_high.choice:
            ways.update(dict.fromkeys(rising[low + 1 : high], at_high))
        elif high - low > 1:
            middle = (low + high) // 2
            look(middle, at_low)
            fill(low, middle)
            fill(middle, high)

    if rising:
        first = look(0, None)
        if len(rising) > 1:
            look(len(rising) - 1, first)
            fill(0, len(rising) - 1)
    mixes = {budget: _mix(problem, way, budget) for budget, way in ways.items()}
    return tuple(mixes.get(budget) for budget in budgets_bytes)


def _search(problem: Problem) -> Search:
    layers = [
        Layer(
            seconds=tuple(option.seconds for option in options),
            kept_bytes=tuple(option.kept_bytes for option in options),
            needs_bytes=tuple(need),
        )
        for options, need in zip(problem.options, _needs(problem), strict=True)
    ]
    return Search(layers, after_bytes=problem.standing_bytes + problem.head_bytes)


def _mix(problem: Problem, way: Way, budget: int) -> Mix:
    tidy = _tidied(problem, way.choice, budget)
    return Mix(
        choice=tidy,
        seconds=math.fsum(options[number].seconds for options, number in zip(problem.options, tidy, strict=True)),
        peak_bytes=peak(problem, tidy),
        unproven_seconds=way.unproven_seconds,
    )


def _tidied(problem: Problem, choice: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """The same options, in blocks: for each kind of layers by rising kept bytes, else by falling, else as they are.

    Rising where all kinds can be put so at once, else kind by kind.
    """
    kinds: dict[tuple[Option, ...], list[int]] = {}
    for layer, options in enumerate(problem.options):
        kinds.setdefault(options, []).append(layer)

    def ordered(choice: tuple[int, ...], kind: tuple[Option, ...], falling: bool) -> tuple[int, ...]:
        layers, changed = kinds[kind], list(choice)
        numbers = sorted((choice[layer] for layer in layers), key=lambda n: (kind[n].kept_bytes, n), reverse=falling)
        for layer, number in zip(layers, numbers, strict=True):
            changed[layer] = number
        return tuple(changed)

    tidy = choice
    for kind in kinds:
        tidy = ordered(tidy, kind, False)
    if peak(problem, tidy) <= budget:
        return tidy
    tidy = choice
    for kind in kinds:
        for falling in (False, True):
            changed = ordered(tidy, kind, falling)
            if peak(problem, changed) <= budget:
                tidy = changed
                break
    return tidy
