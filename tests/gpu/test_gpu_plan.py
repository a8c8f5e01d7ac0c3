"""`gcbench plan` on a GPU: its choice runs there, fits, changes no gradient, and is measured by --measure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from on_card import assert_proven, needs_values
from tiny import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "max_position_embeddings": 2048,
}


def gcbench(*args, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "gcbench", *map(str, args)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_a_searched_plan_for_this_card_has_its_predicted_peak(tmp_path, precision):
    """The traps: a skipped call is needed by the GPU's kernels; the predicted peak is not the real one; a plan for any
    card of that memory is one for other attention kernels."""
    model = write_model(tmp_path / "model", "llama", **WIDE)
    workload = ("-m", model, "--seq-len", 1024, "--precision", precision, "--batch", 8)
    free = gcbench("plan", *workload, "--device", "auto", "--json", "--out", "free", cwd=tmp_path)
    peaks = {row["strategy"]: row["peak_bytes"] for row in free["rows"]}
    budget = (peaks["off"] + peaks["per-layer"]) // 2
    memory = ("--device", "auto", "--device-memory", budget, "--reserve", "1%")
    planned = gcbench("plan", *workload, *memory, "--json", "--out", "tight", cwd=tmp_path)
    spec = f"plan:{planned['plan_file']}"
    report = gcbench("run", *workload, "--strategies", f"off,{spec}", "--json", "--out", "run", cwd=tmp_path)
    off, found = report["rows"]
    assert_proven({row["strategy"]: row for row in report["rows"]})
    assert found["peak_allocated_bytes"] == pytest.approx(planned["choice"]["peak_allocated_bytes"], rel=0.02)
    assert found["peak_allocated_bytes"] < off["peak_allocated_bytes"]


@needs_values
def test_measuring_decides_on_the_card(tmp_path):
    """The traps: calls timed one after the other need more memory than the GPU has (the logits of a real vocabulary);
    strategies left out, as a forked copy of a process that has used CUDA cannot trace; a smaller device's fit decided
    by what the allocator caches on a larger one."""
    model = write_model(tmp_path / "model", "llama", **WIDE | {"vocab_size": 128_000})
    workload = ("-m", model, "--seq-len", 512, "--precision", "bf16", "--batch", "4,8")
    memory = ("--device", "auto", "--device-memory", "10GiB")
    planned = gcbench("plan", *workload, *memory, "--measure", "--json", "--out", "plan", cwd=tmp_path)
    assert planned["choice"]["source"] == "measured"
    assert not [notice for notice in planned["notices"] if "cannot be traced" in notice]
