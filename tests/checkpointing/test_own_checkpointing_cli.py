"""`own` on the command line, and its predictions: models whose own code checkpoints, brought along in their folder."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import own_ways
import pytest
import torch
from own_ways import build

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.devices.backends import open_device
from gcbench.simulate import timeline
from gcbench.simulate.predictor import Predictor
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("way", ["old-setter", "function", "second", "pairs"])
def test_a_predicted_step_has_the_peak_of_a_real_one(way):
    """To the byte, and nothing is left that the next trace would see."""
    found = {}
    for spec in ("off", "own", "off"):
        model = build(way)
        batch = training.random_batch(model, batch_size=2, seq_len=32, seed=0)
        one = training.TrainingStep(model, batch=batch, precision="fp32", optim="sgd", seed=0)
        checkpointing.apply(model, strategies.parse(spec).plan_for(4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one()
            with open_device("cpu").probe_memory() as probe:
                one(probe.on_phase)
        checkpointing.clear(model)
        found[spec] = probe.peaks().allocated_bytes
    with torch.device("meta"):
        predictor = Predictor(build(way), precision="fp32", optim="sgd")
    for spec in ("off", "own", "off"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = predictor.step(strategies.parse(spec).plan_for(4), batch_size=2, seq_len=32)
        assert timeline.exact(made.timeline).memory.allocated_bytes == found[spec]
        assert (made.why_in_full is None) == (spec == "off")
    assert found["own"] < found["off"]


# On the command line


@pytest.fixture
def folder(tmp_path):
    """A model folder with code of its own."""

    def write(way="old-setter", **changes):
        made = tmp_path / way
        made.mkdir()
        shutil.copy(Path(own_ways.__file__), made / "own_ways.py")
        config = own_ways.OwnConfig(way=way, **changes).to_dict()
        form = own_ways.FORMS.get(way, own_ways.OwnForCausalLM).__name__
        config["auto_map"] = {"AutoConfig": "own_ways.OwnConfig", "AutoModelForCausalLM": f"own_ways.{form}"}
        (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return made

    return write


REMOTE = ("--trust-remote-code", "--json")


def test_run_measures_off_and_own_by_default(cli, folder):
    done = cli("run", "-m", folder("second"), "-b", 1, "--rounds", 1, "--steps", 1, *REMOTE)
    assert done.code == 0, done
    assert [(row["status"], row["layers_checkpointed"], row["num_layers"]) for row in done.rows.values()] == [
        ("ok", 0, 4),
        ("ok", 2, 4),
    ]
    assert list(done.rows) == ["off", "own"]
    assert done.rows["own"]["layers_recomputed"] == 2 and done.rows["own"]["memory_saved_frac"] > 0
    assert "default strategies are off and own" in done.err


def test_predict_reports_what_is_possible(cli, folder):
    done = cli("predict", "-m", folder(), "-b", 1, "--strategies", "off,own,every:2", *REMOTE)
    assert done.code == 0, done
    assert [row["status"] for row in done.rows.values()] == ["ok", "ok", "unsupported"]
    assert "take own" in done.rows["every:2"]["message"]
    assert done.rows["own"]["layers_checkpointed"] == done.rows["own"]["num_layers"] == 4


def test_plan_considers_own(cli, folder):
    made = folder("function")
    ask = ("-b", 64, "--seq-len", 64, "--device", "cpu", *REMOTE)
    free = cli("plan", "-m", made, *ask, "--device-memory", "1GiB")
    assert free.code == 0 and free.document["choice"]["strategy"] == "off", free
    off = free.document["choice"]["peak_bytes"]
    tight = cli("plan", "-m", made, *ask, "--device-memory", off - 1)
    assert tight.code == 0 and tight.document["choice"]["strategy"] == "own", tight
    cli("plan", "-m", made, "--strategies", "every:2", *ask, "--device-memory", "1GiB").refused(
        2, "every:2", "take own"
    )


def test_check_tests_own_instead_of_unsupported_strategies(cli, folder):
    done = cli("check", "-m", folder(), "--no-compile", *REMOTE)
    verdicts = {row["tuned"]: row["verdict"] for row in done.document["rows"] if row["precision"] == "fp32"}
    assert {row["strategy"] for row in done.document["rows"]} == {"own"}
    assert verdicts["full"] == "identical" and verdicts["frozen-base"] == "WRONG"
    assert done.code == 1 and "own with frozen-base" in done.err
    cause = next(row["cause"] for row in done.document["rows"] if row["verdict"] == "WRONG")
    assert cause.startswith("The model's own code calls torch.utils.checkpoint")
