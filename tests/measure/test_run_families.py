"""`gcbench run` from the command line to the run folder, on a tiny model of each family."""

from __future__ import annotations

import json

import pytest
import tiny
from conftest import table

from gcbench.report import report_file as reports

pytestmark = pytest.mark.slow

COLUMNS = (
    "model,strategy,status,device,batch_size,seq_len,precision,optim,attn_implementation,num_params,num_layers,"
    "layers_checkpointed,peak_allocated_bytes,peak_reserved_bytes,peak_process_bytes,peak_phase,step_time_s,"
    "step_time_low_s,step_time_high_s,tokens_per_s,memory_saved_frac,time_overhead_frac,grad_rel_diff,source,message"
)
"""Those that people's scripts rely on, in this order; new ones go behind."""
QUICK = ("--rounds", 1, "--steps", 1, "--device", "cpu")
RECOMPUTED = {"off": 0, "per-layer": 4, "every:2": 2}


@pytest.mark.parametrize("family", tiny.CHECKPOINTING)
def test_every_family_is_measured_and_proven(cli, model, tmp_path, family):
    """The trap: a layer that ignores its flag, or a recompute that draws other dropout masks, saves memory on paper."""
    folder = tmp_path / "run"
    result = cli(
        *("run", "--model", model(family), "--batch", 8, "--seq-len", 64, "--strategies", "off,per-layer,every:2"),
        *(*QUICK, "--rounds", 2, "--json", "--out", folder),
    )
    assert result.code == 0, result.err
    rows = result.rows
    assert list(rows) == ["off", "per-layer", "every:2"]
    for strategy, row in rows.items():
        assert row["status"] == "ok"
        assert row["layers_checkpointed"] == row["layers_recomputed"] == RECOMPUTED[strategy]
        assert row["grad_rel_diff"] == 0.0
        assert row["proof"] == "identical"
        assert row["params_without_grad"] == 0
        assert row["num_layers"] == tiny.NUM_LAYERS
        assert row["step_time_s"] > 0
        assert row["peak_reserved_bytes"] is None
        phases = [row[f"peak_{phase}_bytes"] for phase in ("forward", "backward", "optimizer")]
        assert max(phases) == row["peak_allocated_bytes"] < row["peak_process_bytes"]
    assert rows["per-layer"]["peak_allocated_bytes"] < rows["every:2"]["peak_allocated_bytes"]
    assert rows["every:2"]["peak_allocated_bytes"] < rows["off"]["peak_allocated_bytes"]
    assert (rows["off"]["attn_implementation"] is None) == (family == "mamba")

    stored = reports.load(folder)
    assert [[len(result.turns) for result in outcome.rounds] for outcome in stored.outcomes] == [[2]] * 3
    assert (folder / "table.csv").read_text().startswith(f"{COLUMNS},")
    assert table(folder)["per-layer"]["peak_allocated_bytes"] == str(rows["per-layer"]["peak_allocated_bytes"])
    assert (folder / "report.md").read_text()
    plots = sorted((folder / "plots").glob("*.png"))
    assert len(plots) == 2 and all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp16-mixed"])
def test_every_precision_is_proven(cli, model, precision):
    """The trap: fp16's scaler skips its first steps, so a memory step read too early has no optimizer state in it."""
    result = cli(
        *("run", "-m", model("gpt2"), *QUICK, "-b", 4, "--seq-len", 32, "--strategies", "off,per-layer"),
        *("--precision", precision, "--json"),
    )
    assert result.code == 0, result.err
    assert [row["proof"] for row in result.rows.values()] == ["identical", "identical"]
    num_params = result.rows["off"]["num_params"]
    states_and_parameters = 3 * num_params * (2 if precision == "bf16" else 4)
    assert result.rows["off"]["peak_optimizer_bytes"] > states_and_parameters


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_every_optimizer_runs(cli, model, optim):
    result = cli(
        *("run", "-m", model(), *QUICK, "-b", 2, "--seq-len", 16, "--strategies", "off,per-layer"),
        *("--optim", optim, "--json"),
    )
    assert result.code == 0, result.err
    assert [row["optim"] for row in result.rows.values()] == [optim, optim]


