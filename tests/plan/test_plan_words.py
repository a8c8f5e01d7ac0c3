"""The words for a searched plan: how many layers save how many operator outputs, and how many are not checkpointed."""

from __future__ import annotations

import pytest

from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import Candidate, described
from gcbench.strategies import Plan, Policy


def candidate(plan, strategy=SEARCHED):
    return Candidate(
        strategy=strategy, plan=plan, batch_size=1, peak_bytes=1, allocated_bytes=1, peak_phase=None, fits=True,
        step_time_s=1.0, tokens_per_s=1.0,
    )  # fmt: skip


def searched(num_layers, *saved):
    """A plan whose first layers save so many outputs each."""
    policies = tuple(Policy(keep=tuple(f"mm#{number}" for number in range(count))) for count in saved)
    return Plan(num_layers=num_layers, groups=tuple((layer,) for layer in range(len(saved))), policies=policies)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (searched(5, 11, 11, 12), "2 layers save 11 op outputs, 1 saves 12, 2 are not checkpointed"),
        (searched(3, 0, 0), "2 layers save only the layer input, 1 is not checkpointed"),
        (searched(2, 1, 0), "1 layer saves 1 op output, 1 saves only the layer input"),
        (Plan(num_layers=3, groups=((1,),)), "1 layer saves only the layer input, 2 are not checkpointed"),
        (Plan(num_layers=2), "2 layers are not checkpointed"),
    ],
)
def test_a_searched_plan_is_described_by_what_its_layers_save(plan, words):
    assert described(candidate(plan)) == f"searched plan: {words}"


def test_a_named_strategy_is_described_by_its_name():
    assert described(candidate(Plan(num_layers=2), "per-layer")) == "per-layer"
