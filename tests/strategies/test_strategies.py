"""Strategies: from what a person types to a plan."""

from __future__ import annotations

import json

import pytest

from gcbench import strategies
from gcbench.strategies import OFF, Change, Plan, Policy, Strategy
from gcbench.strategies.selective import ATTENTION, MATMUL


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
        ("segment:1", 3, ((0,), (1,), (2,))),
        ("segment:2", 4, ((0, 1), (2, 3))),
        ("segment:2", 5, ((0, 1), (2, 3), (4,))),
        ("segment:3", 7, ((0, 1, 2), (3, 4, 5), (6,))),
        ("segment:4", 7, ((0, 1, 2, 3), (4, 5, 6))),
        ("segment:7", 7, ((0, 1, 2, 3, 4, 5, 6),)),
        ("first:1", 4, ((0,),)),
        ("first:3", 4, ((0,), (1,), (2,))),
        ("first:4", 4, ((0,), (1,), (2,), (3,))),
        ("last:1", 4, ((3,),)),
        ("last:3", 4, ((1,), (2,), (3,))),
        ("last:4", 4, ((0,), (1,), (2,), (3,))),
        ("off", 0, ()),
        ("per-layer", 0, ()),
    ],
)
def test_a_spec_becomes_a_plan(spec, num_layers, groups):
    plan = strategies.parse(spec).plan_for(num_layers)
    assert plan == Plan(num_layers=num_layers, groups=groups)
    assert plan.layers_checkpointed == sum(len(group) for group in groups)


KEEP_MATMUL = (*MATMUL, *ATTENTION)


@pytest.mark.parametrize(
    ("spec", "groups", "policy"),
    [
        ("selective:attention", "0 1 2 3", Policy(keep=ATTENTION)),
        ("selective:matmul", "0 1 2 3", Policy(keep=KEEP_MATMUL)),
        ("selective:mm/_softmax", "0 1 2 3", Policy(keep=("mm", "_softmax"))),
        ("selective:mm#2/bmm", "0 1 2 3", Policy(keep=("mm#2", "bmm"))),
        ("selective:attention/mm#0", "0 1 2 3", Policy(keep=(*ATTENTION, "mm#0"))),
        ("selective:matmul/mm", "0 1 2 3", Policy(keep=KEEP_MATMUL)),
        ("selective:flash_attn::_flash_attn_forward", "0 1 2 3", Policy(keep=("flash_attn::_flash_attn_forward",))),
        ("offload", "0 1 2 3", Policy(offload=True)),
        ("reentrant", "0 1 2 3", Policy(reentrant=True)),
        ("every:2+selective:matmul", "0 2", Policy(keep=KEEP_MATMUL)),
        ("segment:3+selective:mm", "012 3", Policy(keep=("mm",))),
        ("segment:2+offload", "01 23", Policy(offload=True)),
        ("first:1+reentrant", "0", Policy(reentrant=True)),
        ("last:1+selective:mm+offload", "3", Policy(keep=("mm",), offload=True)),
    ],
)
def test_a_change_reaches_every_group_of_the_choice(spec, groups, policy):
    groups = tuple(tuple(int(layer) for layer in group) for group in groups.split())
    plan = strategies.parse(spec).plan_for(4)
    assert plan == Plan(num_layers=4, groups=groups, policies=(policy,) * len(groups))
    assert strategies.parse(spec).operators == policy.keep


@pytest.mark.parametrize(
    ("spec", "groups", "budget", "keep"),
    [
        ("compile", (), None, None),
        ("compile:0.5", (), 0.5, None),
        ("compile:0", (), 0.0, None),
        ("compile:1", (), 1.0, None),
        ("every:2+compile", ((0,), (2,)), None, None),
        ("selective:mm+compile", ((0,), (1,), (2,)), None, ("mm",)),
    ],
)
def test_compiled_layers_are_checkpointed_where_that_is_asked_for_alone(spec, groups, budget, keep):
    """The trap: `compile` that means `per-layer+compile`, as the other changes do."""
    plan = strategies.parse(spec).plan_for(3)
    policies = () if keep is None else (Policy(keep=keep),) * 3
    assert plan == Plan(num_layers=3, groups=groups, policies=policies, compiled=True, memory_budget=budget)


