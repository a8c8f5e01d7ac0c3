"""`run`, `check` and `plan` on an emulated card. Needs a CUDA build of torch in this environment, and no card."""

from __future__ import annotations

import json
import os

import pytest
from processes import await_line, await_nobody

from gcbench.core.errors import UnavailableError
from gcbench.devices import cards
from gcbench.emulate.environment import environment

QUICK = ("--batch", 2, "--seq-len", 32)


@pytest.fixture(autouse=True)
def with_cuda_build():
    """Skip where a card cannot be emulated."""
    try:
        environment(cards.find("h100"))
    except UnavailableError as err:
        pytest.skip(str(err))


def peaks(document):
    return {row["strategy"]: (row["peak_allocated_bytes"], row["peak_reserved_bytes"]) for row in document["rows"]}


@pytest.mark.parametrize("precision", ["fp32", "fp16-mixed"])
def test_a_run_is_emulated_and_its_memory_is_what_is_predicted(cli_process, model, precision):
    """The traps: a scaler that waits for gradients that are numbers, and figures that are nobody's."""
    asked = (
        "-m",
        model(),
        *QUICK,
        "--precision",
        precision,
        "--strategies",
        "off,per-layer,selective:matmul",
        "--json",
    )
    run = cli_process("run", "--emulate", "rtx-4090", *asked)
    assert run.code == 0, run.err
    rows = {row["strategy"]: row for row in run.document["rows"]}
    assert {row["source"] for row in rows.values()} == {"emulated"}
    assert rows["per-layer"]["layers_recomputed"] == rows["per-layer"]["num_layers"] > 0
    for row in rows.values():
        assert (row["status"], row["step_time_s"], row["proof"], row["params_without_grad"]) == ("ok", None, None, 0)
        assert row["memory_saved_frac"] is not None and row["peak_process_bytes"] is None
    assert all(allocated <= reserved for allocated, reserved in peaks(run.document).values())
    limited = cli_process("run", "--emulate", "rtx-4090", *asked, "--memory-limit", "20MiB")
    assert "out of memory" in limited.out or "oom" in limited.out


def test_a_process_on_an_emulated_card_measures_nothing(cli_process, model):
    """The trap: gcbench in a script that runs on an emulated card, with --device auto."""
    on_card = {**environment(cards.find("t4"))}
    run = cli_process("run", "-m", model(), *QUICK, "--strategies", "off", "--json", env=on_card)
    assert run.code == 0, run.err
    assert [row["source"] for row in run.document["rows"]] == ["emulated"]
    on_cpu = cli_process(
        "run", "-m", model(), *QUICK, "--device", "cpu", "--rounds", 1, "--steps", 1, "--json", env=on_card
    )
    assert {row["source"] for row in on_cpu.document["rows"]} == {"measured"}


def test_a_check_tells_what_ran(cli_process, model):
    check = cli_process(
        "check", "--emulate", "h100", "-m", model(), "--no-compile", "--precision", "bf16-mixed", "--json"
    )
    assert check.code == 0, check.err
    assert {(row["verdict"], row["source"]) for row in check.document["rows"]} == {("runs", "emulated")}


def test_a_plan_confirms_its_choice(cli_process, model, tmp_path):
    plan = cli_process(
        "plan",
        "--emulate",
        "--device",
        "t4",
        "-m",
        model(),
        "--seq-len",
        32,
        "--batch",
        "1,2",
        "--json",
        "--out",
        tmp_path / "p",
    )
    assert plan.code == 0, plan.err
    choice = json.loads(plan.out)["choice"]
    assert abs(choice["emulated_bytes"] - choice["peak_bytes"]) <= 0.05 * choice["peak_bytes"]


def test_an_interruption_leaves_no_process(popen, model):
    process = popen("run", "--emulate", "h100", "-m", model(), *QUICK, "--out", "run")
    await_line(process, "emulating:")
    os.killpg(process.pid, 2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    await_nobody(process)
