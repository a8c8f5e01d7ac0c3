"""Chooses an option for each layer, exactly: the fastest choice whose peak is within a budget.

What a layer saves stays allocated from its forward to its backward pass, so its choice moves the peaks of all layers
that come after it in the forward pass. From the last layer to the first, though, a choice for the layers so far reduces
to two numbers: its seconds, and its peak above what the layers before will have saved. Choices equal in both are
interchangeable for any choice of the layers before, which makes this a dynamic program (G. L. Nemhauser and Z. Ullmann,
Discrete dynamic programming and capital allocation, Management Science 15, 1969, 494-505). `dynamic_program` has the
search and its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gcbench.plan.layer_mix.dynamic_program import Assignment, Layer, Search


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One policy for one layer.

    Attributes:
        seconds: extra time per step over saving everything.
        kept_bytes: what it saves, allocated from its forward to its backward pass.
        forward_bytes: peak of its forward pass, above what is allocated when that begins.
        backward_bytes: peak of its backward pass, above what is allocated when its forward pass begins; includes what
            it saved, excludes gradients of later layers.
    """

    seconds: float
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The layers with their options, and the rest of the step; all in bytes.

    Attributes:
        options: for each layer, in the order in which they run.
        gradient_bytes: for each layer, what its backward pass leaves allocated (the gradients of its parameters).
        standing_bytes: allocated before the first layer's forward pass.
        head_bytes: peak between the last layer's forward and backward pass, above `standing_bytes` and all that is
            saved.
        loss_left_bytes: allocated when the last layer's backward pass begins, above the same (the head's gradients).
        other_peak_bytes: peak of the rest of the step, whatever the choice (the optimizer's step).
        budget_bytes: the highest peak allowed.
    """

    options: tuple[tuple[Option, ...], ...]
    gradient_bytes: tuple[int, ...]
    standing_bytes: int
    head_bytes: int
    loss_left_bytes: int
    other_peak_bytes: int
    budget_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A choice for all layers.

    Attributes:
        choice: for each layer, the number of its option.
        seconds: extra time per step over saving everything.
        peak_bytes: the peak of the step.
        unproven_seconds: no choice within the budget is faster by more than this; 0.0 where this one is the fastest.
    """

    choice: tuple[int, ...]
    seconds: float
    peak_bytes: int
    unproven_seconds: float = 0.0


def _needs(problem: Problem) -> list[list[int]]:
    """For each option of each layer: the peak of its own forward and backward pass if the layers before save nothing.

    What those save adds equally to both passes, so the higher of the two is enough.
    """
    found: list[list[int]] = []
    later_gradients = 0
    for options, gradient in zip(reversed(problem.options), reversed(problem.gradient_bytes), strict=True):
        above = problem.loss_left_bytes + later_gradients
        found.append([problem.standing_bytes + max(o.forward_bytes, above + o.backward_bytes) for o in options])
        later_gradients += gradient
    return found[::-1]


def peak(problem: Problem, choice: Sequence[int]) -> int:
    """The peak of the step in bytes, with this option for each layer."""
    highest, kept = problem.other_peak_bytes, 0
    for options, need, number in zip(problem.options, _needs(problem), choice, strict=True):
        highest = max(highest, kept + need[number])
        kept += options[number].kept_bytes
    return max(highest, problem.standing_bytes + kept + problem.head_bytes)


def lowest_peak(problem: Problem) -> int:
    """The lowest peak of any choice, in bytes, whatever the budget."""
    # From the last layer to the first: the lowest peak of the layers from here on, above what those before save.
    reach = problem.standing_bytes + problem.head_bytes
    for options, need in zip(reversed(problem.options), reversed(_needs(problem)), strict=True):
        reach = min(max(own, option.kept_bytes + reach) for option, own in zip(options, need, strict=True))
    return max(reach, problem.other_peak_bytes)


def smallest(problem: Problem) -> Solution:
    """The fastest of the choices with the lowest peak, whatever the budget."""
    found = solve(replace(problem, budget_bytes=lowest_peak(problem)))
    assert found is not None
    return found


def solve(problem: Problem) -> Solution | None:
    """The fastest choice within the budget; None when nothing fits.

    Of equally fast choices it has the lowest peak, and is then sorted: among layers with the same options those that
    save most come last, since their memory is freed first in the backward pass, wherever that order fits the budget.
    """
    return frontier(problem, (problem.budget_bytes,))[0]


def frontier(problem: Problem, budgets_bytes: Sequence[int]) -> tuple[Solution | None, ...]:
    """The solutions for each of these budgets in place of the problem's own, with the work shared."""
    lowest = lowest_peak(problem)
    rising = sorted({budget for budget in budgets_bytes if budget >= lowest})
    search = _search(problem)
    found: dict[int, Assignment] = {}

    def look(number: int, start: Assignment | None) -> Assignment:
        assignment = search.fastest(rising[number], start=start)
        assert assignment is not None  # the lowest peak is within the budget
        return found.setdefault(rising[number], assignment)

    def fill(low: int, high: int) -> None:
        """Solve for the budgets strictly between two; what is best at both ends is best in between."""
        at_low, at_high = found[rising[low]], found[rising[high]]
        if at_low.choice == at_high.choice:
            found.update(dict.fromkeys(rising[low + 1 : high], at_high))
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
    solutions = {budget: _solution(problem, assignment, budget) for budget, assignment in found.items()}
    return tuple(solutions.get(budget) for budget in budgets_bytes)


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


def _solution(problem: Problem, assignment: Assignment, budget: int) -> Solution:
    tidy = _tidied(problem, assignment.choice, budget)
    return Solution(
        choice=tidy,
        seconds=math.fsum(options[number].seconds for options, number in zip(problem.options, tidy, strict=True)),
        peak_bytes=peak(problem, tidy),
        unproven_seconds=assignment.unproven_seconds,
    )


def _tidied(problem: Problem, choice: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """The same options sorted for each kind of layer by saved bytes: rising where that fits, else falling or as is.

    All kinds rising at once where that fits, else kind by kind.
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
