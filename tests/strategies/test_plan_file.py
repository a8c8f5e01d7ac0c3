"""Plan files: what is written is what is read, and every mistake is one sentence that says how to write it."""

from __future__ import annotations

import json
import re

import pytest

from gcbench import strategies
from gcbench.strategies import Plan, Policy
from gcbench.strategies.plan_file import as_json, of_json, read

MIXED = {
    "num_layers": 4,
    "groups": [
        {"layers": [0], "keep": ["_scaled_dot_product_flash_attention_for_cpu"]},
        {"layers": [1, 2]},
        {"layers": [3], "keep": ["mm#0", "mm#3"]},
    ],
}

PLANS = {
    "nothing": Plan(num_layers=0),
    "off": Plan(num_layers=4),
    "one group": Plan(num_layers=4, groups=((1,),)),
    "segments": Plan(num_layers=7, groups=((0, 1, 2), (4,), (5, 6))),
    "policies": Plan(
        num_layers=6,
        groups=((0,), (2, 3), (4,)),
        policies=(Policy(keep=("mm", "addmm#1")), Policy(), Policy(keep=("mm",), offload=True)),
    ),
    "the old variant": Plan(num_layers=2, groups=((0,), (1,)), policies=(Policy(reentrant=True), Policy())),
    "compiled": Plan(num_layers=3, groups=((0,),), compiled=True),
    "a budget": Plan(num_layers=3, compiled=True, memory_budget=0.25),
    "a budget of nothing": Plan(num_layers=3, compiled=True, memory_budget=0.0),
}


def same(one, other):
    """Equal but for the spelling: no policies at all stand for plain ones."""
    return (one.num_layers, one.treated(), one.compiled, one.memory_budget) == (
        *(other.num_layers, other.treated(), other.compiled, other.memory_budget),
    )


# Both ways


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_comes_back_as_it_was_written(name):
    """The traps: a budget of 0 taken for none, and a model that is deeper than its last group."""
    plan = PLANS[name]
    text = json.dumps(as_json(plan))
    assert same(of_json(json.loads(text)), plan)
    assert json.dumps(as_json(of_json(json.loads(text)))) == text


SPECS = ("off", "per-layer", "every:2", "segment:3", "last:2", "offload", "reentrant", "compile:0.5")
CHANGED = ("every:2+selective:matmul", "segment:2+selective:mm#1+offload", "selective:mm+compile")


@pytest.mark.parametrize("spec", [*SPECS, *CHANGED])
def test_every_strategy_can_be_written_as_a_plan_file(spec, tmp_path):
    plan = strategies.parse(spec).plan_for(5)
    path = tmp_path / "Plan.json"
    path.write_text(json.dumps(as_json(plan)))
    again = strategies.parse(f"plan:{path}")
    assert same(again.plan_for(5), plan)
    assert set(again.operators) == set(strategies.parse(spec).operators)


def test_nothing_that_goes_without_saying_is_written():
    plan = Plan(num_layers=2, groups=((0,), (1,)), policies=(Policy(), Policy(offload=True)))
    assert as_json(plan) == {"num_layers": 2, "groups": [{"layers": [0]}, {"layers": [1], "offload": True}]}


def test_by_hand():
    assert of_json(MIXED) == Plan(
        num_layers=4,
        groups=((0,), (1, 2), (3,)),
        policies=(
            Policy(keep=("_scaled_dot_product_flash_attention_for_cpu",)),
            Policy(),
            Policy(keep=("mm#0", "mm#3")),
        ),
    )


@pytest.mark.parametrize("document", [{}, {"groups": []}])
def test_an_empty_plan_is_off(document):
    assert of_json(document) == Plan(num_layers=0)


def test_plain_groups_are_the_plan_that_a_strategy_makes():
    """The trap: two plans that do the same and are not equal."""
    written = of_json({"num_layers": 4, "groups": [{"layers": [0, 1]}, {"layers": [2, 3], "keep": []}]})
    assert written == strategies.parse("segment:2").plan_for(4)


