"""The proof of a run and the exit code of a check: seeded generators, noise and roundoff, nothing tested."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import drawing
import numpy as np
import pytest
import torch
from fixtures_report import outcome, peaks, report, steady

from gcbench.check import cases as checks
from gcbench.check import view
from gcbench.check.cases import NOT_REPEATABLE, UNSUPPORTED, WRONG, CheckResult, CheckSetting, Combination
from gcbench.models.scaledown import scaled_down
from gcbench.report import report_file as reports
from gcbench.report import rows as tables
from gcbench.training import seeding

ROOT = Path(__file__).parents[2]


# Seeds.


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 5, 2**40])
def test_every_global_generator_is_seeded(seed):
    """NumPy's takes no more than 32 bits."""
    seeding.seed_generators(seed)
    first = draws()
    seeding.seed_generators(seed)
    assert draws() == first
    seeding.seed_generators(seed + 1)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_generators_go_on_as_if_none_had_been_drawn_from():
    seeding.seed_generators(3)
    expected = draws()
    seeding.seed_generators(3)
    with seeding.generators_restored([]):
        seeding.seed_generators(4)
        draws()
    assert draws() == expected


@pytest.mark.parametrize(("draw", "is_seen"), [(random.random, True), (np.random.rand, True), (torch.rand, False)])
def test_draws_outside_torch_are_seen(draw, is_seen):
    before = seeding.state_outside_torch()
    draw(*([1] if draw is torch.rand else []))
    assert (seeding.state_outside_torch() != before) == is_seen


# What is noise.


@pytest.mark.parametrize(
    ("noise", "precision", "device", "repeats"),
    [
        # Measured on an H100: rounds of gpt2 in fp32, of Llama 3.2 1B in bf16, of Llama 3.1 8B with LoRA in bf16.
        (8.7e-7, "fp32", "cuda:0", True),
        (0.0107, "bf16", "cuda:0", True),
        (0.0199, "bf16-mixed", "cuda:0", True),
        (0.004, "fp16-mixed", "cuda:0", True),
        (1e-6, "fp32", "cpu", True),
        (0.01, "bf16", "cpu", True),
        (None, "fp32", "cpu", True),
        # Masks that are drawn anew.
        (0.02, "fp32", "cuda:0", False),
        (0.3, "bf16", "cuda:0", False),
        (0.1, "fp16-mixed", "cuda:0", False),
        (0.03, "bf16", "cpu", False),
        (0.01, "fp16-mixed", "cpu", False),
        (math.inf, "bf16", "cuda:0", False),
    ],
)
def test_noise_is_that_of_roundoff_or_it_is_not(noise, precision, device, repeats):
    assert tables.is_repeatable(noise, precision, device) == repeats


def test_no_published_run_on_a_card_is_accused():
    """Their kernels add in any order: rounds of off differ by up to 2 % in bf16."""
    folders = [path.parent for path in (ROOT / "results" / "reference").glob("*/report.json")]
    proofs = {
        row.proof
        for folder in folders
        for row in tables.rows(reports.load(folder))
        if row.source == "measured" and row.device != "cpu" and row.proof not in (None, "no reference")
    }
    assert "within noise" in proofs
    assert proofs <= {"identical", "within noise"}


HALF_PEAKS = peaks(200, 250, 240)


def off(diffs):
    return outcome("off", peaks(400, 500, 300), steady(0.5)[: len(diffs)], diffs=diffs)


def row_of(*outcomes):
    return next(row for row in tables.rows(report(*outcomes)) if row.strategy == "per-layer")


def test_an_off_that_does_not_repeat_itself_proves_nothing():
    """The trap: twice its own difference was tolerated, however large."""
    unsteady = off(diffs=[0.0, 0.6, 0.5])
    for diffs in ([0.59] * 3, [0.0] * 3, [2.0] * 3):
        row = row_of(unsteady, outcome("per-layer", HALF_PEAKS, steady(0.6), diffs=diffs))
        assert row.proof == "not repeatable"
        assert (row.memory_saved_frac, row.time_overhead_frac) == (None, None)
        assert row.peak_allocated_bytes is not None
        assert row.step_time_s is not None
        assert row.grad_noise_floor == 0.6


