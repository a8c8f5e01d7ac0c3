"""The ground on which plans are compared: a workload, what every treatment of a layer holds and takes, and exact peaks.

The planner's `Problem` has one figure for what a layer keeps. Under autocast two would be needed: a cast weight lies in
autocast's cache until the forward pass ends, whether or not the layer is checkpointed, and beyond that only where the
backward pass needs it. `Ground.peak` counts both, so that it is the peak a trace of the plan finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gcbench import mix
from gcbench.costs import Figures, total
from gcbench.mix import Option, Problem
from gcbench.planner.search import Planner
from gcbench.simulate.inside import InnerCall, inner_calls
from gcbench.simulate.pools import MIN_BLOCK_BYTES
from gcbench.simulate.predictor import Step
from gcbench.simulate.stage import HEAD, LOSS, Stage
from gcbench.strategies import Plan, Policy

OFF, FULL = 0, 1
"""The first two treatments of every layer: nothing is recomputed, everything is."""
_GUESSES = 9
"""Numbers of checkpointed layers for which a mix is looked for."""


class CannotRun(Exception):
    """Why a method gives nothing here."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One plan: its peak, and its seconds against keeping everything."""

    name: str
    peak_bytes: int
    seconds: float
    choice: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """One layer in a step in which all are treated alike; bytes.

    Attributes:
        seconds: both passes.
        left_bytes: alive when its forward pass ends, above what stood when it began.
        forward_bytes: highest in its forward pass, above the same.
        given_back_bytes: what its backward pass frees, less what it leaves.
        backward_bytes: highest in its backward pass, above what stood when that began.
    """

    seconds: float
    left_bytes: int
    forward_bytes: int
    given_back_bytes: int
    backward_bytes: int


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A step in which all layers are treated alike; highest bytes of its other parts."""

    layers: tuple[Treatment, ...]
    order: tuple[int, ...]
    standing_bytes: int
    head_bytes: int
    loss_bytes: int
    before_backward_bytes: int
    other_bytes: int


def measured(step: Step, figures: Figures, *, rounding: int) -> Uniform:
    """What such a step shows; raises CannotRun where it was traced in full, so that layers are not told apart."""
    assembly, line = step.assembly, step.assembly.timeline
    if not assembly.places:
        raise CannotRun(f"its layers cannot be told apart: {step.why_in_full}")
    sizes = -(-line.nbytes // rounding) * rounding
    taken = line.events >= 0
    blocks = np.where(taken, line.events, ~line.events)
    live = np.concatenate([[0], np.cumsum(np.where(taken, sizes[blocks], -sizes[blocks]))])
    starts = [start for start, _ in assembly.segments]
    ends = [*starts[1:], len(line.events)]
    before, after, highest = {}, {}, {}
    for place, start, end in zip(assembly.places, starts, ends, strict=False):
        before[place], after[place] = int(live[start]), int(live[end])
        highest[place] = int(live[start : end + 1].max())
    known: dict[int, float] = {}
    seconds = {}
    for segment, works in step.works:
        if id(works) not in known:
            known[id(works)] = total(works, figures)
        seconds[segment] = known[id(works)]
    order = tuple(layer for part, layer in assembly.places if part == "forward")
    outside = [place for place in assembly.places if place[1] < 0 and place not in (HEAD, LOSS)]
    update = starts[len(assembly.places)]
    return Uniform(
        layers=tuple(
            Treatment(
                seconds=seconds["forward", layer] + seconds["backward", layer],
                left_bytes=after["forward", layer] - before["forward", layer],
                forward_bytes=highest["forward", layer] - before["forward", layer],
                given_back_bytes=before["backward", layer] - after["backward", layer],
                backward_bytes=highest["backward", layer] - before["backward", layer],
            )
            for layer in order
        ),
        order=order,
        standing_bytes=before["forward", order[0]],
        head_bytes=highest[HEAD],
        loss_bytes=highest[LOSS],
        before_backward_bytes=before["backward", order[-1]],
        other_bytes=max([int(live[update:].max()), *(highest[place] for place in outside)]),
    )


class Ground:
    """One workload and the planner that weighs it; treatments are numbered, the planner's own first."""

    def __init__(self, planner: Planner, batch: int) -> None:
        self.planner, self.batch = planner, batch
        self.plans: list[Plan] = []
        self.uniform: list[Uniform] = []
        self.add(planner.mixes.uniform)
        self.num_own = len(self.plans)
        off = self.uniform[OFF]
        # Where nothing is recomputed, all that is left by a forward pass is there for the backward pass.
        self.gradients = [layer.left_bytes - layer.given_back_bytes for layer in off.layers]

    @property
    def stage(self) -> Stage:
        return self.planner.weighing.session.predictor.stage

    @property
    def figures(self) -> Figures:
        return self.planner.weighing.figures

    @property
    def seq_len(self) -> int:
        return self.planner.task.seq_len

    @property
    def layers(self) -> tuple[int, ...]:
        """In the order in which they run."""
        return self.uniform[OFF].order

    @cached_property
    def examples(self) -> dict[Any, int]:
        """Kind of layer -> one that stands for it; not the first, whose input is not another layer's output."""
        kinds, found = self.stage.kinds, {}
        for layer in (*self.layers[1:], self.layers[0]):
            found.setdefault(kinds[layer], layer)
        return found

    @property
    def on_stage(self) -> list[int]:
        """The examples, and the first and the last layer, without which others cannot be left out."""
        return sorted({*self.examples.values(), self.layers[0], self.layers[-1]})

    def add(self, plans: Sequence[Plan]) -> list[int]:
        """The numbers of the treatments of these plans, in which layers of a kind are treated alike."""
        weighing = self.planner.weighing
        rounding = MIN_BLOCK_BYTES if weighing.is_cuda else 1
        numbers = []
        for plan in plans:
            if plan not in self.plans:
                scaling = weighing.scaling(plan)
                step = scaling.step(self.batch) if plan in self.planner.mixes.uniform else scaling.traced(self.batch)
                self.plans.append(plan)
                self.uniform.append(measured(step, self.figures, rounding=rounding))
            numbers.append(self.plans.index(plan))
        return numbers

    def by_kind(self, policies: dict[Any, Policy]) -> Plan:
        """Every layer recomputed with its kind's policy."""
        ordered, kinds = sorted(self.layers), self.stage.kinds
        return Plan(
            num_layers=len(self.stage.layers),
            groups=tuple((layer,) for layer in ordered),
            policies=tuple(policies[kinds[layer]] for layer in ordered),
        )

    def plan_of(self, choice: Sequence[int]) -> Plan:
        """The plan that treats each layer so."""
        groups, policies = [], []
        for layer, number in sorted(zip(self.layers, choice, strict=True)):
            for group, policy in self.plans[number].treated():
                if group == (layer,):
                    groups.append(group)
                    policies.append(policy)
        plain = all(policy == Policy() for policy in policies)
        return Plan(num_layers=len(self.stage.layers), groups=tuple(groups), policies=() if plain else tuple(policies))

    # Peaks and times.

    def point(self, name: str, choice: Sequence[int]) -> Point:
        return Point(name=name, peak_bytes=self.peak(choice), seconds=self.seconds(choice), choice=tuple(choice))

    def seconds(self, choice: Sequence[int]) -> float:
        """Against keeping everything."""
        off = self.uniform[OFF].layers
        return sum(self.uniform[n].layers[place].seconds - off[place].seconds for place, n in enumerate(choice))

    def through(self, place: int, number: int) -> int:
        """What a layer keeps from the forward to the backward pass."""
        return self.uniform[number].layers[place].given_back_bytes + self.gradients[place]

    def peak(self, choice: Sequence[int]) -> int:
        """The highest of the step, with sizes rounded as the device's allocator does."""
        off = self.uniform[OFF]
        highest, left = off.other_bytes, off.standing_bytes
        for place, number in enumerate(choice):
            layer = self.uniform[number].layers[place]
            highest = max(highest, left + layer.forward_bytes)
            left += layer.left_bytes
        highest = max(highest, left + self.head)
        there = off.standing_bytes + sum(self.through(place, n) for place, n in enumerate(choice))
        highest = max(highest, there + self.loss)
        there += self.loss_left
        for place in reversed(range(len(choice))):
            layer = self.uniform[choice[place]].layers[place]
            highest = max(highest, there + layer.backward_bytes)
            there -= layer.given_back_bytes
        return highest

    @cached_property
    def head(self) -> int:
        """Highest of the head's forward pass, above all that layers left."""
        return max(
            each.head_bytes - each.standing_bytes - sum(layer.left_bytes for layer in each.layers)
            for each in self.uniform[: self.num_own]
        )

    def _above(self, each: Uniform, number: int, nbytes: int) -> int:
        return nbytes - each.standing_bytes - sum(self.through(place, number) for place in range(len(each.layers)))

    @cached_property
    def loss(self) -> int:
        """Highest of the head's backward pass, above all that layers keep through."""
        return max(self._above(each, n, each.loss_bytes) for n, each in enumerate(self.uniform[: self.num_own]))

    @cached_property
    def loss_left(self) -> int:
        """Alive when the last layer's backward pass begins, above the same."""
        return max(
            self._above(each, n, each.before_backward_bytes) for n, each in enumerate(self.uniform[: self.num_own])
        )

    # What is found.

    def as_planned(self, budgets: Sequence[int]) -> list[Point | None]:
        """The mixes that the planner's own problem gives for these budgets."""
        problem = self.planner.mixes.problem(self.batch)
        assert problem is not None
        return [mixed and self.point("found", mixed.choice) for mixed in mix.frontier(problem, budgets)]

    def found(self, budgets: Sequence[int]) -> list[Point | None]:
        """The fastest mixes of the planner's policies, by exact peaks.

        What autocast's cache holds by the end of the forward pass is guessed, and each guess gives a mix.
        """
        best: list[Point | None] = [None] * len(budgets)
        for number in range(self.num_own):
            alike = self.point("found", [number] * len(self.layers))
            best = [self._better(one, alike, budget) for one, budget in zip(best, budgets, strict=True)]
        for problem in self._problems():
            for place, mixed in enumerate(mix.frontier(problem, budgets)):
                if mixed is not None:
                    best[place] = self._better(best[place], self.point("found", mixed.choice), budgets[place])
        for place, planned in enumerate(self.as_planned(budgets)):
            if planned is not None:
                best[place] = self._better(best[place], planned, budgets[place])
        return best

    @staticmethod
    def _better(best: Point | None, point: Point, budget: int) -> Point | None:
        if point.peak_bytes > budget:
            return best
        return point if best is None or point.seconds < best.seconds else best

    def _problems(self) -> Iterator[Problem]:
        off, places = self.uniform[OFF], range(len(self.layers))
        casts = [
            max(self.uniform[n].layers[place].left_bytes - self.through(place, n) for n in range(self.num_own))
            for place in places
        ]
        guesses = {round(len(places) * step / (_GUESSES - 1)) for step in range(_GUESSES)} if any(casts) else {0}
        for guess in sorted(guesses):
            cached = [sum(sorted(casts[:place], reverse=True)[:guess]) for place in range(len(places) + 1)]
            yield Problem(
                options=tuple(
                    tuple(
                        Option(
                            seconds=self.uniform[n].layers[place].seconds - off.layers[place].seconds,
                            kept_bytes=self.through(place, n),
                            forward_bytes=cached[place] + self.uniform[n].layers[place].forward_bytes,
                            backward_bytes=self.uniform[n].layers[place].backward_bytes + self.through(place, n),
                        )
                        for n in range(self.num_own)
                    )
                    for place in places
                ),
                gradient_bytes=tuple(self.gradients),
                standing_bytes=off.standing_bytes,
                head_bytes=max(self.loss, self.head + cached[-1]),
                loss_left_bytes=self.loss_left,
                other_peak_bytes=off.other_bytes,
                budget_bytes=0,
            )

    # Layer counts.

    def layer_counts(self) -> list[Point]:
        """Every stride and every number of first and of last layers."""
        count = len(self.layers)
        points = []
        for k in range(1, count + 1):
            points.append(self.point(f"every:{k}", [FULL if place % k == 0 else OFF for place in range(count)]))
            points.append(self.point(f"first:{k}", [FULL if place < k else OFF for place in range(count)]))
            points.append(self.point(f"last:{k}", [FULL if place >= count - k else OFF for place in range(count)]))
        return [*points, self.point("off", [OFF] * count)]

    def calls(self, batch: int | None = None) -> dict[Any, tuple[InnerCall, ...]]:
        """Kind of layer -> the calls in its forward pass."""
        found = inner_calls(self.stage, self.on_stage, batch_size=batch or self.batch, seq_len=self.seq_len)
        return {kind: found[layer] for kind, layer in self.examples.items()}
