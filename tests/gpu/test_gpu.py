"""On a CUDA device: a run reports what the allocator counted, which is measured here without gcbench's probe, worker
and timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT
from on_card import IS_EMULATED, assert_proven, needs_compiler, needs_values
from processes import PROCESS_TIMEOUT_S

from gcbench.report import report_file as reports

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]

BATCH_SIZE, SEQ_LEN = 4, 64
PLAIN_MEASUREMENT = """
import gc, json, sys
import torch
from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.training import step as training
folder, precision, strategy, batch_size, seq_len = json.loads(sys.argv[1])
source = sources.resolve(folder)
model = models.build(
    source,
    models.build_config(source, layers=None, overrides={}),
    device="cuda:0",
    dtype=training.parameter_dtype(precision),
    attn_implementation=None,
    seed=0,
)
num_layers = len(checkpointing.checkpointable_layers(model))
checkpointing.apply(model, strategies.parse(strategy).plan_for(num_layers))
batch = training.random_batch(model, batch_size=batch_size, seq_len=seq_len, seed=0)
step = training.TrainingStep(model, batch=batch, precision=precision, optim="adamw_torch", seed=0)
for _ in range(2):
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
step()
torch.cuda.synchronize()
print(json.dumps([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]))
"""


def plain_peak(*args: object) -> int:
    """`torch.cuda.max_memory_allocated` of the third step, in a process where nothing else has used the GPU."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_MEASUREMENT, json.dumps(args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_run_on_the_card_is_what_the_allocator_counted(cli, model, tmp_path, precision):
    """The traps: a peak that includes the building of the model, phases that show each other's peak, times read
    before the GPU was done, and a server process that has touched CUDA, after which no child can."""
    folder = model("llama")
    result = cli(
        *("run", "-m", folder, "--batch", BATCH_SIZE, "--seq-len", SEQ_LEN, "--precision", precision),
        *("--strategies", "off,per-layer,every:2", "--device", "cuda:0", "--rounds", 3, "--warmup", 2, "--steps", 3),
        *("--json", "--out", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    assert "CPU figures" not in result.err
    for strategy, row in result.rows.items():
        assert row["status"] == "ok"
        assert row["device"] == "cuda:0"
        assert row["peak_allocated_bytes"] == plain_peak(str(folder), precision, strategy, BATCH_SIZE, SEQ_LEN)
        phases = [row[f"peak_{phase}_bytes"] for phase in ("forward", "backward", "optimizer")]
        assert max(phases) == row["peak_allocated_bytes"] > min(phases) > 0
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"]
        assert row["peak_process_bytes"] is None or row["peak_process_bytes"] >= row["peak_reserved_bytes"]
        assert row["layers_recomputed"] == row["layers_checkpointed"]
        if IS_EMULATED:
            continue
        assert 0 < row["step_time_low_s"] <= row["step_time_s"] <= row["step_time_high_s"]
        assert row["tokens_per_s"] == pytest.approx(BATCH_SIZE * SEQ_LEN / row["step_time_s"])
    assert_proven(result.rows)
    peaks = [result.rows[strategy]["peak_allocated_bytes"] for strategy in ("per-layer", "every:2", "off")]
    assert peaks == sorted(peaks)
    stored = reports.load(tmp_path / "run")
    assert stored.machine.device_name == torch.cuda.get_device_name(0)
    assert stored.machine.device_memory_bytes == torch.cuda.get_device_properties(0).total_memory
    rounds = [r for outcome in stored.outcomes for r in outcome.rounds]
    assert [r.num_alloc_retries for r in rounds] == [0] * (3 if IS_EMULATED else 9)
    assert IS_EMULATED or all(len(r.step_times_s) == 3 and min(r.step_times_s) > 0 for r in rounds)


@pytest.mark.parametrize("family", tiny.CHECKPOINTING)
def test_every_family_is_proven_on_the_card(cli, model, family):
    result = cli(
        *("run", "-m", model(family), "--batch", BATCH_SIZE, "--seq-len", SEQ_LEN, "--device", "cuda"),
        *("--strategies", "off,per-layer,every:2", "--rounds", 2, "--steps", 1, "--json"),
    )
    assert result.code == 0, result.err
    assert_proven(result.rows)
    assert [row["layers_recomputed"] for row in result.rows.values()] == [0, 4, 2]


def test_two_runs_have_the_same_peaks(cli, model):
    found = []
    for _ in range(2):
        result = cli(
            *("run", "-m", model("gpt2"), "--batch", BATCH_SIZE, "--seq-len", SEQ_LEN, "--device", "cuda"),
            *("--strategies", "off,per-layer", "--rounds", 1, "--steps", 1, "--json"),
        )
        assert result.code == 0, result.err
        found.append({strategy: row["peak_allocated_bytes"] for strategy, row in result.rows.items()})
    assert found[0] == found[1]


def test_a_limit_between_the_strategies_lets_one_through(cli, model):
    """Sizes at which strategies differ by far more than the allocator's segments, which the limit applies to."""
    big = (
        *("run", "-m", model(hidden_size=512, intermediate_size=2048, num_hidden_layers=8)),
        *("--batch", 64, "--seq-len", 128, "--device", "cuda", "--rounds", 1, "--steps", 1),
        *("--strategies", "off,per-layer"),
    )
    free = cli(*big, "--json")
    assert free.code == 0, free.err
    enough = free.rows["per-layer"]["peak_reserved_bytes"]
    too_little = free.rows["off"]["peak_allocated_bytes"]
    assert enough < 0.8 * too_little
    result = cli(*big, "--memory-limit", (enough + too_little) // 2, "--json")
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["oom", "ok"]
    assert "memory ran out in the " in result.rows["off"]["message"]
    assert result.rows["per-layer"]["peak_allocated_bytes"] == free.rows["per-layer"]["peak_allocated_bytes"]


def test_a_card_that_is_not_there_is_named(cli, model):
    beyond = torch.cuda.device_count()
    result = cli("run", "-m", model(), "-b", 1, "--device", f"cuda:{beyond}")
    result.refused(3, f"'cuda:{beyond}' is not available", "--device cuda:0")


def test_env_names_the_card(cli):
    result = cli("env", "--device", "cuda", "--json")
    assert result.code == 0, result.err
    (row,) = result.document["rows"]
    assert row["device"] == "cuda:0" and row["device_name"] == torch.cuda.get_device_name(0)
    assert row["cuda"] and row["allocator_backend"]


STRATEGIES = {
    "off": 0,
    "per-layer": 4,
    "segment:2": 4,
    "first:1": 1,
    "last:1": 1,
    "selective:attention": 4,
    "selective:matmul": 4,
    "every:2+selective:matmul": 2,
    "offload": 4,
    "segment:2+offload": 4,
    "reentrant": 4,
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_strategy_is_proven_on_the_card(cli, model, family):
    """The trap: what only a GPU can do (layer inputs on the host, other attention kernels) has never run on a CPU."""
    result = cli(
        *("run", "-m", model(family), "--batch", BATCH_SIZE, "--seq-len", SEQ_LEN, "--device", "cuda"),
        *("--strategies", ",".join(STRATEGIES), "--rounds", 2, "--steps", 1, "--json"),
    )
    assert result.code == 0, result.err
    assert_proven(result.rows)
    assert {strategy: row["layers_recomputed"] for strategy, row in result.rows.items()} == STRATEGIES
    assert result.rows["offload"]["peak_forward_bytes"] <= result.rows["per-layer"]["peak_forward_bytes"]


@needs_compiler
def test_compiled_layers_are_proven_on_the_card(cli, model):
    result = cli(
        *("run", "-m", model("llama"), "--batch", BATCH_SIZE, "--seq-len", SEQ_LEN, "--device", "cuda"),
        *("--strategies", "off,compile,per-layer+compile,compile:0.5", "--rounds", 1, "--steps", 1, "--json"),
    )
    assert result.code == 0, result.err
    assert_proven(result.rows)


@needs_values
def test_a_check_on_the_card(cli, model):
    result = cli("check", "-m", model("gpt2"), "--full-size", "--device", "cuda", "--no-compile", "--json")
    assert result.code == 0, result.err
    assert {row["verdict"] for row in result.document["rows"] if row["strategy"] != "reentrant"} <= {
        "identical",
        "within noise",
    }
