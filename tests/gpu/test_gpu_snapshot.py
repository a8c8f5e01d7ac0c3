"""On a CUDA device: `gcbench run --snapshot` writes what PyTorch's own recorder saw of the memory step."""

from __future__ import annotations

import pickle

import pytest
import torch
from snapshots import curve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]

QUICK = ("--batch", 4, "--seq-len", 64, "--device", "cuda:0", "--rounds", 1, "--steps", 1, "--json")


def test_the_memory_step_is_recorded_from_its_start(cli, model, tmp_path):
    """The curve of requested bytes lies below the peak by what the allocator rounds up, parameters and states included.

    The traps: the warm-up in the recording, and a snapshot of the timed steps, which a cell of several rounds repeats.
    """
    result = cli(
        "run", "-m", model(), *QUICK, "--strategies", "off,per-layer", "--out", "run", "--snapshot", "s.pickle"
    )
    assert result.code == 0, result.err
    assert "https://pytorch.org/memory_viz" in result.err
    for strategy, row in result.rows.items():
        snapshot = pickle.loads((tmp_path / f"s-{strategy}.pickle").read_bytes())
        points, (trace,) = curve(snapshot), snapshot["device_traces"]
        assert 0.8 * row["peak_allocated_bytes"] < max(points) <= row["peak_allocated_bytes"]
        assert points[0] > 4 * row["num_params"], "parameters are missing"
        assert abs(points[-1] - points[0]) < 0.05 * max(points), "the recording is not of one step"
        names = {frame["name"] for entry in trace for frame in entry.get("frames", ())}
        assert {"forward", "backward"} <= names
        at_start = {
            frame["name"]
            for segment in snapshot["segments"]
            for block in segment["blocks"]
            for frame in block["frames"]
        }
        assert "build" in at_start, "parameters have no frames"


def test_a_step_that_runs_out_of_memory_is_recorded_to_its_end(cli, model, tmp_path):
    limit = "40MiB"
    result = cli(
        *("run", "-m", model(), *QUICK[2:], "--batch", 256, "--strategies", "off", "--memory-limit", limit),
        *("--out", "run", "--snapshot", "s.pickle"),
    )
    assert result.rows["off"]["status"] == "oom"
    (trace,) = pickle.loads((tmp_path / "s.pickle").read_bytes())["device_traces"]
    assert "oom" in [entry["action"] for entry in trace]
