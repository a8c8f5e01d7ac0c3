"""What plan files say of operators to skip: read as written, checked, measured, and refused in one sentence."""

from __future__ import annotations

import json
import re

import pytest

from gcbench import strategies
from gcbench.strategies import Plan, Policy
from gcbench.strategies.plan_file import as_json, of_json

QUICK = ("--batch", 2, "--seq-len", 16, "--rounds", 1, "--steps", 1, "--device", "cpu")


@pytest.fixture
def file(tmp_path):
    """`file(document)` writes it and returns the path."""

    def write(document, name="plan.json"):
        path = tmp_path / name
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    return write


SKIPPING = Plan(
    num_layers=3,
    groups=((0,), (1,), (2,)),
    policies=(Policy(keep=("mm#1",), skip=("mm#0", "add")), Policy(), Policy(skip=("aten::mm",), offload=True)),
)


def test_what_is_skipped_comes_back_as_it_was_written():
    """The trap: a field that is written and not read, so that a plan runs again all that it was to skip."""
    document = as_json(SKIPPING)
    assert document["groups"] == [
        {"layers": [0], "keep": ["mm#1"], "skip": ["mm#0", "add"]},
        {"layers": [1]},
        {"layers": [2], "skip": ["aten::mm"], "offload": True},
    ]
    assert of_json(json.loads(json.dumps(document))) == SKIPPING


def test_skip_alone_makes_a_policy():
    """The trap: policies dropped as plain because nothing is kept."""
    plan = of_json({"groups": [{"layers": [0], "skip": ["mm#0"]}]})
    assert plan == Plan(num_layers=1, groups=((0,),), policies=(Policy(skip=("mm#0",)),))
    assert of_json({"groups": [{"layers": [0], "skip": []}]}) == Plan(num_layers=1, groups=((0,),))


def test_operators_that_are_skipped_are_checked_as_those_that_are_kept(file):
    """Each once, kept before skipped, so that a name that torch does not have is refused in either place."""
    document = {
        "groups": [{"layers": [0], "keep": ["mm"], "skip": ["add#1"]}, {"layers": [1], "skip": ["mm", "sin"]}],
    }
    assert strategies.parse(f"plan:{file(document)}").operators == ("mm", "add#1", "sin")


SKIP_MISTAKES = {
    "another name for it": (
        {"groups": [{"layers": [0], "skipped": ["mm"]}]},
        "a group has no field 'skipped'; legal are keep, layers, offload, reentrant, skip",
    ),
    "skip on top": (
        {"skip": ["mm"], "groups": []},
        "a plan has no field 'skip'; legal are compiled, groups, memory_budget, num_layers",
    ),
    "one word": (
        {"groups": [{"layers": [0], "skip": "mm"}]},
        "skip 'mm' is not a list of operators; write it like ['mm']",
    ),
    "numbers": (
        {"groups": [{"layers": [0], "skip": [1]}]},
        "skip [1] is not a list of operators; write it like ['mm']",
    ),
    "null": ({"groups": [{"layers": [0], "skip": None}]}, "skip None is not a list of operators; write it like ['mm']"),
    "true": ({"groups": [{"layers": [0], "skip": True}]}, "skip True is not a list of operators; write it like ['mm']"),
    "an object": (
        {"groups": [{"layers": [0], "skip": {"mm": 0}}]},
        "skip {'mm': 0} is not a list of operators; write it",
    ),
    "the old variant": (
        {"groups": [{"layers": [0], "skip": ["mm"], "reentrant": True}]},
        "the reentrant variant recomputes all of a layer and cannot save outputs; leave one out",
    ),
    "compiled": (
        {"compiled": True, "groups": [{"layers": [0], "skip": ["mm"]}]},
        "the compiler chooses which operators of a layer are recomputed; leave skip or compiled out",
    ),
}


@pytest.mark.parametrize("mistake", SKIP_MISTAKES)
def test_a_mistake_in_what_is_skipped(file, mistake):
    document, said = SKIP_MISTAKES[mistake]
    path = file(document)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        strategies.parse(f"plan:{path}")
    assert str(caught.value).startswith(f"plan file {path}: ")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_an_operator_to_skip_that_torch_does_not_have_is_refused(cli, model, file):
    file({"groups": [{"layers": [0], "keep": ["mm#3"], "skip": ["adddmm#0"]}]})
    refused = cli("run", "-m", model(), *QUICK, "--strategies", "off,plan:plan.json")
    refused.refused(2, "--strategies", "no operator 'adddmm'", "addmm")


SKIPPED = ["mm#1", "mul#4", "neg#1", "cat#1", "mul#5"]
"""What leads to rotated keys in a Llama layer."""


def test_a_plan_that_skips_is_measured_and_proven(cli, model, file):
    """Keys are rotated and kept, so the product that made them is not run again; a report tells all of it once more."""
    file({"groups": [{"layers": [layer], "keep": ["add#2"], "skip": SKIPPED} for layer in range(4)]}, "Skip.json")
    result = cli("run", "-m", model(), *QUICK, "--strategies", "off,plan:Skip.json", "--json")
    assert result.code == 0, result.err
    row = result.rows["plan:Skip.json"]
    assert row["proof"] == "identical" and row["grad_rel_diff"] == 0.0
    assert row["layers_recomputed"] == 4


def test_a_plan_that_skips_what_is_needed_is_a_row_with_its_reason(cli, model, file):
    """The trap: wrong gradients, or a crash of the whole run."""
    file({"groups": [{"layers": [layer], "keep": ["mm#0"], "skip": ["silu#0"]} for layer in range(4)]}, "Lie.json")
    result = cli("run", "-m", model(), *QUICK, "--strategies", "off,plan:Lie.json", "--json")
    row = result.rows["plan:Lie.json"]
    assert row["status"] != "ok"
    assert "the plan skips what" in row["message"]
    assert result.rows["off"]["status"] == "ok"
