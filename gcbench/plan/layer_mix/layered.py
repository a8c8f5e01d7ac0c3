"""A step as layers with options: the peak and time of a choice, and the fastest choice within a budget.

`problem` has one number for what a layer saves. Under autocast there are two: it caches a weight that it cast
until the forward pass ends, whether or not the layer is recomputed, and after that only what the backward pass needs
stays. `Layered.peak` counts both. For `problem` the number of layers whose cast weights are freed after the forward
pass is guessed, and the guess corrected by the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from gcbench.plan.estimate.layer_profile import StepProfile
from gcbench.plan.layer_mix import problem as problems
from gcbench.plan.layer_mix.problem import Option, Problem, Solution

_MOST_GUESSES = 4
_PARTS = 8
"""For the lowest peak, guesses are multiples of one part in this many of all layers."""


class Layered:
    """The uniform profiles of one step, which are the options of every layer; the first checkpoints nothing."""

    def __init__(self, profiles: Sequence[StepProfile], *, own: int | None = None) -> None:
        """`own` limits the profiles that bound the rest of the step to the first so many; None for all."""
        self.profiles = tuple(profiles)
        self._own = self.profiles[:own]
        self.layers = self.profiles[0].layers
        # Where nothing is recomputed, all that a forward pass leaves stays until the backward pass.
        self.gradients = tuple(layer.left_bytes - layer.freed_bytes for layer in self.profiles[0].profiles)

    def through(self, place: int, option: int) -> int:
        """Bytes that a layer saves from its forward to its backward pass."""
        return self.profiles[option].profiles[place].freed_bytes + self.gradients[place]

    def seconds(self, choice: Sequence[int]) -> float:
        """The extra time of a choice over checkpointing nothing."""
        off = self.profiles[0].profiles
        return sum(self.profiles[n].profiles[place].seconds - off[place].seconds for place, n in enumerate(choice))

    def peak(self, choice: Sequence[int]) -> int:
        """The peak of the step in bytes, with this option for each layer."""
        off = self.profiles[0]
        highest, left = off.other_bytes, off.standing_bytes
        for place, number in enumerate(choice):
            layer = self.profiles[number].profiles[place]
            highest = max(highest, left + layer.forward_bytes)
            left += layer.left_bytes
        highest = max(highest, left + self.head)
        allocated = off.standing_bytes + sum(self.through(place, n) for place, n in enumerate(choice))
        highest = max(highest, allocated + self.loss)
        allocated += self.loss_left
        for place in reversed(range(len(choice))):
            layer = self.profiles[choice[place]].profiles[place]
            highest = max(highest, allocated + layer.backward_bytes)
            allocated -= layer.freed_bytes
        return highest

    @cached_property
    def head(self) -> int:
        """Peak of the head's forward pass, above what is allocated before the layers and what these left."""
        return max(
            each.head_bytes - each.standing_bytes - sum(layer.left_bytes for layer in each.profiles)
            for each in self._own
        )

    @cached_property
    def loss(self) -> int:
        """Peak of the head's backward pass, above what is allocated before the layers and what these save."""
        return max(self._above(option, each.loss_bytes) for option, each in enumerate(self._own))

    @cached_property
    def loss_left(self) -> int:
        """Allocated when the last layer's backward pass begins, above the same."""
        return max(self._above(option, each.before_backward_bytes) for option, each in enumerate(self._own))

    def _above(self, option: int, nbytes: int) -> int:
        saved = sum(self.through(place, option) for place in range(len(self.layers)))
        return nbytes - self.profiles[option].standing_bytes - saved

    # Choices.

    def fastest(self, budget: int, *, num_options: int | None = None) -> Solution | None:
        """The fastest choice among the first `num_options` with a peak within the budget; None where none is found."""
        best = self._fastest_uniform(budget, num_options)
        guess = len(self.layers)
        for _ in range(_MOST_GUESSES):
            found = problems.solve(replace(self.problem(guess, num_options=num_options), budget_bytes=budget))
            if found is None:
                ended = guess // 2
            else:
                found = replace(found, peak_bytes=self.peak(found.choice))
                if found.peak_bytes <= budget and (best is None or found.seconds < best.seconds):
                    best = found
                ended = sum(self._ended(place, option) > 0 for place, option in enumerate(found.choice))
            if ended >= guess:
                break
            guess = ended
        return best

    def _fastest_uniform(self, budget: int, num_options: int | None) -> Solution | None:
        """The fastest uniform choice within the budget."""
        best: Solution | None = None
        for option in range(len(self._own) if num_options is None else num_options):
            choice = (option,) * len(self.layers)
            peak, seconds = self.peak(choice), self.seconds(choice)
            if peak <= budget and (best is None or seconds < best.seconds):
                best = Solution(choice=choice, seconds=seconds, peak_bytes=peak)
        return best

    def smallest(self, *, num_options: int | None = None) -> Solution:
        """The choice among the first `num_options` with the lowest peak."""
        count = len(self.layers)
        guesses = {round(count * part / _PARTS) for part in range(_PARTS + 1)} if any(self.casts) else {0}
        found = [problems.smallest(self.problem(guess, num_options=num_options)) for guess in sorted(guesses)]
        return min((replace(one, peak_bytes=self.peak(one.choice)) for one in found), key=lambda one: one.peak_bytes)

    def _ended(self, place: int, option: int) -> int:
        """Bytes that a layer leaves and does not save: weights that autocast has cast."""
        return self.profiles[option].profiles[place].left_bytes - self.through(place, option)

    @cached_property
    def casts(self) -> tuple[int, ...]:
        """For each layer, the most of these bytes with any option."""
        return tuple(
            max(self._ended(place, option) for option in range(len(self._own))) for place in range(len(self.layers))
        )

    def problem(self, guess: int, *, num_options: int | None = None) -> Problem:
        """The problem to solve, where `guess` of the layers before each have left their cast weights."""
        off = self.profiles[0]
        used = range(len(self._own) if num_options is None else num_options)
        ended = [sum(sorted(self.casts[:place], reverse=True)[:guess]) for place in range(len(self.layers) + 1)]
        return Problem(
            options=tuple(
                tuple(
                    Option(
                        seconds=self.profiles[n].profiles[place].seconds - off.profiles[place].seconds,
                        kept_bytes=self.through(place, n),
                        forward_bytes=ended[place] + self.profiles[n].profiles[place].forward_bytes,
                        backward_bytes=self.profiles[n].profiles[place].backward_bytes + self.through(place, n),
                    )
                    for n in used
                )
                for place in range(len(self.layers))
            ),
            gradient_bytes=self.gradients,
            standing_bytes=off.standing_bytes,
            head_bytes=max(self.loss, self.head + ended[-1]),
            loss_left_bytes=self.loss_left,
            other_peak_bytes=off.other_bytes,
            budget_bytes=0,
        )