# For which model


@pytest.fixture
def file(tmp_path):
    """`file(document)` writes it and returns the path."""

    def write(document, name="plan.json"):
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return path

    return write


def test_a_file_that_names_no_number_of_layers_fits_any_deeper_model(file):
    strategy = strategies.parse(f"plan:{file({'groups': [{'layers': [2]}]})}")
    assert strategy.plan_for(3) == Plan(num_layers=3, groups=((2,),))
    assert strategy.plan_for(32) == Plan(num_layers=32, groups=((2,),))


@pytest.mark.parametrize(
    ("document", "num_layers", "said"),
    [
        ({"groups": [{"layers": [4]}]}, 4, "is for 5 layers and the model has 4"),
        ({"num_layers": 6, "groups": [{"layers": [0]}]}, 4, "is for 6 layers and the model has 4"),
        ({"num_layers": 3, "groups": [{"layers": [0]}]}, 4, "is for 3 layers and the model has 4"),
        ({"num_layers": 0}, 4, "is for 0 layers and the model has 4"),
    ],
)
def test_a_file_for_another_model_is_refused_by_both_numbers(file, document, num_layers, said):
    """The trap: a plan for 3 layers would be a wrong plan, in silence, for a model of 4."""
    strategy = strategies.parse(f"plan:{file(document)}")
    with pytest.raises(ValueError, match=f"{said}; change its num_layers and groups"):
        strategy.plan_for(num_layers)


def test_the_text_of_a_file_is_stored_in_the_report(file):
    text = json.dumps(MIXED, indent=3) + "\n"
    path = file(text)
    assert read(path) == (text, of_json(MIXED))
    assert strategies.parse(f"plan:{path}").content == text


# Mistakes

