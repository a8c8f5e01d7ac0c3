"""What a script trains becomes a call of `gcbench plan`, or a sentence that says why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dry_runs import observed

from gcbench.cli import app as command_line
from gcbench.dry_run import would_fit
from gcbench.dry_run.records import Workload

SEEN = observed().workload


def test_the_call_describes_the_training():
    lora = replace(SEEN, peft_type="LORA", lora_r=8, lora_target_modules=("q_proj", "v_proj"), num_trainable=1)
    assert would_fit.why_no_plan(lora) is None
    called = would_fit.arguments(lora, Path("config.json"), ["--device", "rtx-4090"])
    assert " ".join(called) == (
        "plan --model config.json --batch 1,3,4,6,12 --seq-len 512 --precision bf16 --optim adamw_torch "
        "--attn-implementation sdpa --lora-r 8 --lora-target-modules q_proj,v_proj --device rtx-4090"
    )


def test_its_options_are_those_of_plan():
    lora = replace(SEEN, lora_r=8, lora_target_modules=("q_proj",))
    called = would_fit.arguments(lora, Path("config.json"), ["--device", "x", "--device-memory", "1B"])
    options = {word for word in called if word.startswith("--")}
    assert options <= command_line._options()["plan"]


@pytest.mark.parametrize(
    ("dtype", "autocast", "name"),
    [
        ("float32", None, "fp32"),
        ("float32", "bfloat16", "bf16-mixed"),
        ("float32", "float16", "fp16-mixed"),
        ("bfloat16", "bfloat16", "bf16"),
        ("float16", None, None),
    ],
)
def test_the_precision_has_gcbenchs_name(dtype, autocast, name):
    assert would_fit.precision(replace(SEEN, dtype=dtype, autocast=autocast)) == name


@pytest.mark.parametrize(("batch", "sizes"), [(1, (1,)), (7, (1, 7)), (12, (1, 3, 4, 6, 12)), (64, (1, 8, 16, 32, 64))])
def test_smaller_batches_divide_the_scripts(batch, sizes):
    assert would_fit.batch_sizes(batch) == sizes


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"config": None}, "is not a Hugging Face model"),
        ({"causal_lm": False}, "is not a causal language model"),
        ({"quantized": True}, "quantised"),
        ({"optimizer": "Muon"}, "Muon"),
        ({"seq_len": None}, "shape of its inputs"),
        ({"dtype": "float16"}, "float16"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"num_trainable": 3}, "some of the parameters"),
    ],
)
def test_what_cannot_be_planned_is_said(changes, word, tmp_path):
    found = would_fit.plan(replace(SEEN, **changes), [], {}, folder=tmp_path, keep=None)
    assert found.strategy is None and found.sentence is not None and word in found.sentence


def row(strategy: str, batch: int, speed: float, status: str = "ok") -> dict[str, object]:
    return {
        "strategy": strategy,
        "batch_size": batch,
        "status": status,
        "tokens_per_s": speed,
        "peak_bytes": 1000 * batch,
        "peak_allocated_bytes": 900 * batch,
        "source": "predicted",
    }


def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, document: object, workload: Workload = SEEN):
    config = tmp_path / "seen.json"
    config.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(would_fit, "importable", lambda emulated: {})
    monkeypatch.setattr(would_fit, "run_gcbench", lambda arguments, environment: document)
    return would_fit.plan(replace(workload, config=str(config)), [], {}, folder=tmp_path, keep=tmp_path / "kept")


def test_the_choice_and_the_best_at_the_scripts_own_batch_are_told(monkeypatch, tmp_path):
    choice = row("off", 4, 90.0)
    rows = [choice, row("per-layer", 12, 50.0), row("every:2", 12, 60.0), row("off", 12, 99.0, "oom")]
    found = planned(monkeypatch, tmp_path, {"choice": choice, "rows": rows})
    assert (found.strategy, found.batch_size, found.peak_bytes) == ("off", 4, 4000)
    assert (found.same_batch_strategy, found.same_batch_peak_bytes) == ("every:2", 12000)
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == {}
    assert found.command is not None and "kept/config.json" in found.command


def test_where_nothing_fits_the_least_is_told(monkeypatch, tmp_path):
    found = planned(monkeypatch, tmp_path, {"choice": None, "rows": [], "smallest_peak_bytes": 77})
    assert (found.sentence, found.peak_bytes) == ("no setting fits", 77)


def test_a_plan_that_failed_says_why(monkeypatch, tmp_path):
    assert planned(monkeypatch, tmp_path, "no such model").sentence == "it cannot be planned: no such model"
