"""Plans: everything that one must not be, and layers that lie in the model otherwise than they run."""

from __future__ import annotations

import pytest

from gcbench import strategies
from gcbench.strategies import Plan, Policy


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (((),), "consecutive"),
        (((0, 2),), "consecutive"),
        (((1, 0),), "consecutive"),
        (((0, 0),), "consecutive"),
        (((2,), (1,)), "ordered and disjoint"),
        (((0, 1), (1, 2)), "ordered and disjoint"),
        (((0,), (0,)), "ordered and disjoint"),
        (((-1,),), "there is no layer -1; the first is layer 0"),
        (((3,), (4,)), "a model of 4 layers has no layer"),
        (((2, 3, 4),), "a model of 4 layers has no layer"),
    ],
)
def test_a_plan_that_no_model_could_follow_is_refused(groups, said):
    with pytest.raises(ValueError, match=said):
        Plan(num_layers=4, groups=groups)


def test_a_plan_of_segments_counts_its_layers():
    assert Plan(num_layers=6, groups=((0, 1), (3, 4, 5))).layers_checkpointed == 5


ONE_EACH = ((0,), (2,))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"groups": ONE_EACH, "policies": (Policy(),)}, "2 groups and 1 policy; write one policy per group"),
        ({"policies": (Policy(),)}, "0 groups and 1 policy"),
        ({"groups": ONE_EACH, "policies": (Policy(),) * 3}, "2 groups and 3 policies"),
        (
            {"groups": ((0,), (1, 2)), "policies": (Policy(), Policy(reentrant=True))},
            "one by one; use groups of one layer",
        ),
        ({"groups": ((0, 1),), "compiled": True}, "only be recomputed one by one"),
        ({"groups": ((0,),), "policies": (Policy(offload=True),), "compiled": True}, "without reentrant or offload"),
        ({"groups": ((0,),), "policies": (Policy(reentrant=True),), "compiled": True}, "without reentrant or offload"),
        ({"memory_budget": 0.5}, "not checkpointed; leave one out"),
        ({"memory_budget": 0.0}, "not checkpointed; leave one out"),
        ({"groups": ((0,),), "compiled": True, "memory_budget": 0.0}, "not checkpointed; leave one out"),
    ],
)
def test_a_plan_that_torch_cannot_run_is_refused(fields, said):
    """The trap: a budget of 0, which is no budget to a careless `if`."""
    with pytest.raises(ValueError, match=said):
        Plan(num_layers=4, **fields)


def test_a_policy_that_torch_cannot_run_is_refused():
    with pytest.raises(ValueError, match="cannot save outputs; leave one out"):
        Policy(keep=("mm",), reentrant=True)


def test_no_policies_stand_for_the_plain_one():
    assert Plan(num_layers=3, groups=((0,), (1, 2))).treated() == (((0,), Policy()), ((1, 2), Policy()))
    assert not Plan(num_layers=3, groups=((0,),)).any_policy("keep")


def test_a_policy_is_changed_in_every_group_and_what_else_it_says_stays():
    plan = Plan(num_layers=3, groups=((0,), (1, 2)), policies=(Policy(keep=("mm",)), Policy()))
    changed = plan.with_policies(offload=True)
    assert changed.treated() == (((0,), Policy(keep=("mm",), offload=True)), ((1, 2), Policy(offload=True)))
    assert plan.policies == (Policy(keep=("mm",)), Policy())
    assert changed.any_policy("offload") and not plan.any_policy("offload")
    assert Plan(num_layers=3).with_policies(offload=True) == Plan(num_layers=3)


# Layers that lie in the model otherwise than they run


def test_a_plan_is_renumbered_into_the_models_own_order():
    """The trap: a policy that stays in its place while its group moves."""
    plan = Plan(num_layers=3, groups=((0,), (1,), (2,)), policies=tuple(Policy(keep=(op,)) for op in ("a", "b", "c")))
    moved = plan.renumbered((5, 0, 3), 6)
    assert moved.num_layers == 6
    assert moved.treated() == (((0,), Policy(keep=("b",))), ((3,), Policy(keep=("c",))), ((5,), Policy(keep=("a",))))


def test_a_plan_is_renumbered_past_layers_that_never_run():
    """Two layers of a vision tower lie before the four that training on text runs."""
    plan = strategies.parse("segment:2").plan_for(4).renumbered((2, 3, 4, 5), 6)
    assert plan == Plan(num_layers=6, groups=((2, 3), (4, 5)))
    last = strategies.parse("last:1").plan_for(4).renumbered((2, 3, 4, 5), 6)
    assert last == Plan(num_layers=6, groups=((5,),))


def test_renumbering_in_the_same_order_changes_nothing():
    for spec in ("off", "segment:2", "every:2+selective:mm", "compile:0.5"):
        plan = strategies.parse(spec).plan_for(5)
        assert plan.renumbered(tuple(range(5)), 5) == plan


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0), (0, 1, 2, 4)])
def test_a_segment_of_layers_that_lie_apart_is_refused(order):
    """Backwards or with a gap: what lies side by side does not run one after the other."""
    plan = Plan(num_layers=4, groups=((0, 1), (2, 3)))
    with pytest.raises(ValueError, match="are not adjacent in this model; use groups of one layer"):
        plan.renumbered(order, 5)
    assert strategies.parse("per-layer").plan_for(4).renumbered(order, 5).layers_checkpointed == 4