@pytest.mark.parametrize(
    ("typed", "spec"),
    [
        (" Every:02 ", "every:2"),
        ("OFF", "off"),
        ("Per-Layer", "per-layer"),
        ("every:2", "every:2"),
        ("Segment:08", "segment:8"),
        ("FIRST:1", "first:1"),
        ("offload:every:2", "every:2+offload"),
        ("OFFLOAD:Every:02", "every:2+offload"),
        ("offload:segment:4", "segment:4+offload"),
        ("offload:per-layer", "offload"),
        ("per-layer+offload", "offload"),
        ("offload+per-layer", "offload"),
        ("offload:every:2+selective:mm", "every:2+selective:mm+offload"),
        ("offload+selective:mm+every:2", "every:2+selective:mm+offload"),
        ("selective:mm + every:2", "every:2+selective:mm"),
        ("reentrant+first:2", "first:2+reentrant"),
        ("selective:mm+per-layer", "selective:mm"),
        ("selective:mm/mm/addmm", "selective:mm/addmm"),
        ("Selective:Matmul", "selective:matmul"),
        ("off+compile", "compile"),
        ("compile:0.50+off", "compile:0.5"),
        ("compile:5e-1", "compile:0.5"),
        ("compile:1.0", "compile:1"),
        ("compile+per-layer", "per-layer+compile"),
        ("compile+selective:mm", "selective:mm+compile"),
    ],
)
def test_a_spec_has_one_spelling(typed, spec):
    """The trap: `every:2` and `every:02` as two cells of one table, or `offload:every:2` and `every:2+offload`."""
    one, other = strategies.parse(typed), strategies.parse(spec)
    assert one.spec == other.spec == spec
    assert one.plan_for(8) == other.plan_for(8)
    assert one.operators == other.operators
    assert one.counts_run == other.counts_run


@pytest.mark.parametrize(
    ("spec", "counts_run"),
    [
        ("off", False),
        ("per-layer", False),
        ("every:2", False),
        ("selective:mm", False),
        ("every:2+offload", False),
        ("segment:2", True),
        ("first:1", True),
        ("last:1", True),
        ("last:1+selective:mm", True),
        ("offload:segment:2", True),
    ],
)
def test_what_transformers_counts_is_counted_as_it_does_and_all_else_as_layers_run(spec, counts_run):
    """The trap: a change that makes `last:1` count layers of a vision tower that training on text never runs."""
    assert strategies.parse(spec).counts_run is counts_run


# Plan files by their name


