"""`gcbench plan --emit` prints the choice as settings of each tool, or the best rival that the tool can express.

GCBENCH_REWRITE_GOLDEN=1 rewrites the golden texts, for review in the diff. test_export_words.py checks the texts
against each tool's settings, and test_export_real.py runs them with the libraries and counts what is recomputed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from processes import PROCESS_TIMEOUT_S

from gcbench import export, strategies
from gcbench.core.errors import UsageError
from gcbench.core.model_changes import ChangedConfig
from gcbench.export._base import Capabilities, stride_of
from gcbench.export._handover import SEARCHED, Handover, Rival
from gcbench.strategies import Plan, Policy

DATA = Path(__file__).parents[1] / "data" / "export"
NUM_LAYERS = 4
TARGETS = ("accelerate-fsdp", "axolotl", "llama-factory", "python", "torchtitan", "trainer", "trl")
FOUND_PLAN = Plan(
    num_layers=NUM_LAYERS,
    groups=((0,), (1,), (3,)),
    policies=(Policy(keep=("mm#0", "mm#3")), Policy(), Policy(offload=True)),
)


def rival(strategy: str, *, frac: float = 1.0, batch_size: int = 8, plan: Plan | None = None) -> Rival:
    return Rival(
        strategy=strategy,
        plan=plan or strategies.parse(strategy).plan_for(NUM_LAYERS),
        batch_size=batch_size,
        peak_bytes=70 * 2**30,
        tokens_per_s_frac=frac,
    )


RIVALS = (
    rival("selective:matmul", frac=0.985),
    rival("selective:attention", frac=0.96, batch_size=12),
    rival("every:2", frac=0.95, batch_size=6),
    rival("per-layer", frac=0.93, batch_size=16),
    rival("per-layer", frac=0.92, batch_size=12),
    rival("off", frac=0.71, batch_size=2),
)


def handover(choice: Rival | str, **changes: object) -> Handover:
    chosen = choice if isinstance(choice, Rival) else rival(choice, plan=FOUND_PLAN if choice == SEARCHED else None)
    given = Handover(
        model="llama-3.2-1b",
        hub_id="meta-llama/Llama-3.2-1B",
        choice=chosen,
        rivals=tuple(other for other in RIVALS if other.strategy != chosen.strategy),
        plan_file="found.json" if chosen.strategy == SEARCHED else None,
        seq_len=2048,
        precision="bf16",
        optim="adamw_torch",
        attn_implementation="sdpa",
        lora_r=None,
        lora_target_modules=None,
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def settings(text: str) -> dict[str, object]:
    """A YAML text's."""
    return yaml.safe_load(text)


def arguments(text: str) -> list[str]:
    """Those of a shell command, comments left out."""
    return shlex.split(text.replace("\\\n", " "), comments=True)


def flags(text: str) -> dict[str, str]:
    words = arguments(text)
    return {word: following for word, following in pairwise(words) if word.startswith("--")}


# Golden texts

CHOICES = ("off", "per-layer", "every:2", "selective:matmul", "offload", SEARCHED)


