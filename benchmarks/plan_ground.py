"""The ground on which plans are compared: a workload, and what every treatment of a layer holds and takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gcbench.plan.estimate.layer_profile import StepProfile, profile
from gcbench.plan.layer_mix.layered import Layered
from gcbench.plan.policies.layer_calls import InnerCall, inner_calls
from gcbench.plan.search.mixes import plan_of
from gcbench.plan.search.planner import Planner
from gcbench.simulate.allocator.pools import MIN_BLOCK_BYTES
from gcbench.simulate.costs import Figures
from gcbench.simulate.trace.fake_model import FakeModel
from gcbench.strategies import Plan, Policy

OFF, FULL = 0, 1
"""The first two treatments of every layer: nothing is recomputed, everything is."""


class CannotRun(Exception):
    """Why a method gives nothing here."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One plan: its peak, and its seconds against keeping everything."""

    name: str
    peak_bytes: int
    seconds: float
    choice: tuple[int, ...] = ()


class Ground:
    """One workload and the planner that weighs it; treatments are numbered, the planner's own first."""

    def __init__(self, planner: Planner, batch: int) -> None:
        self.planner, self.batch = planner, batch
        self.plans: list[Plan] = []
        self.uniform: list[StepProfile] = []
        self.num_own = len(planner.mixes.uniform)
        self.add(planner.mixes.uniform)

    @property
    def fake_model(self) -> FakeModel:
        return self.planner.evaluator.session.predictor.fake_model

    @property
    def figures(self) -> Figures:
        return self.planner.evaluator.figures

    @property
    def seq_len(self) -> int:
        return self.planner.task.seq_len

    @property
    def layers(self) -> tuple[int, ...]:
        """In the order in which they run."""
        return self.uniform[OFF].layers

    @cached_property
    def examples(self) -> dict[Any, int]:
        """Kind of layer -> one that stands for it; not the first, whose input is not another layer's output."""
        kinds, found = self.fake_model.kinds, {}
        for layer in (*self.layers[1:], self.layers[0]):
            found.setdefault(kinds[layer], layer)
        return found

    @property
    def on_stage(self) -> list[int]:
        """The examples, and the first and the last layer, without which others cannot be left out."""
        return sorted({*self.examples.values(), self.layers[0], self.layers[-1]})

    def add(self, plans: Sequence[Plan]) -> list[int]:
        """The numbers of the treatments of these plans, in which layers of a kind are treated alike."""
        evaluator = self.planner.evaluator
        rounding = MIN_BLOCK_BYTES if evaluator.is_cuda else 1
        numbers = []
        for plan in plans:
            if plan not in self.plans:
                scaling = evaluator.scaling(plan)
                step = scaling.step(self.batch) if plan in self.planner.mixes.uniform else scaling.traced(self.batch)
                found = profile(step, self.figures, rounding=rounding)
                if found is None:
                    raise CannotRun(f"its layers cannot be told apart: {step.why_in_full}")
                self.plans.append(plan)
                self.uniform.append(found)
            numbers.append(self.plans.index(plan))
        self.layered = Layered(self.uniform, own=self.num_own)
        return numbers

    def by_kind(self, policies: dict[Any, Policy]) -> Plan:
        """Every layer recomputed with its kind's policy."""
        ordered, kinds = sorted(self.layers), self.fake_model.kinds
        return Plan(
            num_layers=len(self.fake_model.layers),
            groups=tuple((layer,) for layer in ordered),
            policies=tuple(policies[kinds[layer]] for layer in ordered),
        )

    def plan_of(self, choice: Sequence[int]) -> Plan:
        """The plan that treats each layer so."""
        return plan_of(self.plans, self.layers, choice)

    # Peaks and times.

    def point(self, name: str, choice: Sequence[int]) -> Point:
        return Point(
            name=name,
            peak_bytes=self.layered.peak(choice),
            seconds=self.layered.seconds(choice),
            choice=tuple(choice),
        )

    # What is found.

    def found(self, budgets: Sequence[int]) -> list[Point | None]:
        """The fastest mixes that the planner finds for these budgets."""
        own = Layered(self.uniform[: self.num_own])
        mixes = [own.fastest(budget) for budget in budgets]
        return [mixed and self.point("found", mixed.choice) for mixed in mixes]

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
        found = inner_calls(self.fake_model, self.on_stage, batch_size=batch or self.batch, seq_len=self.seq_len)
        return {kind: found[layer] for kind, layer in self.examples.items()}