@pytest.fixture
def plan_file(tmp_path, monkeypatch):
    """`My Plan.json`, which names no number of layers, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "My Plan.json"
    path.write_text(json.dumps({"groups": [{"layers": [0, 1]}, {"layers": [2], "keep": ["mm"]}]}))
    return path


@pytest.mark.parametrize("typed", ["plan:My Plan.json", "PLAN:My Plan.json", " plan:My Plan.json "])
def test_the_path_of_a_plan_file_keeps_its_case(plan_file, typed):
    strategy = strategies.parse(typed)
    assert strategy.spec == "plan:My Plan.json"
    assert strategy.content == plan_file.read_text()
    assert strategy.operators == ("mm",)
    assert strategy.counts_run
    assert strategy.plan_for(5) == Plan(num_layers=5, groups=((0, 1), (2,)), policies=(Policy(), Policy(keep=("mm",))))


@pytest.mark.parametrize("name", ["My Plan.json", "plan.json"])
@pytest.mark.parametrize("typed", ["offload:plan:{}", "offload+plan:{}", "plan:{}+offload"])
def test_a_plan_file_says_it_all_or_keeps_its_name_and_its_content(plan_file, name, typed):
    """The traps: a path in small letters, which is another file, and a strategy that forgets what its file said, so
    that a run is resumed although the file has changed."""
    plan_file.rename(plan_file.with_name(name))
    try:
        strategy = strategies.parse(typed.format(name))
    except ValueError as err:
        assert name in str(err) and "the model has" not in str(err), err
        return
    assert f"plan:{name}" in strategy.spec
    assert strategy.content is not None


@pytest.mark.parametrize("spec", ["every", "every:", "every:0", "every:-1", "every:x", "every:1.5", "every:2:3"])
def test_a_stride_is_a_positive_whole_number(spec):
    with pytest.raises(ValueError, match=r"write it like every:2"):
        strategies.parse(spec)


@pytest.mark.parametrize("argument", [None, "", "0", "-1", "x", "1.5", "2:3", " "])
@pytest.mark.parametrize("name", ["segment", "first", "last"])
def test_a_number_of_layers_is_a_positive_whole_number(name, argument):
    spec = name if argument is None else f"{name}:{argument}"
    with pytest.raises(ValueError, match=f"needs a whole number of layers, 1 or more; write it like {name}:"):
        strategies.parse(spec)


@pytest.mark.parametrize("spec", ["off:", "off:1", "per-layer:2", "reentrant:", "reentrant:every:2"])
def test_an_argument_where_none_belongs(spec):
    with pytest.raises(ValueError, match="takes no argument"):
        strategies.parse(spec)


@pytest.mark.parametrize("argument", ["", "2", "-0.1", "1.0001", "nan", "inf", "half", "every:2"])
def test_a_memory_budget_is_a_share(argument):
    """The trap: comparisons with NaN are false."""
    with pytest.raises(ValueError, match=r"needs a share of memory from 0 to 1; write it like compile:0\.5"):
        strategies.parse(f"compile:{argument}")


@pytest.mark.parametrize("argument", [None, "", "/", "mm#", "mm#x", "#1", "mm-1", "mm,bmm", "mm#-1", "a::b::c"])
def test_operators_to_save_look_like_operators(argument):
    spec = "selective" if argument is None else f"selective:{argument}"
    with pytest.raises(
        ValueError, match="does not name the operators to save; write selective:attention, selective:matmul or"
    ):
        strategies.parse(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("every:2+first:2", r"chooses layers twice \(every:2 and first:2\); leave one out"),
        ("every:2+every:2", r"chooses layers twice"),
        ("off+per-layer+offload", r"chooses layers twice"),
        ("offload:every:2+last:1", r"chooses layers twice"),
        ("selective:mm+selective:addmm", "names selective twice; leave one out"),
        ("offload:every:2+offload", "names offload twice; leave one out"),
        ("compile+compile:0.5", "names compile twice; leave one out"),
        ("off+selective:matmul", "off recomputes nothing; combine selective:matmul with a choice of layers"),
        ("off+offload", "off recomputes nothing; combine offload with a choice of layers"),
        ("offload:off", "off recomputes nothing"),
        ("off+reentrant", "off recomputes nothing"),
        ("reentrant+selective:mm", "cannot save outputs; leave one out"),
        ("reentrant+offload", "not reentrant; leave one out"),
        ("segment:2+reentrant", "one by one; use groups of one layer"),
        ("segment:2+compile", "only be recomputed one by one"),
        ("compile+offload", "without reentrant or offload"),
        ("reentrant+compile", "without reentrant or offload"),
        ("per-layer+compile:0.5", "not checkpointed; leave one out"),
        ("compile:0.5+selective:mm", "not checkpointed; leave one out"),
        ("first:2+compile:1", "not checkpointed; leave one out"),
        ("every:2+", "there is no strategy"),
        ("+", "there is no strategy"),
        ("every:2+banana", "there is no strategy 'banana'"),
        ("offload:", "names no layers; write offload"),
    ],
)
def test_contradictory_parts_are_refused_with_a_remedy(spec, said):
    """Before any model is looked at: a spec that parses is one that some model can run."""
    with pytest.raises(ValueError, match=said) as caught:
        strategies.parse(spec)
    assert ";" in str(caught.value)


def test_a_choice_too_large_for_any_model_is_not_called_contradictory():
    """The trap: parts are tried on an imagined model, which has some number of layers."""
    for spec in ("first:20000", "first:20000+offload"):
        with pytest.raises(ValueError, match="the model has 4"):
            strategies.parse(spec).plan_for(4)


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("per_layer", "per-layer"),
        ("evry:2", "every"),
        ("of", "off"),
        ("segmnt:2", "segment"),
        ("selectiv:mm", "selective"),
        ("ofload", "offload"),
        ("fist:2", "first"),
        ("banana", None),
        ("", None),
    ],
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


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        ("segment:5", "use groups of 1 to 4"),
        ("segment:5+selective:mm", "use groups of 1 to 4"),
        ("first:5", "use a number from 1 to 4"),
        ("last:5", "use a number from 1 to 4"),
        ("offload:last:5", "use a number from 1 to 4"),
    ],
)
def test_a_choice_beyond_the_model_says_what_fits(spec, fits):
    name = spec.removeprefix("offload:").partition("+")[0]
    with pytest.raises(ValueError, match=f"{name} needs at least 5 layers and the model has 4; {fits}"):
        strategies.parse(spec).plan_for(4)


CHOICES = ("off", "every", "first", "last", "own", "per-layer", "plan", "segment")
CHANGES = ("compile", "offload", "reentrant", "selective")


def test_choices_of_layers_come_before_changes_and_every_kind_is_explained():
    kinds = strategies.kinds()
    assert tuple(kind.name for kind in kinds) == CHOICES + CHANGES
    assert kinds[0].name == OFF
    for kind in kinds:
        assert kind.kept and kind.recomputed and kind.elsewhere


@pytest.mark.parametrize("spec", ["off", "per-layer", "every:2", "segment:2", "first:1", "last:1"])
def test_a_choice_of_layers_is_parsed_by_its_own_kind_alone(spec):
    name, _, argument = spec.partition(":")
    kind = next(kind for kind in strategies.kinds() if kind.name == name)
    parsed = kind.parse(argument or None)
    assert isinstance(parsed, Strategy) and parsed.spec == spec


@pytest.mark.parametrize("spec", ["offload", "reentrant", "compile", "compile:0.5", "selective:mm"])
def test_a_change_is_parsed_by_its_own_kind_alone(spec):
    name, _, argument = spec.partition(":")
    kind = next(kind for kind in strategies.kinds() if kind.name == name)
    parsed = kind.parse(argument or None)
    assert isinstance(parsed, Change) and parsed.spec == spec