def test_the_model_can_be_changed_and_its_lists_follow(cli, model):
    """The trap: `layer_types` of Gemma 2 has one entry a layer; left alone, six layers find four."""
    result = cli(
        *("run", "-m", model("gemma2"), *QUICK, "-b", 1, "--seq-len", 16, "--strategies", "off,every:6"),
        *("--layers", 6, "--set", "intermediate_size=128", "--json"),
    )
    assert result.code == 0, result.err
    off = result.rows["off"]
    assert off["num_layers"] == 6
    hidden, heads_times_dim, kv = 32, 4 * 8, 2 * 8
    layer = hidden * (2 * heads_times_dim + 2 * kv) + 3 * hidden * 128 + 4 * hidden
    assert off["num_params"] == 256 * hidden + 6 * layer + hidden


def test_pretrained_weights_are_the_ones_that_are_trained(cli, model, tmp_path):
    """The trap: `--pretrained` accepted and random weights trained: the gradients would be those of a plain run."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(model())).save_pretrained(model())
    checksums = []
    for extra in ([], ["--pretrained"], ["--pretrained"]):
        folder = tmp_path / f"run-{len(checksums)}"
        result = cli(
            *("run", "-m", model(), *QUICK, "-b", 1, "--seq-len", 16, "--strategies", "off"),
            *("--out", folder, *extra),
        )
        assert result.code == 0, result.err
        assert ("Weights are random" in result.err) == (not extra)
        checksums.append(reports.load(folder).outcomes[0].rounds[0].grad_checksum)
    assert checksums[0] != checksums[1] == checksums[2]


def test_decisions_made_for_the_user_are_reported(cli, model, tmp_path):
    """Defaults that depend on the device or the model, and strategies left out, are shown and stored in the report."""
    folder = tmp_path / "run"
    result = cli("run", "-m", model(num_hidden_layers=2), *QUICK, "-b", 1, "--out", folder)
    assert result.code == 0, result.err
    for words in ("64 tokens, the default", "CPU figures", "Weights are random", "every:4 needs at least 4 layers"):
        assert words in result.err, result.err
    stored = reports.load(folder)
    assert [outcome.cell.strategy for outcome in stored.outcomes] == ["off", "per-layer", "every:2"]
    assert stored.settings["seq_len"] == [64] and stored.settings["strategies"] == ["off", "per-layer", "every:2"]
    assert any("every:4" in notice for notice in stored.notices)
    assert "per-layer" in result.out and "identical" in result.out
    assert json.loads((folder / "report.json").read_text())["command"].startswith("gcbench run -m ")


def test_the_default_length_never_exceeds_the_models(cli, model):
    result = cli(
        *("run", "-m", model(max_position_embeddings=24), *QUICK, "-b", 1, "--strategies", "off", "--json"),
    )
    assert result.code == 0, result.err
    assert result.rows["off"]["seq_len"] == 24


def test_several_batches_and_lengths_make_a_table_each(cli, model):
    result = cli(
        *("run", "-m", model(), "--batch", "1,2", "--seq-len", "16,32", "--strategies", "off,per-layer"),
        *(*QUICK, "--json"),
    )
    assert result.code == 0, result.err
    cells = [(row["batch_size"], row["seq_len"], row["strategy"]) for row in result.document["rows"]]
    assert cells == [(b, s, strategy) for b in (1, 2) for s in (16, 32) for strategy in ("off", "per-layer")]
    assert all(row["proof"] == "identical" for row in result.document["rows"])


@pytest.mark.parametrize("family", tiny.REFUSING)
def test_a_model_that_cannot_checkpoint_keeps_its_off_row(cli, model, family):
    """Unsupported is a result: exit 0, and what can be measured is measured."""
    result = cli(
        *("run", "-m", model(family), "-b", 2, "--seq-len", 16, "--strategies", "off,per-layer,every:2"),
        *(*QUICK, "--json"),
    )
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["ok", "unsupported", "unsupported"]
    assert result.rows["off"]["peak_allocated_bytes"] > 0
    assert "does not support gradient checkpointing" in result.rows["per-layer"]["message"]
    assert result.rows["per-layer"]["step_time_s"] is None
