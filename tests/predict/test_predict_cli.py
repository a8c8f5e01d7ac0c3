"""`gcbench predict` through the real command line: what `gcbench run` measures; bad input is one sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, table
from snapshots import curve

from gcbench.core.units import GIB
from gcbench.report import report_file as reports
from gcbench.report.rows import columns

QUICK = ("--batch", 2, "--seq-len", 16, "--device", "cpu", "--strategies", "off,per-layer")
SCALARS_BYTES = 256
"""What is left between a trace and a run: single numbers that real operators make and fake ones do not."""


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("gpt2", ("--strategies", "off,per-layer")),
        ("llama", ("--strategies", "off,every:2", "--layers", 8, "--lora-r", 4)),
    ],
)
def test_a_prediction_for_the_cpu_is_what_a_run_measures_there(cli, model, family, flags):
    """The promise of the command; with dropout and tied weights, and with adapters, a stride and layers left out."""
    arguments = ("-m", model(family), "--batch", 4, "--seq-len", 32, "--device", "cpu", *flags, "--json")
    predicted = cli("predict", *arguments)
    measured = cli("run", *arguments, "--rounds", 1, "--steps", 1)
    assert (predicted.code, measured.code) == (0, 0), predicted.err + measured.err
    assert list(predicted.rows) == list(measured.rows) == flags[1].split(",")
    for strategy, forecast in predicted.rows.items():
        truth = measured.rows[strategy]
        assert forecast["peak_phase"] == truth["peak_phase"]
        for column in ("allocated", "forward", "backward", "optimizer"):
            difference = forecast[f"peak_{column}_bytes"] - truth[f"peak_{column}_bytes"]
            assert abs(difference) <= SCALARS_BYTES, (strategy, column)
        shared = ("model", "device", "attn_implementation", "num_params", "num_layers", "layers_checkpointed", "lora_r")
        assert {name: forecast[name] for name in shared} == {name: truth[name] for name in shared}
        assert forecast["memory_saved_frac"] == pytest.approx(truth["memory_saved_frac"], abs=1e-3)


def test_a_grid_is_predicted_in_the_order_of_the_tables(cli, model):
    """Two batches, two lengths, two strategies: one document on standard output, with the columns of a run."""
    arguments = ("--batch", "1,3", "--seq-len", "8,16", "--strategies", "off,per-layer", "--device", "cpu")
    result = cli("predict", "-m", model(), *arguments, "--json")
    assert result.code == 0, result.err
    rows = result.document["rows"]
    assert all(tuple(row) == columns() for row in rows)
    assert [(row["batch_size"], row["seq_len"], row["strategy"]) for row in rows] == [
        (batch, length, strategy) for batch in (1, 3) for length in (8, 16) for strategy in ("off", "per-layer")
    ]
    assert {(row["source"], row["status"]) for row in rows} == {("predicted", "ok")}
    peaks = [row["peak_allocated_bytes"] for row in rows if row["strategy"] == "off"]
    assert sorted(set(peaks)) == peaks
    assert "nothing was run there" in result.err


def test_a_prediction_is_stored_and_shown_again(cli, model, tmp_path):
    """The trap: `report` takes it for a measurement, and finds neither times nor proof."""
    folder = tmp_path / "run"
    result = cli("predict", "-m", model(), *QUICK, "--explain", "--out", folder)
    assert result.code == 0, result.err
    assert str(folder) in result.err
    assert {path.name for path in folder.iterdir()} == {"report.json", "table.csv", "report.md", "plots"}
    assert {path.suffix for path in (folder / "plots").iterdir()} == {".png"}
    report = reports.load(folder)
    assert report.source == "predicted" and report.settings["explain"] is True
    again = cli("report", folder)
    assert again.code == 0
    assert "Predicted, not measured" in again.out
    assert again.out.split() == result.out.split()
    rows = cli("report", folder, "--json").document["rows"]
    stored = table(folder)
    assert {row["strategy"]: str(row["peak_allocated_bytes"]) for row in rows} == {
        strategy: row["peak_allocated_bytes"] for strategy, row in stored.items()
    }
    assert {row["source"] for row in stored.values()} == {"predicted"}
    assert cli("report", folder, "--format", "markdown").out == (folder / "report.md").read_text()


def test_what_does_not_fit_is_a_result(cli, model):
    """Exit 1, as in `plan`, since nothing can be run; the figures stay, so that one sees how far off each is."""
    result = cli("predict", "-m", model(), *QUICK, "--device-memory", "100KiB", "--json")
    assert result.code == 1, result.err
    for row in result.rows.values():
        assert (row["status"], row["source"]) == ("oom", "predicted")
        assert row["device_memory_bytes"] == 100 << 10
        assert row["spare_bytes"] == (100 << 10) - row["peak_allocated_bytes"] < 0
        assert "and there are 100 KiB" in row["message"]
        assert row["fits"] == "no"


def test_a_card_needs_no_card(cli, model):
    """Named as in the catalogue, with what its process takes beside the allocator."""
    result = cli("predict", "-m", model(), *QUICK[:-4], "--device", "RTX-4090", "--strategies", "off", "--json")
    assert result.code == 0, result.err
    row = result.rows["off"]
    assert row["device"] == "rtx-4090"
    assert row["peak_process_bytes"] > row["peak_reserved_bytes"] >= row["peak_allocated_bytes"]
    assert row["spare_bytes"] == row["device_memory_bytes"] - row["peak_process_bytes"] > 20 * GIB


def peak_of(snapshot: Path) -> int:
    """The highest point of the viewer's curve."""
    return max(curve(pickle.loads(snapshot.read_bytes())))