DOCUMENTS = {
    "a list on top": ([{"layers": [0]}], "a plan is an object with a list of groups; write it like"),
    "a number on top": (3, "a plan is an object with a list of groups; write it like"),
    "null on top": (None, "a plan is an object with a list of groups; write it like"),
    "groups that are no list": ({"groups": {"layers": [0]}}, "a plan is an object with a list of groups; write it"),
    "groups that are null": ({"groups": None}, "a plan is an object with a list of groups; write it like"),
    "a group that is no object": ({"groups": [[0, 1]]}, "[0, 1] is not a group; write it like"),
    "an unknown field": ({"layers": [0]}, "a plan has no field 'layers'; legal are compiled, groups, memory_budget"),
    "an unknown field of a group": (
        {"groups": [{"layers": [0], "kept": ["mm"]}]},
        "a group has no field 'kept'; legal are keep, layers, offload, reentrant",
    ),
    "no layers": ({"groups": [{"keep": ["mm"]}]}, "layers None is not a list of numbers; write it like [0, 1]"),
    "layers in words": ({"groups": [{"layers": ["0"]}]}, "layers ['0'] is not a list of numbers; write it like"),
    "layers that are true": ({"groups": [{"layers": [True]}]}, "layers [True] is not a list of numbers; write it"),
    "half a layer": ({"groups": [{"layers": [0.5]}]}, "layers [0.5] is not a list of numbers; write it like"),
    "one layer without a list": ({"groups": [{"layers": 1}]}, "layers 1 is not a list of numbers; write it like"),
    "an empty group": ({"groups": [{"layers": []}]}, "a group holds consecutive layers in rising order, not []"),
    "a gap": ({"groups": [{"layers": [0, 2]}]}, "a group holds consecutive layers in rising order, not [0, 2]"),
    "a group backwards": ({"groups": [{"layers": [1, 0]}]}, "consecutive layers in rising order, not [1, 0]"),
    "a layer twice": ({"groups": [{"layers": [1, 1]}]}, "consecutive layers in rising order, not [1, 1]"),
    "a layer before the first": ({"groups": [{"layers": [-1]}]}, "layer -1"),
    "groups that overlap": (
        {"groups": [{"layers": [0, 1]}, {"layers": [1, 2]}]},
        "layer 1 comes after layer 1; groups are ordered and disjoint",
    ),
    "groups backwards": (
        {"groups": [{"layers": [2]}, {"layers": [0]}]},
        "layer 0 comes after layer 2; groups are ordered and disjoint",
    ),
    "a layer beyond the model": (
        {"num_layers": 2, "groups": [{"layers": [2]}]},
        "a model of 2 layers has no layer 2",
    ),
    "a number of layers in words": ({"num_layers": "4"}, "num_layers '4' is not a number of layers; write it like 32"),
    "a number of layers below 0": ({"num_layers": -1}, "num_layers -1 is not a number of layers; write it like 32"),
    "a number of layers that is true": ({"num_layers": True}, "num_layers True is not a number of layers; write it"),
    "a number of layers that is null": ({"num_layers": None}, "num_layers None is not a number of layers; write it"),
    "keep in one word": ({"groups": [{"layers": [0], "keep": "mm"}]}, "keep 'mm' is not a list of operators; write it"),
    "keep of numbers": (
        {"groups": [{"layers": [0], "keep": [1]}]},
        "keep [1] is not a list of operators; write it like",
    ),
    "keep that is null": (
        {"groups": [{"layers": [0], "keep": None}]},
        "keep None is not a list of operators; write it",
    ),
    "offload in words": ({"groups": [{"layers": [0], "offload": "no"}]}, "offload 'no' is neither true nor false"),
    "reentrant as a number": ({"groups": [{"layers": [0], "reentrant": 1}]}, "reentrant 1 is neither true nor false"),
    "compiled in words": ({"compiled": "yes"}, "compiled 'yes' is neither true nor false"),
    "reentrant with saved outputs": (
        {"groups": [{"layers": [0], "reentrant": True, "keep": ["mm"]}]},
        "cannot save outputs; leave one out",
    ),
    "a reentrant segment": ({"groups": [{"layers": [0, 1], "reentrant": True}]}, "one by one; use groups of one"),
    "a compiled segment": (
        {"groups": [{"layers": [0, 1]}], "compiled": True},
        "compiled layers can only be recomputed one",
    ),
    "a budget above 1": ({"compiled": True, "memory_budget": 1.5}, "memory_budget 1.5 is not a share of memory; write"),
    "a budget below 0": (
        {"compiled": True, "memory_budget": -1},
        "memory_budget -1 is not a share of memory; write one",
    ),
    "a budget in words": ({"compiled": True, "memory_budget": "half"}, "memory_budget 'half' is not a share of memory"),
    "a budget that is true": ({"compiled": True, "memory_budget": True}, "memory_budget True is not a share of memory"),
    "a budget that is no number": ('{"compiled": true, "memory_budget": NaN}', "memory_budget nan is not a share of"),
    "a budget without a compiler": ({"memory_budget": 0.5}, "a memory budget works only with compiled layers"),
    "a budget with groups": (
        {"groups": [{"layers": [0]}], "compiled": True, "memory_budget": 0.5},
        "not checkpointed; leave one out",
    ),
}


@pytest.mark.parametrize("mistake", DOCUMENTS)
def test_a_mistake_is_one_sentence_that_names_the_file(file, mistake):
    """The traps: `true` is the number 1 to Python, `"no"` is true, and NaN is within every bound."""
    document, said = DOCUMENTS[mistake]
    path = file(document)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        strategies.parse(f"plan:{path}")
    assert str(caught.value).startswith(f"plan file {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", DOCUMENTS)
def test_a_mistake_comes_with_its_remedy(file, mistake):
    document, _ = DOCUMENTS[mistake]
    with pytest.raises(ValueError, match=";"):
        strategies.parse(f"plan:{file(document)}")


@pytest.mark.parametrize("text", ["", "{", "{'groups': []}", '{"groups": [],}', "groups: []", "\ufeff{}"])
def test_what_is_not_json_is_refused_with_an_example(file, text):
    path = file(text)
    with pytest.raises(ValueError, match="is not JSON") as caught:
        strategies.parse(f"plan:{path}")
    assert str(caught.value).startswith(f"plan file {path} ")
    assert '; write it like {"groups"' in str(caught.value)