def test_one_round_and_a_repeat_of_off_tell_the_noise():
    one = off(diffs=[0.0])
    cell = outcome("per-layer", HALF_PEAKS, steady(0.6)[:1], diffs=[0.3])
    assert tables.needs_repeat(cell, one)
    assert not tables.needs_repeat(outcome("per-layer", HALF_PEAKS, steady(0.6)[:1], diffs=[0.0]), one)
    assert row_of(one, cell).proof.startswith("FAILED: the gradients differ")
    assert row_of(replace(one, repeat_rel_diffs=(0.0,)), cell).proof.startswith("FAILED: the gradients differ")
    unsteady = replace(one, repeat_rel_diffs=(0.4,))
    assert row_of(unsteady, cell).proof == "not repeatable"
    assert not tables.needs_repeat(cell, unsteady)


# The run.


def run(cli, folder, *flags):
    return cli(
        *("run", "-m", folder, "--trust-remote-code", "--device", "cpu", "--rounds", 1, "--steps", 1, "-b", 2),
        *("--seq-len", 8, "-o", "out", "--strategies", "off,per-layer", *flags),
    )


@pytest.mark.parametrize(
    ("code", "proof"),
    [
        ({"inner": "mask(random.random, 2 * width)"}, "FAILED: the gradients differ from off"),
        ({"inner": "mask(np.random.rand, 2 * width)"}, "FAILED: the gradients differ from off"),
        ({"factor": "(1 + random.random())"}, "identical"),
        ({"skip": "if random.random() < 0.4: continue"}, "identical"),
        ({"bias": "torch.tensor(np.random.rand(config.vocab_size) + random.random())"}, "identical"),
        ({"init": "self.rng = np.random.default_rng()", "factor": "(1 + self.rng.random())"}, "not repeatable"),
    ],
    ids=[
        "wrong: Python",
        "wrong: NumPy",
        "right",
        "right: layers left out",
        "right: weights",
        "a generator of its own",
    ],
)
def test_a_run_of_one_round_proves_what_is_true(cli, tmp_path, code, proof):
    """Processes share NumPy's state and not Python's, unless both are seeded."""
    result = run(cli, drawing.write(tmp_path / "m", **code), "--json")
    assert result.code == 0, result.err
    row = result.rows["per-layer"]
    assert row["proof"].startswith(proof), row
    assert (row["memory_saved_frac"] is not None) == (proof == "identical")
    (of_off, _) = json.loads(Path("out/report.json").read_text())["outcomes"]
    assert len(of_off["repeat_rel_diffs"]) == (proof != "identical"), "off is run again where it matters alone"
    if proof == "not repeatable":
        assert result.rows["off"]["proof"] == proof
        assert row["grad_noise_floor"] > 0.01
        shown = cli("report", "out")
        assert "Off does not repeat itself: nothing can be shown." in shown.out
        assert "saves" not in shown.out


# The check.


def check(cli, folder, *flags):
    return cli("check", "-m", folder, "--trust-remote-code", "--device", "cpu", "--no-compile", *flags)


@pytest.mark.parametrize(
    ("code", "exit_code", "verdict", "words"),
    [
        ({"inner": "mask(np.random.rand, 2 * width)"}, 1, WRONG, "did not train as off does"),
        ({"outside": "mask(random.SystemRandom().random, width)"}, 1, NOT_REPEATABLE, "off does not repeat itself"),
    ],
)
def test_a_check_that_shows_nothing_good_does_not_end_with_0(cli, tmp_path, code, exit_code, verdict, words):
    folder = drawing.write(tmp_path / "m", **code)
    result = check(cli, folder, "--strategies", "per-layer,every:2", "--precision", "fp32", "--json", "-o", "kept")
    assert result.code == exit_code
    assert words in result.err
    assert [row["verdict"] for row in result.document["rows"]] == [verdict] * 2
    text = Path("kept/check.md").read_text()
    assert f"## {verdict}: all combinations" in text
    assert "0 of 2 combinations train" in text