def test_a_memory_snapshot_shows_the_predicted_peak(cli, model, tmp_path):
    """One cell has the file that was named, each of several its own; what does not fit is shown whole."""
    arguments = ("-m", model(), *QUICK[:-4], "--device", "rtx-4090", "--json")
    one = cli("predict", *arguments, "--strategies", "per-layer", "--snapshot", "new/step.pickle")
    assert one.code == 0, one.err
    assert f"Memory snapshot for https://pytorch.org/memory_viz: {tmp_path / 'new/step.pickle'}" in one.err
    assert peak_of(tmp_path / "new/step.pickle") == one.rows["per-layer"]["peak_allocated_bytes"]
    two = cli(
        "predict", *arguments, "--strategies", "off,every:2", "--device-memory", "256MiB", "--snapshot", "s.pickle"
    )
    assert [row["status"] for row in two.rows.values()] == ["oom", "oom"]  # the context of a process alone is larger
    for strategy, name in (("off", "s-off.pickle"), ("every:2", "s-every-2.pickle")):
        assert peak_of(tmp_path / name) == two.rows[strategy]["peak_allocated_bytes"]
    assert sorted(path.name for path in tmp_path.glob("*.pickle")) == ["s-every-2.pickle", "s-off.pickle"]


def test_the_snapshots_of_several_workloads_are_named_in_full(cli, model, tmp_path):
    arguments = ("--batch", "1,2", "--seq-len", 8, "--strategies", "off", "--device", "t4", "--quiet")
    result = cli("predict", "-m", model(), *arguments, "--snapshot", "s.pickle")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in tmp_path.glob("s*")) == ["s-b1-s8-off.pickle", "s-b2-s8-off.pickle"]


def test_a_config_file_with_flags_on_top(cli, model, tmp_path):
    """Settings of a measurement are passed over, so that one file does for both."""
    (tmp_path / "run.toml").write_text(
        f'model = "{model()}"\nbatch_size = 2\nseq_len = 16\nstrategies = ["off"]\ndevice = "cpu"\n'
        'rounds = 5\nmemory_limit = "1GiB"\n'
    )
    result = cli("predict", "--config", "run.toml", "--strategies", "per-layer", "--json")
    assert result.code == 0, result.err
    assert list(result.rows) == ["per-layer"]
    assert result.rows["per-layer"]["device_memory_bytes"] == GIB


def test_the_device_memory_of_a_flag_wins_over_that_of_the_file(cli, model, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'model = "{model()}"\nbatch_size = 2\nseq_len = 16\ndevice = "cpu"\ndevice_memory = "1GiB"\n'
    )
    arguments = ("--config", "run.toml", "--strategies", "off")
    assert cli("predict", *arguments, "--json").rows["off"]["device_memory_bytes"] == GIB
    result = cli("predict", *arguments, "--device-memory", "2GiB", "--json")
    assert result.code == 0, result.err
    assert result.rows["off"]["device_memory_bytes"] == 2 * GIB


# What cannot be predicted

LONGCAT = {
    **tiny.CONFIGS["llama"],
    "model_type": "longcat_flash",
    "num_key_value_heads": 4,
    "num_layers": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 32,
}


