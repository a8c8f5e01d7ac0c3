"""Whole scripts on an emulated card. Needs a CUDA build of torch in this environment, and no card."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gcbench.core.errors import UnavailableError
from gcbench.devices import cards
from gcbench.emulate.environment import environment

SCRIPTS = Path(__file__).parent / "scripts"
CARD = cards.find("rtx-4090")


@pytest.fixture(scope="module")
def emulated() -> dict[str, str]:
    try:
        return environment(CARD)
    except UnavailableError as err:
        pytest.skip(str(err))


def dry_run(*args: str, code: int = 0, cwd: Path | None = None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "gcbench", "dry-run", "--json", "--device", CARD.name, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=cwd,
    )
    assert done.returncode == code, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def command(script: str, *args: str) -> list[str]:
    return ["--", sys.executable, str(SCRIPTS / script), *args]


def peaks_without_observer(emulated: dict[str, str], script: str, *args: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *args],
        env=os.environ | emulated,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("allocated "))
    return [int(word) for word in line.split()[1::2]]


@pytest.mark.parametrize(
    ("script", "needs"),
    [
        ("plain_loop.py", ()),
        ("evaluates_and_saves.py", ()),
        ("trainer.py", ("datasets", "accelerate")),
        ("sft_trainer.py", ("trl", "peft")),
    ],
)
def test_peaks_are_those_of_the_script_alone(emulated, tmp_path, script, needs):
    for name in needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{script} needs {name}, which is not installed")
    args = [] if script == "plain_loop.py" else [str(tmp_path)]
    document = dry_run(*command(script, *args))
    assert document["observed"]["by_card"]["0"] == peaks_without_observer(emulated, script, *args)
    assert document["verdict"]["ending"] == "fits"


def test_the_scripts_own_reset_changes_no_phase(emulated):
    with_reset = dry_run(*command("plain_loop.py", "--read-peaks"))["rows"]
    assert with_reset == dry_run(*command("plain_loop.py"))["rows"]


@pytest.mark.parametrize("kind", ["on", "reentrant"])
def test_checkpointed_layers_are_counted(emulated, kind):
    seen = dry_run("--steps", "2", *command("plain_loop.py", "--checkpointing", kind))["observed"]
    assert (seen["later"]["layers_checkpointed"], seen["later"]["layers_recomputed"]) == (4, 4)
    assert (seen["num_steps"], seen["stopped"]["why"]) == (2, "steps")


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_out_of_memory_is_placed_in_its_phase(emulated, phase):
    document = dry_run("--device-memory", "2GiB", *command("out_of_memory.py", phase), code=1)
    (event,) = document["observed"]["out_of_memory"][-1:]
    assert event["phase"] == phase
    assert event["place"]["file"].endswith("out_of_memory.py")
    kinds = {group["kind"] for group in event["alive"]}
    assert {"parameters"} <= kinds
    assert phase != "optimizer" or {"gradients", "optimizer states"} <= kinds
    assert sum(group["bytes"] for group in event["alive"]) == event["allocated"]
    assert document["would_fit"]["sentence"].startswith("it cannot be planned")


def test_a_caught_error_is_told_apart(emulated):
    assert dry_run("--device-memory", "2GiB", *command("out_of_memory.py", "caught"))["verdict"]["ending"] == "fits"
    swallowed = dry_run("--device-memory", "2GiB", *command("out_of_memory.py", "swallowed"), code=1)
    assert swallowed["script_exit_code"] == 0


def test_neither_nan_nor_zero_stops_a_script(emulated):
    seen = dry_run(*command("odd_values.py"))["observed"]
    assert seen["num_steps"] == 3
    assert "mask" in {read["kind"] for read in seen["reads"]}


def test_a_loop_until_the_loss_is_small_is_ended(emulated):
    seen = dry_run(*command("until_loss.py"))["observed"]
    assert seen["stopped"]["why"] == "endless" and seen["stopped"]["line"] == 10


def test_evaluation_saving_and_micro_batches_are_told(emulated, tmp_path):
    document = dry_run(*command("evaluates_and_saves.py", str(tmp_path)))
    seen = document["observed"]
    assert {"evaluation", "save"} <= seen["outside"].keys()
    assert seen["first"]["backwards"] == 2
    assert seen["saved_files"] == [str(tmp_path / f"epoch-{number}.pt") for number in range(2)]


def test_what_would_fit_is_planned(emulated, tmp_path):
    document = dry_run(
        "--device-memory", "2GiB", "--out", str(tmp_path / "out"), *command("plain_loop.py", "--batch", "512"), code=1
    )
    found = document["would_fit"]
    assert found["strategy"] is not None and found["peak_bytes"] < 2 * 2**30
    assert (tmp_path / "out" / "dry-run.txt").exists() and (tmp_path / "out" / "config.json").exists()


def test_the_time_of_a_step_is_predicted(emulated):
    time = dry_run(*command("plain_loop.py"))["time"]
    assert time["why_not"] is None and time["low_s"] < time["seconds"] < time["high_s"]


def test_a_snapshot_is_pytorchs_own(emulated, tmp_path):
    import pickle

    file = tmp_path / "s.pickle"
    dry_run("--steps", "1", "--snapshot", str(file), *command("plain_loop.py"))
    snapshot = pickle.loads(file.read_bytes())
    assert snapshot["segments"] and snapshot["device_traces"][0]


def test_a_second_card_is_a_matter_of_a_flag(emulated, tmp_path):
    script = tmp_path / "second.py"
    script.write_text("import torch\ntorch.ones(4, device='cuda:1')\n", encoding="utf-8")
    asked = ["--", sys.executable, str(script)]
    refused = dry_run(*asked, code=3)
    assert "add --num-devices 2" in refused["verdict"]["sentence"]
    assert dry_run("--num-devices", "2", *asked)["observed"]["by_card"]["1"][0] == 512
