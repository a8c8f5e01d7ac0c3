"""A step as layers, each with its options: what a choice for them holds and takes, and the fastest within a budget.

`mix` has one number for what a layer keeps. Under autocast there are two: a weight that was cast lies in autocast's
cache until the forward pass ends, whether or not the layer is recomputed, and beyond that only where the backward pass
needs it. `Layered.peak` counts both. For `mix` the number of layers whose cast weights end with the forward pass is
guessed, and the guess put right by what it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from gcbench.plan.estimate.layer_profile import StepProfile
from gcbench.plan.layer_mix import problem as mix
from gcbench.plan.layer_mix.problem import Mix, Option, Problem

_MOST_GUESSES = 4
_PARTS = 8
"""Of all layers, whose sums are tried as guesses for the lowest peak."""


class Layered:
    """The same step with its layers treated in each of several ways; the first recomputes nothing."""

    def __init__(self, profiles: Sequence[StepProfile], *, own: int | None = None) -> None:
        """`own` is the number of ways, from the first on, of which the rest of the step is known; all if not given."""
        self.profiles = tuple(profiles)
        self._own = self.profiles[:own]
        self.layers = self.profiles[0].layers
        # Where nothing is recomputed, all that a forward pass leaves is there for the backward pass.
        self.gradients = tuple(layer.left_bytes - layer.freed_bytes for layer in self.profiles[0].profiles)

    def through(self, place: int, way: int) -> int:
        """Bytes that a layer keeps from its forward to its backward pass."""
        return self.profiles[way].profiles[place].freed_bytes + self.gradients[place]

    def seconds(self, choice: Sequence[int]) -> float:
        """Against recomputing nothing."""
        off = self.profiles[0].profiles
        return sum(self.profiles[n].profiles[place].seconds - off[place].seconds for place, n in enumerate(choice))

    def peak(self, choice: Sequence[int]) -> int:
        """The highest of the step, in bytes, with this way for each layer."""
        off = self.profiles[0]
        highest, left = off.other_bytes, off.standing_bytes
        for place, number in enumerate(choice):
            layer = self.profiles[number].profiles[place]
            highest = max(highest, left + layer.forward_bytes)
            left += layer.left_bytes
        highest = max(highest, left + self.head)
        there = off.standing_bytes + sum(self.through(place, n) for place, n in enumerate(choice))
        highest = max(highest, there + self.loss)
        there += self.loss_left
        for place in reversed(range(len(choice))):
            layer = self.profiles[choice[place]].profiles[place]
            highest = max(highest, there + layer.backward_bytes)
            there -= layer.freed_bytes
        return highest

    @cached_property
    def head(self) -> int:
        """Highest of the head's forward pass, above what stands and all that layers left."""
        return max(
            each.head_bytes - each.standing_bytes - sum(layer.left_bytes for layer in each.profiles)
            for each in self._own
        )

    @cached_property
    def loss(self) -> int:
        """Highest of the head's backward pass, above what stands and all that layers keep."""
        return max(self._above(way, each.loss_bytes) for way, each in enumerate(self._own))

    @cached_property
    def loss_left(self) -> int:
        """Alive when the last layer's backward pass begins, above the same."""
        return max(self._above(way, each.before_backward_bytes) for way, each in enumerate(self._own))

    def _above(self, way: int, nbytes: int) -> int:
        kept = sum(self.through(place, way) for place in range(len(self.layers)))
        return nbytes - self.profiles[way].standing_bytes - kept

    # What is found.

    def fastest(self, budget: int, *, ways: int | None = None) -> Mix | None:
        """The fastest choice among the first `ways` whose peak is within the budget; None where none is found."""
        best = self._alike(budget, ways)
        guess = len(self.layers)
        for _ in range(_MOST_GUESSES):
            found = mix.solve(replace(self.problem(guess, ways=ways), budget_bytes=budget))
            if found is None:
                ended = guess // 2
            else:
                found = replace(found, peak_bytes=self.peak(found.choice))
                if found.peak_bytes <= budget and (best is None or found.seconds < best.seconds):
                    best = found
                ended = sum(self._ended(place, way) > 0 for place, way in enumerate(found.choice))
            if ended >= guess:
                break
            guess = ended
        return best

    def _alike(self, budget: int, ways: int | None) -> Mix | None:
        """The fastest within the budget in which all layers are treated alike."""
        best: Mix | None = None
        for way in range(len(self._own) if ways is None else ways):
            choice = (way,) * len(self.layers)
            peak, seconds = self.peak(choice), self.seconds(choice)
            if peak <= budget and (best is None or seconds < best.seconds):
                best = Mix(choice=choice, seconds=seconds, peak_bytes=peak)
        return best

    def smallest(self, *, ways: int | None = None) -> Mix:
        """The choice among the first `ways` with the lowest peak."""
        count = len(self.layers)
        guesses = {round(count * part / _PARTS) for part in range(_PARTS + 1)} if any(self.casts) else {0}
        found = [mix.smallest(self.problem(guess, ways=ways)) for guess in sorted(guesses)]
        return min((replace(one, peak_bytes=self.peak(one.choice)) for one in found), key=lambda one: one.peak_bytes)

    def _ended(self, place: int, way: int) -> int:
        """What a layer left and does not keep: weights that autocast has cast."""
        return self.profiles[way].profiles[place].left_bytes - self.through(place, way)

    @cached_property
    def casts(self) -> tuple[int, ...]:
        """For each layer, the most of that."""
        return tuple(max(self._ended(place, way) for way in range(len(self._own))) for place in range(len(self.layers)))

    def problem(self, guess: int, *, ways: int | None = None) -> Problem:
        """What `mix` is asked; of the layers before each, `guess` are taken to have left what they do not keep."""
        off = self.profiles[0]
        used = range(len(self._own) if ways is None else ways)
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
