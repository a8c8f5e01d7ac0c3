"""`gcbench plan` end to end: answers, settings for tools, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny import write_model

from gcbench.plan import view
from gcbench.plan.decision import Candidate
from gcbench.strategies import Plan
from gcbench.strategies.plan_file import of_json

pytestmark = pytest.mark.slow

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plan") / "llama", "llama", num_hidden_layers=4)


def plan(*flags, cwd, env_home):
    return subprocess.run(
        [sys.executable, "-m", "gcbench", "plan", *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=env_home,
        timeout=300,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    import os

    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "120"}
    return lambda *flags: plan(*flags, cwd=tmp_path, env_home=env)


def test_an_answer_for_a_card_fits_and_can_be_used(run, model, tmp_path):
    """The whole pipeline: decision, plan file, plot, and a plan that gcbench itself predicts to fit."""
    done = run("-m", model, "--seq-len", "64", "--device", "rtx-4090", "--batch", "4,8", "--json", "--out", "p")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    choice = document["choice"]
    assert choice["status"] == "ok" and choice["peak_bytes"] <= choice["usable_bytes"]
    assert {row["batch_size"] for row in document["rows"]} == {4, 8}
    assert choice["tokens_per_s"] == max(row["tokens_per_s"] for row in document["rows"] if row["status"] == "ok")
    assert of_json(json.loads((tmp_path / "p" / "plan.json").read_text())) == of_json(document["plan"])
    assert {path.name for path in (tmp_path / "p").iterdir()} >= {"plan.md", "plan.txt", "decision.json", "plots"}
    assert (tmp_path / "p" / "plots" / "frontier.png").stat().st_size > 10_000


def test_a_card_of_which_only_the_memory_is_known_is_not_called_by_this_machines_name(run, model):
    done = run(
        "-m", model, "--seq-len", "64", "--device-memory", "1GiB", "--batch", "2", "--strategies", "off", "--out", "p"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("adamw_torch on a CUDA device, 1.00 GiB")
    assert "Predicted for a CUDA device of 1.00 GiB; nothing was run there." in done.stderr


@pytest.mark.parametrize(("rate", "words"), [(102.0, "2.0 % more tokens/s"), (98.0, "2.0 % fewer tokens/s")])
def test_slower_is_not_called_more(rate, words):
    """The trap: of settings within half a percent the simplest is chosen, and "−0.5 % more" is said of it."""
    off, found = (
        Candidate(
            strategy=strategy, plan=Plan(num_layers=2), batch_size=2, peak_bytes=1, allocated_bytes=1, peak_phase=None,
            fits=True, step_time_s=1.0, tokens_per_s=tokens_per_s,
        )
        for strategy, tokens_per_s in (("off", 100.0), ("plan", rate))
    )  # fmt: skip
    decision = SimpleNamespace(candidates=(off, found), times_from="somewhere")
    assert view._speed(found, decision).startswith(f"{words} than off at batch 2; ")


def test_a_budget_below_everything_names_the_smallest_peak_and_ends_with_1(run, model):
    done = run(
        "-m", model, "--seq-len", "64", "--device", "cpu", "--device-memory", "1MiB", "--batch", "2", "--out", "p"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: nothing fits into 1.00 MiB, the smallest peak is ")
    assert "a device of" in done.stderr and "smallest peak" in done.stdout


def test_settings_for_a_tool_are_alone_on_standard_output(run, model):
    done = run(
        *("-m", model, "--seq-len", "64", "--device", "rtx-4090", "--batch", "2"),
        *("--strategies", "off,per-layer", "--emit", "trainer", "--out", "p"),
    )
    assert done.returncode == 0, done.stderr
    compile(done.stdout, "emitted", "exec")
    assert "TrainingArguments(" in done.stdout and "per_device_train_batch_size=2" in done.stdout
    assert "the choice" in done.stderr


def test_the_machine_at_hand_is_calibrated_and_measured(run, model, tmp_path):
    """The trap: a winner by estimate alone is called measured."""
    done = run(
        *("-m", model, "--seq-len", "32", "--device", "cpu", "--batch", "1,2", "--strategies", "off,per-layer"),
        *("--measure", "--json", "--out", "p"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["choice"]["source"] == "measured"
    assert not any("nothing was run" in notice for notice in document["notices"]), "not after a measurement"
    assert any(notice.startswith("Measured: ") for notice in document["notices"])
    measured = [row for row in document["rows"] if row["source"] == "measured"]
    assert 1 <= len(measured) <= 5
    assert (tmp_path / "p" / "report.json").exists()
    assert list((tmp_path / "cache" / "gcbench").glob("*.json"))
    again = run("--from", "p", "--device-memory", "1GiB", "--json", "--out", "q")
    assert again.returncode == 0, again.stderr
    stored = json.loads(again.stdout)
    assert {(row["strategy"], row["batch_size"]) for row in stored["rows"]} == {
        (row["strategy"], row["batch_size"]) for row in measured
    }
    assert stored["choice"]["source"] == "measured"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--device-memory", "24 parsecs"), 2, "--device-memory"),
        (("--batch", "1,two"), 2, "--batch: 'two' is not a whole number"),
        (("--batch", "0"), 2, "--batch: 0 is too small"),
        (("--reserve", "110%"), 2, "--reserve: '110%' leaves no memory"),
        (("--reserve", "lots"), 2, "--reserve: 'lots' is not a share"),
        (("--emit", "trianer"), 2, "did you mean trainer?"),
        (("--seq-len", "32,64"), 2, "a plan is for one length"),
        (("--device", "h1000"), 3, "there is no device 'h1000'"),
        (("--strategies", "evry:2"), 2, "did you mean every?"),
        (("--strategies", "every:9"), 2, "every:9 needs at least"),
        (("--device", "h200", "--measure"), 2, "--measure runs on this machine"),
    ],
)
def test_a_mistake_is_one_sentence(run, model, flags, code, said):
    done = run("-m", model, "--seq-len", "32", "--out", "p", *flags)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_model_and_a_stored_run_without_what_is_needed(run, tmp_path):
    assert "--model is missing" in run("--seq-len", "32").stderr
    nothing = run("--from", "nowhere")
    assert nothing.returncode == 4 and nothing.stderr.startswith("error: ")
    predicted = run("--from", str(reference("llama-8b-rtx-4090")), "--out", "p")
    assert predicted.returncode == 4 and "holds predictions, whose times were not measured" in predicted.stderr
    both = run("--from", str(reference("gpt2-cpu")), "--measure")
    assert both.returncode == 2 and "leave out --measure" in both.stderr
    missing = run("--from", str(reference("gpt2-cpu")), "--batch", "3", "--out", "p")
    assert missing.returncode == 4 and "has no measured cell" in missing.stderr


def test_a_stored_run_decides_by_what_was_measured(run):
    """gpt2 at batch 16 on a CPU: off needs 3.14 GiB, so that 2.7 GiB leave per-layer and every:2."""
    done = run("--from", str(reference("gpt2-cpu")), "--device-memory", "2.7GiB", "--json", "--out", "p")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    fits = {row["strategy"] for row in document["rows"] if row["status"] == "ok"}
    assert fits == {"per-layer", "every:2"} and document["choice"]["strategy"] in fits


def reference(name):
    from pathlib import Path

    return Path(__file__).parents[2] / "results" / "reference" / name