def test_a_model_that_reads_values_is_reported_as_unsupported(cli, tmp_path):
    """Exit 0, a row for each cell, and no trace of torch's own error. It can be measured."""
    (tmp_path / "config.json").write_text(json.dumps(LONGCAT))
    result = cli("predict", "-m", tmp_path, *QUICK, "--json", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert list(result.rows) == ["off", "per-layer"]
    for row in result.rows.values():
        assert row["status"] == "unsupported"
        assert row["peak_allocated_bytes"] is None
        assert row["message"] == (
            "its code reads values of tensors, and fake tensors have none; measure it with gcbench run"
        )
    assert table(tmp_path / "run")["off"]["status"] == "unsupported"


def test_a_model_that_cannot_checkpoint_is_predicted_without(cli, model):
    result = cli("predict", "-m", model("ctrl"), *QUICK, "--json")
    assert result.code == 0, result.err
    assert [row["status"] for row in result.rows.values()] == ["ok", "unsupported"]
    assert result.rows["off"]["peak_allocated_bytes"] > 0
    assert "does not support gradient checkpointing" in result.rows["per-layer"]["message"]


# Bad input: one sentence with its remedy, the exit code, nothing left behind


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--device", "rtx4091"), 3, ("there is no device 'rtx4091'", "near names: rtx-4090")),
        (("--device", "quantum"), 3, ("there is no device 'quantum'", "gcbench devices lists all known devices")),
        (("--device-memory", "8 bananas"), 2, ("--device-memory: '8 bananas'", "write it like 8GiB")),
        (("--device-memory", "0"), 2, ("--device-memory", "leaves no memory at all")),
        (("--device-memory", "-1GiB"), 2, ("--device-memory: '-1GiB'",)),
        (("--seq-len", 129), 2, ("--seq-len 129 is beyond the 128 positions", "shorten it")),
        (("--strategies", "everything"), 2, ("there is no strategy 'everything'", "did you mean every?")),
        (("--strategies", "every:9"), 2, ("every:9 needs at least 9 layers and the model has 4",)),
        (("--lora-r", 4, "--lora-target-modules", "nothing"), 2, ("no module 'nothing'", "q_proj")),
        (("--device-file", "none.toml", "--device", "x"), 2, ("there is no device file none.toml",)),
        (("--attn-implementation", "sdpaa"), 2, ("sdpaa", "leave the flag out")),
        (("--set", "hiden_size=8"), 2, ("no such field", "hidden_size")),
        (("--rounds", 3), 2, ("--rounds",)),
        (("--snapshot", "s.pickle"), 2, ("--snapshot", "the device is a CPU", "gcbench devices lists them")),
        (("--snapshot", "."), 2, ("--snapshot . cannot be written (it is a folder)", "choose another file")),
    ],
)
def test_bad_input_is_one_sentence(cli, model, tmp_path, flags, code, message):
    result = cli("predict", "-m", model(), *QUICK, "--out", tmp_path / "run", *flags)
    result.refused(code, *message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("garbage = = 1", "is not valid TOML"),
        ('[[card]]\nname = "x"\n', "card 1 (x): memory_bytes is missing"),
        ('[[card]]\nname = "x"\nmemory_bytes = 24\n', "24 is 24 bytes; did you mean 24GiB?"),
        ("", "describes no device"),
    ],
)
def test_a_device_file_with_a_mistake(cli, model, tmp_path, text, message):
    (tmp_path / "cards.toml").write_text(text)
    result = cli("predict", "-m", model(), *QUICK, "--device", "x", "--device-file", "cards.toml")
    result.refused(2, message)


def test_a_name_in_the_config_file_that_is_none(cli, model, tmp_path):
    (tmp_path / "run.toml").write_text(f'model = "{model()}"\nbatch_size = 2\ndevice = 4090\n')
    cli("predict", "--config", "run.toml").refused(2, "--device: 4090 is not a name", "write it as text")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_the_card_of_a_machine_without_one(cli, model, tmp_path):
    result = cli("predict", "-m", model(), *QUICK, "--device", "cuda", "--out", tmp_path / "run")
    result.refused(3, "'cuda'", "--device cpu")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_in_the_catalogue_is_reported_at_once(cli_process, model):
    """The trap: seconds of importing torch before a typo is told. A broken torch is not even noticed."""
    folder = model()
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    env = {"PYTHONPATH": f"{folder}:{ROOT}"}
    cli_process("predict", "-m", folder, *QUICK, "--device", "rtx4091", env=env).refused(3, "near names: rtx-4090")


def test_a_folder_that_is_not_empty_is_left_alone(cli, model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = cli("predict", "-m", model(), *QUICK, "--out", tmp_path / "run")
    result.refused(2, "exists and is not empty", "choose another --out")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