def test_the_example_in_the_messages_is_a_plan():
    with pytest.raises(ValueError, match="write it like") as caught:
        of_json([])
    assert of_json(json.loads(str(caught.value).partition("write it like ")[2])).layers_checkpointed > 0


@pytest.mark.parametrize("name", ["nowhere.json", "folder", "bytes.json", "folder/below/plan.json", "bytes.json/below"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        strategies.parse(f"plan:{tmp_path / name}")
    assert re.search(r"cannot be read \(.+\); give the path of a JSON file$", str(caught.value))


@pytest.mark.parametrize("spec", ["plan", "plan:"])
def test_a_plan_needs_a_file(spec):
    with pytest.raises(ValueError, match=r"needs a file; write it like plan:my-plan\.json"):
        strategies.parse(spec)


# Through the command line

QUICK = ("--batch", 2, "--seq-len", 16, "--rounds", 1, "--steps", 1, "--device", "cpu")


def test_a_plan_file_is_measured_proven_and_stored_and_not_continued_once_it_has_changed(cli, model, file, tmp_path):
    """The trap: half of a row from one plan and half from another, under one name."""
    path, folder = file(MIXED, "Mixed Plan.json"), tmp_path / "run"
    asked = ("run", "-m", model(), *QUICK, "--strategies", f"off,plan:{path.name}", "--out", folder)
    result = cli(*asked, "--json")
    assert result.code == 0, result.err
    row = result.rows["plan:Mixed Plan.json"]
    assert row["layers_checkpointed"] == row["layers_recomputed"] == 4
    assert row["proof"] == "identical" and row["grad_rel_diff"] == 0.0
    report = json.loads((folder / "report.json").read_text())
    assert report["plan_files"] == {"plan:Mixed Plan.json": path.read_text()}

    again = ("run", "--resume", "--out", folder)
    assert cli(*again).code == 0
    file({**MIXED, "groups": MIXED["groups"][:2]}, path.name)
    cli(*again).refused(2, "plan files of the stored run", "has changed", "take a new --out")
    path.unlink()
    cli(*again).refused(2, "Mixed Plan.json", "cannot be read")


def test_a_plan_file_can_be_predicted(cli, model, file):
    file(MIXED, "Mixed.json")
    result = cli(
        *("predict", "-m", model(), "--batch", 2, "--seq-len", 16, "--device", "cpu"),
        *("--strategies", "off,plan:Mixed.json", "--json"),
    )
    assert result.code == 0, result.err
    rows = result.rows
    assert rows["plan:Mixed.json"]["layers_checkpointed"] == 4
    assert rows["plan:Mixed.json"]["peak_allocated_bytes"] < rows["off"]["peak_allocated_bytes"]


def test_a_plan_file_for_another_model_is_refused(cli, model, file):
    file({"num_layers": 5, "groups": [{"layers": [0]}]})
    refused = cli("run", "-m", model(), *QUICK, "--strategies", "off,plan:plan.json")
    refused.refused(2, "--strategies", "plan:plan.json is for 5 layers and the model has 4", "change its num_layers")


def test_an_operator_that_torch_does_not_have_is_refused(cli, model, file):
    file({"groups": [{"layers": [0], "keep": ["adddmm"]}]})
    refused = cli("run", "-m", model(), *QUICK, "--strategies", "off,plan:plan.json")
    refused.refused(2, "--strategies", "no operator 'adddmm'", "addmm")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("{", "is not JSON"), ('{"groups": [[0]]}', "is not a group"), ("[]", "is an object")],
)
def test_a_mistake_in_a_file_is_reported_before_anything_starts(cli, file, content, said):
    if content is not None:
        file(content)
    cli("run", "-m", "gpt2", *QUICK, "--strategies", "plan:plan.json").refused(2, "--strategies", "plan.json", said)