@pytest.mark.parametrize("target", TARGETS)
def test_the_texts_are_the_golden_ones(target):
    parts = []
    for choice in CHOICES:
        emitted = export.emit(target, handover(choice))
        parts.append(f"##### {choice} -> {emitted.expressed.strategy}\n##### {emitted.notice}\n{emitted.text}")
    text = "\n".join(parts)
    path = DATA / f"{target}.txt"
    if os.environ.get("GCBENCH_REWRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_target_has_golden_texts():
    assert export.names() == TARGETS


def test_there_is_no_other_target():
    with pytest.raises(KeyError):
        export.emit("megatron", handover("off"))


# What is expressed, and what that costs

EXPRESSED = {
    "accelerate-fsdp": {"off", "per-layer", "offload"},
    "llama-factory": {"off", "per-layer", "offload", "reentrant"},
    "torchtitan": {"off", "per-layer", "compile", "compile:0.5", "per-layer+compile"},
    "trainer": {"off", "per-layer", "offload", "reentrant", "every:2", "every:4", "selective:matmul"},
}
EXPRESSED["trainer"] |= {
    "every:2+offload",
    "every:2+reentrant",
    "every:3+selective:attention+offload",
    "selective:_softmax",
}
EXPRESSED["trl"] = EXPRESSED["trainer"]
EXPRESSED["axolotl"] = EXPRESSED["trainer"] - {"selective:_softmax"}
SPECS = sorted(
    EXPRESSED["trainer"]
    | EXPRESSED["torchtitan"]
    | {"first:2", "last:1", "segment:2", "selective:mm#1", "segment:2+offload", "selective:matmul+compile"}
)
EXPRESSED["python"] = set(SPECS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_tool_gets_exactly_the_plans_that_it_can_express(target):
    """The trap: a setting that the tool ignores, so that the run is not the planned one."""
    for spec in SPECS:
        choice = rival(spec)
        emitted = export.emit(target, handover(choice))
        assert (emitted.expressed is choice) == (spec in EXPRESSED[target]), spec
        assert (emitted.notice is None) == (emitted.expressed is choice), spec


def test_the_first_layer_alone_is_a_stride():
    """transformers' `every_n_layers` at the number of layers or above."""
    emitted = export.emit("trainer", handover("first:1"))
    assert emitted.expressed.strategy == "first:1"
    assert '"every_n_layers": 4' in emitted.text


def test_a_searched_plan_that_a_tool_can_express_is_expressed():
    plan = Plan(num_layers=NUM_LAYERS, groups=((0,), (2,)), policies=(Policy(keep=("mm",)),) * 2)
    emitted = export.emit("trainer", handover(rival(SEARCHED, plan=plan)))
    assert emitted.expressed.plan == plan and emitted.notice is None
    assert "every_n_layers=2" in emitted.text and '"aten::mm"' in emitted.text


def test_the_nearest_is_the_best_rival_that_can_be_expressed():
    """The traps: the simplest setting instead of the best, and the choice's batch in the rival's text."""
    emitted = export.emit("torchtitan", handover(SEARCHED))
    assert (emitted.expressed.strategy, emitted.expressed.batch_size) == ("per-layer", 16)
    assert flags(emitted.text)["--training.local_batch_size"] == "16"
    assert export.emit("trl", handover(SEARCHED)).expressed.strategy == "selective:matmul"


WHY = {
    "cannot choose which operators are saved": rival("selective:matmul"),
    "can only checkpoint all layers or none": rival("every:2"),
    "cannot recompute several layers as one": rival("segment:2"),
    "cannot recompute one layer differently from another": rival(SEARCHED, plan=FOUND_PLAN),
    "cannot offload layer inputs to host memory": rival("offload"),
    "cannot use torch's reentrant variant": rival("reentrant"),
    "cannot choose which calls of an operator are saved": rival("selective:mm#0"),
}


@pytest.mark.parametrize("why", WHY)
def test_the_notice_gives_the_reason_and_the_cost_of_the_nearest(why):
    notice = export.emit("torchtitan", handover(WHY[why])).notice
    cost = "the nearest it can express is per-layer at batch 16: 7.0 % fewer tokens/s."
    assert notice == f"torchtitan {why}; {cost}"


def test_the_notices_of_tools_with_more_settings():
    assert "can only choose every k-th layer" in str(export.emit("trl", handover("first:2")).notice)
    assert "cannot compile layer by layer" in str(export.emit("trl", handover("compile")).notice)
    assert "save _softmax alone" in str(export.emit("axolotl", handover("selective:_softmax")).notice)


@pytest.mark.parametrize(
    ("frac", "cost"),
    [(0.93, "7.0 % fewer"), (0.5, "50 % fewer"), (1.0, "as many"), (0.9999, "as many"), (1.02, "2.0 % more")],
)
def test_the_cost_is_reported_in_words(frac, cost):
    given = handover("segment:2", rivals=(rival("per-layer", frac=frac),))
    assert str(export.emit("trainer", given).notice).endswith(f"per-layer at batch 8: {cost} tokens/s.")


def test_where_nothing_that_fits_can_be_expressed_the_remedy_is_python():
    given = handover(SEARCHED, rivals=(rival("segment:2"), rival("selective:mm#0")))
    for target in TARGETS:
        if target != "python":
            with pytest.raises(UsageError, match=rf"--emit {target}: .* cannot .*; use --emit python"):
                export.emit(target, given)
    assert export.emit("python", given).notice is None


def test_an_unknown_field_of_a_policy_is_not_ignored():
    """The trap: a field that the exporter does not know, and leaves out silently."""
    skipping = Policy(keep=("mm",), skip=("mul#0",))
    plan = Plan(num_layers=2, groups=((0,), (1,)), policies=(skipping,) * 2)
    assert Capabilities(stride=True, keep=True, offload=True, reentrant=True).why_not(plan) is not None


@pytest.mark.parametrize(
    ("groups", "stride"),
    [
        ((), None),
        (((0,), (1,), (2,), (3,), (4,), (5,)), 1),
        (((0,), (2,), (4,)), 2),
        (((0,), (4,)), 4),
        (((0,), (5,)), 5),
        (((0,),), 6),
        (((1,),), None),
        (((1,), (3,), (5,)), None),  # torchtitan 0.2 counted so
        (((0,), (3,), (4,)), None),
        (((0,), (2,)), None),
        (((0,), (1,), (2,)), None),
        (((0, 1), (2, 3), (4, 5)), None),
        (((0,), (1, 2)), None),
    ],
)
def test_the_stride_of_a_plan(groups, stride):
    assert stride_of(Plan(num_layers=6, groups=groups)) == stride


# Imports


def test_a_text_is_written_without_torch():
    probe = (
        "import sys, test_export\n"
        "from gcbench import export\n"
        "[export.emit(name, test_export.handover('every:2')) for name in export.names()]\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/support'}:{ROOT / 'tests/export'}"},
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
    )
    assert done.stdout == "[]\n", done.stderr


def test_every_field_of_a_handover_changes_the_python_text():
    """A field that changes no text is one that no exporter reads."""
    other = {
        "model": "other",
        "hub_id": "other",
        "choice": rival("off", batch_size=3),
        "rivals": (),
        "plan_file": "other.json",
        "seq_len": 1,
        "precision": "fp32",
        "optim": "sgd",
        "attn_implementation": "eager",
        "lora_r": 2,
        "lora_target_modules": ("k_proj",),
        "model_changes": "num_hidden_layers=2",
        "config": ChangedConfig(fields={"num_hidden_layers": 2}, keeps_weights=True),
        "notes": ("something is added",),
        "model_notices": ("The checkpoint is another.",),
    }
    assert set(other) == {field.name for field in fields(Handover)}
    base = handover(SEARCHED, lora_r=1, hub_id=None)
    for name, value in other.items():
        if name != "rivals":
            given = replace(base, **{name: value})
            assert export.emit("python", given).text != export.emit("python", base).text, name
