"""On a CUDA device: what `predict` says of it is what `run` measures there."""

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
"""Of the allocated peak: the bar for the 95th percentile of the grid."""


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
        there, said = row["peak_allocated_bytes"], predicted[strategy]["peak_allocated_bytes"]
        assert abs(said / there - 1) <= TOLERATED, (strategy, said, there)
        assert predicted[strategy]["peak_phase"] == row["peak_phase"]
