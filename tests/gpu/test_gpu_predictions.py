"""On a CUDA device: `predict` agrees with what `run` measures there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from processes import PROCESS_TIMEOUT_S

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]

STRATEGIES = "off,per-layer,every:2,segment:2,first:2,selective:matmul,selective:attention,offload,reentrant"
TOLERATED = 0.03
"""Relative error of the allocated peak: the limit for the 95th percentile of the grid."""


def rows(command, *args):
    done = subprocess.run(
        [sys.executable, "-m", "gcbench", command, "--json", "--quiet", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        check=True,
    )
    return {row["strategy"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("model", ["gpt2", "llama-3.2-1b"])
def test_a_prediction_is_what_the_card_measures(tmp_path, model, precision):
    workload = (
        *("--model", model, "--batch", "2", "--seq-len", "512", "--layers", "6"),
        *("--precision", precision, "--strategies", STRATEGIES, "--device", "cuda"),
    )
    measured = rows("run", *workload, "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "run"))
    predicted = rows("predict", *workload)
    for strategy, row in measured.items():
        measured_peak, predicted_peak = row["peak_allocated_bytes"], predicted[strategy]["peak_allocated_bytes"]
        assert abs(predicted_peak / measured_peak - 1) <= TOLERATED, (strategy, predicted_peak, measured_peak)
        assert predicted[strategy]["peak_phase"] == row["peak_phase"]
