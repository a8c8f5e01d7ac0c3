"""The minutes on a card: what hangs is ended, what was done is kept, and a rehearsal never claims to measure."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from gcbench.core.json_codec import decode
from gcbench.core.records import MemoryPeaks
from gcbench.job import settings as config

MACHINE = {"device_name": "A card", "versions": {"torch": "2.11.0", "transformers": "5.17.0", "cuda": "13.0"}}
STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
away = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {away.pid}")
time.sleep(600)
"""


@pytest.fixture
def gpu_hour(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_hour

    monkeypatch.setattr(gpu_hour.Hour, "_describe", lambda hour: {"free_bytes": 5, "machine": MACHINE})
    monkeypatch.setattr(gpu_hour, "environment", lambda card: {"GCBENCH_TEST": card.name})
    return gpu_hour


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_stages

    monkeypatch.setattr(gpu_stages, "SPARE_S", 0.4)
    return gpu_stages


def stage(stages, name, code, **kwargs):
    return stages.Stage(name=name, command=(sys.executable, "-c", code), limit_s=60, **kwargs)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_ignores_signals_is_ended_with_all_it_started(stages, tmp_path):
    """The trap: a child of the stage in a session of its own survives a signal to the stage's group."""
    pids = tmp_path / "pids"
    ended = stages.run([sys.executable, "-c", STUBBORN, str(pids)], tmp_path / "log", timeout_s=5, added={})
    assert ended == "cut off"
    started = pids.read_text().split()
    assert len(started) == 2
    for _ in range(100):
        if not any(map(is_running, started)):
            break
        time.sleep(0.05)
    assert not any(map(is_running, started))


def test_a_stage_that_fails_says_how(stages, tmp_path):
    log = tmp_path / "log"
    assert stages.run([sys.executable, "-c", "print('so far'); exit(3)"], log, timeout_s=60, added={}) == "exit 3"
    assert log.read_text() == "so far\n"


def test_a_long_log_keeps_its_beginning_and_its_end(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LOG_BYTES", 100)
    log = tmp_path / "log"
    log.write_text("begin" + "x" * 1000 + "end")
    stages.shorten(log)
    text = log.read_text()
    assert text.startswith("begin") and text.endswith("end") and "cut out" in text and len(text) < 150


def test_what_was_done_is_not_done_again(gpu_hour, stages, tmp_path):
    hour = gpu_hour.Hour(tmp_path, emulate=None, budget_s=300)
    good, bad = stage(stages, "good", "pass"), stage(stages, "bad", "exit(1)")
    for each in (good, bad):
        assert hour.waits(each)
        hour.do(each, limit_s=60)
    again = gpu_hour.Hour(tmp_path, emulate=None, budget_s=300)
    assert not again.waits(good) and not again.waits(bad)
    assert again.stages["bad"]["status"] == "exit 1"
    assert json.loads((tmp_path / "stages.json").read_text())["machine"] == MACHINE


def test_a_stage_without_time_waits_for_the_next_call(gpu_hour, stages, tmp_path):
    hour = gpu_hour.Hour(tmp_path, emulate=None, budget_s=1)
    late = stage(stages, "late", "pass")
    hour.do(late, limit_s=60)
    assert hour.waits(late)


def test_another_card_does_not_continue_a_folder(gpu_hour, tmp_path, monkeypatch):
    gpu_hour.Hour(tmp_path, emulate=None, budget_s=1).save("stages.json", {"stages": {}})
    monkeypatch.setitem(MACHINE, "device_name", "Another card")
    with pytest.raises(SystemExit, match="another card"):
        gpu_hour.Hour(tmp_path, emulate=None, budget_s=1)


def test_a_rehearsal_is_called_one_and_skips_what_needs_values(gpu_hour, stages, tmp_path):
    """The trap: figures of an emulated card in a file that says they were measured."""
    measured = gpu_hour.Hour(tmp_path, emulate=None, budget_s=300)
    hour = gpu_hour.Hour(tmp_path, emulate="h100", budget_s=300)
    names = ("log.txt", "stages.json", "runs.json", "plan.json", "rates.json", "plain-loop.json", "truth-x.json")
    assert not {hour.path(name) for name in names} & {measured.path(name) for name in names}
    assert all("emulated" in hour.path(name).name for name in names)
    assert hour.path("truth-x.json").name.startswith("truth-")  # or accuracy.py would not find it
    hour.do(stage(stages, "rates", "exit(9)", needs_values=True), limit_s=60)
    stored = json.loads(hour.path("stages.json").read_text())
    assert stored["source"] == "emulated"
    assert stored["stages"]["rates"]["status"].startswith("skipped: an emulated card computes nothing")


@pytest.mark.parametrize("emulate", [None, "h100"])
def test_the_limits_of_all_stages_fit_into_the_whole(gpu_hour, tmp_path, emulate):
    hour = gpu_hour.Hour(tmp_path, emulate=emulate, budget_s=480)
    planned = gpu_hour.stages(hour)
    assert sum(each.limit_s for each in planned) <= 480
    assert len({each.name for each in planned}) == len(planned)
    runs = [each.command for each in planned if each.name in gpu_hour.RUNS]
    assert all(("--emulate" in command) is (emulate is not None) for command in runs)


def test_plain_loops_that_a_run_can_express_become_a_grid(gpu_hour, tmp_path):
    import plain_loop

    found = {
        "allocated_bytes": 30,
        "reserved_bytes": 40,
        "num_alloc_retries": 0,
        "phases": {"forward": 10, "backward": 30, "optimizer": 20},
    }
    made = {name: plain_loop.as_cell(case, found) for name, case in plain_loop.CASES.items()}
    assert not made["llama-3.2-1b, layers 1, 3, 5 …"] and not made["llama-3.2-1b, three micro-batches"]
    assert made["gpt2, fp32, per-layer"]["settings"]["precision"] == "fp32"
    assert made["gpt2, fp32, per-layer"]["cell"]["strategy"] == "per-layer"
    hour = gpu_hour.Hour(tmp_path, emulate=None, budget_s=300)
    loops = {"cases": {name: {**plain_loop.CASES[name], **cell} for name, cell in made.items()}}
    hour.path("plain-loop.json").write_text(json.dumps(loops))
    gpu_hour.keep_loops_as_truth(hour)
    cases = json.loads((tmp_path / "truth-plain-loop.json").read_text())["cases"]
    assert len(cases) == sum(map(bool, made.values())) == 10
    for case in cases:
        assert config.settings(case["settings"]).model
        assert decode(MemoryPeaks, case["cells"][0]["memory"]).peak_phase == "backward"