@pytest.mark.parametrize(
    ("family", "flags", "code", "words"),
    [
        ("ctrl", (), 1, "nothing was tested, so nothing is shown: CTRLLMHeadModel does not support"),
        ("llama", ("--strategies", "every:9"), 2, "every:9 needs at least 9 layers"),
        ("llama", ("--attn-implementation", "flash_attention_2"), 1, "nothing was tested"),
        ("gpt2", ("--seq-len", 2000), 2, "--seq-len 2000 is beyond the 128 positions of"),
        ("ctrl", ("--seq-len", 2000), 2, "--seq-len 2000 is beyond the 128 positions of"),
        ("gpt2", ("--seq-len", 0), 2, "it must be 2 or more"),
        ("gpt2", ("--batch", 0), 2, "it must be 1 or more"),
        ("gpt2", ("--strategies", "off,off"), 2, "name another"),
    ],
)
def test_nothing_tested_is_not_success(cli, model, family, flags, code, words):
    """The trap: a CI job that stays green."""
    result = cli("check", "-m", model(family), "--device", "cpu", "--no-compile", *flags)
    assert result.code == code, result
    assert words in result.err.replace("\n", " ")
    assert (result.out == "") == (code == 2), "what cannot be is refused before anything is trained"


def test_a_strategy_that_only_the_whole_model_has_room_for_is_not_shown(cli, model):
    """The trap: of the smaller model's four layers none is the ninth, and nothing was tried."""
    folder = model("llama", num_hidden_layers=12)
    result = cli("check", "-m", folder, "--device", "cpu", "--no-compile", "--strategies", "every:9")
    assert result.code == 1, result
    assert "nothing was tested, so nothing is shown: every:9 needs" in result.err
    assert "--full-size" in result.err


def test_a_check_and_a_run_refuse_a_length_in_the_same_words(cli, model):
    flags = ("-m", model("gpt2"), "--device", "cpu", "--seq-len", 300)
    refused = [cli(*command, *flags).err for command in (("check",), ("run", "-b", 1), ("predict", "-b", 1))]
    assert refused[0] == refused[1] == refused[2]


def test_the_default_length_is_one_that_the_model_has(cli, tmp_path, model):
    short = drawing.write(tmp_path / "m", config={"n_positions": 8})
    strategies = ("--strategies", "per-layer", "--precision", "fp32")
    assert check(cli, short, *strategies).code == 0
    assert check(cli, model("gpt2", n_positions=8), *strategies).code == 0
    beyond = check(cli, short, *strategies, "--seq-len", 16)
    assert beyond.code == 1
    assert "IndexError" in beyond.err and "try a shorter --seq-len" in beyond.err


def test_a_scaled_down_model_has_positions_for_the_requested_length():
    values = {"model_type": "gpt2", "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    assert scaled_down(values)["n_positions"] == 512
    assert scaled_down(values, seq_len=800)["n_positions"] == 800
    assert scaled_down(values, seq_len=2000)["n_positions"] == 1024


def test_lora_is_tried_where_peft_has_no_choice_of_its_own(cli, model):
    result = check(cli, model("mamba"), "--train", "lora", "--strategies", "per-layer", "--json")
    assert result.code == 0, result.err
    assert [row["verdict"] for row in result.document["rows"]] == ["identical"]


def test_an_off_that_does_not_repeat_itself_is_one_problem():
    """One paragraph for all strategies, not one for each."""
    settings = [CheckSetting(precision=name) for name in ("fp32", "bf16", "bf16-mixed", "fp16-mixed")]
    settings += [CheckSetting(optim=name) for name in ("sgd", "adafactor")]
    cases = tuple(Combination(setting=s, strategy=name) for name in ("per-layer", "every:2") for s in settings)
    check = checks.Check(
        model="m",
        command="c",
        device="cpu",
        versions={},
        scaled=None,
        num_params=1,
        num_layers=4,
        combinations=cases,
        results=tuple(CheckResult(number=n, verdict=UNSUPPORTED, message="why") for n in range(len(cases))),
    )
    (problem,) = view.problems(check)
    assert view.where(problem, check) == "all combinations"
    good = Combination(setting=CheckSetting(tuned="lora"), strategy="per-layer")
    more = replace(check, combinations=(*cases, good, replace(good, strategy="every:2")))
    assert view.where(problem, more) == "all strategies with plain and 5 others"
