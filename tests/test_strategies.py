"""Strategies: from what a person types to a plan, and everything that a plan must not be."""

from __future__ import annotations

import pytest

from gcbench import strategies
from gcbench.strategies import Plan


@pytest.mark.parametrize(
    ("spec", "num_layers", "groups"),
    [
        ("off", 4, ()),
        ("per-layer", 3, ((0,), (1,), (2,))),
        ("every:1", 3, ((0,), (1,), (2,))),
        ("every:2", 4, ((0,), (2,))),
        ("every:2", 5, ((0,), (2,), (4,))),
        ("every:3", 5, ((0,), (3,))),
        ("every:5", 5, ((0,),)),
        ("off", 0, ()),
        ("per-layer", 0, ()),
    ],
)
def test_a_spec_becomes_a_plan(spec, num_layers, groups):
    plan = strategies.parse(spec).plan_for(num_layers)
    assert plan == Plan(num_layers=num_layers, groups=groups)
    assert plan.layers_checkpointed == len(groups)


@pytest.mark.parametrize(
    ("typed", "spec"), [(" Every:02 ", "every:2"), ("OFF", "off"), ("Per-Layer", "per-layer"), ("every:2", "every:2")]
)
def test_a_spec_has_one_spelling(typed, spec):
    """The trap: `every:2` and `every:02` as two cells of one table."""
    assert strategies.parse(typed).spec == spec


@pytest.mark.parametrize("spec", ["every", "every:", "every:0", "every:-1", "every:x", "every:1.5", "every:2:3"])
def test_a_stride_is_a_positive_whole_number(spec):
    with pytest.raises(ValueError, match=r"write it like every:2"):
        strategies.parse(spec)


@pytest.mark.parametrize("spec", ["off:", "off:1", "per-layer:2"])
def test_an_argument_where_none_belongs(spec):
    with pytest.raises(ValueError, match="takes no argument"):
        strategies.parse(spec)


@pytest.mark.parametrize(
    ("spec", "near"), [("per_layer", "per-layer"), ("evry:2", "every"), ("of", "off"), ("banana", None), ("", None)]
)
def test_an_unknown_strategy_names_the_legal_ones_and_the_nearest(spec, near):
    with pytest.raises(ValueError, match="there is no strategy") as caught:
        strategies.parse(spec)
    for kind in strategies.kinds():
        assert kind.syntax in str(caught.value)
    assert ("did you mean" in str(caught.value)) == (near is not None)
    assert near is None or f"did you mean {near}?" in str(caught.value)


def test_a_stride_beyond_the_model_says_what_fits():
    with pytest.raises(ValueError, match=r"every:5 needs at least 5 layers and the model has 4.*from 1 to 4"):
        strategies.parse("every:5").plan_for(4)


def test_off_comes_first_and_every_kind_is_explained():
    kinds = strategies.kinds()
    assert kinds[0].name == strategies.OFF
    assert len({kind.name for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert kind.kept and kind.recomputed and kind.elsewhere


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
        (((-1,),), "ordered and disjoint"),
        (((3,), (4,)), "beyond a model of 4 layers"),
        (((2, 3, 4),), "beyond a model of 4 layers"),
    ],
)
def test_a_plan_that_no_model_could_follow_is_refused(groups, said):
    with pytest.raises(ValueError, match=said):
        Plan(num_layers=4, groups=groups)


def test_a_plan_of_segments_counts_its_layers():
    assert Plan(num_layers=6, groups=((0, 1), (3, 4, 5))).layers_checkpointed == 5
