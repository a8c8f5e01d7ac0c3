"""What a real run adds to the predicted step: its estimate equals a measurement, and is reported in bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from built import build, run_until_state

from gcbench import strategies
from gcbench.core.prediction import ACCUMULATION, KEPT_OUTPUTS, Addition, Fallback
from gcbench.core.units import GIB
from gcbench.devices.backends import open_device
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.report.additions import Setting, kernels_sentence, sentence
from gcbench.simulate import timeline
from gcbench.simulate.additions import accumulating, with_outputs
from gcbench.simulate.predictor import Predictor
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")

SCALARS_BYTES = 256
"""What is left between a trace and a run: single numbers that real operators make and fake ones do not."""


def predicted(source, precision, strategy, *, exact=False):
    model = models.build_meta(
        models.build_config(source, layers=None, overrides={}),
        dtype=training.parameter_dtype(precision),
        trust_remote_code=False,
    )
    predictor = Predictor(model, precision=precision, optim="adamw_torch", exact=exact)
    plan = strategies.parse(strategy).plan_for(len(predictor.fake_model.layers))
    return predictor.step(plan, batch_size=4, seq_len=64)


def peak_of(step, before):
    """The peak of the measured step, which begins with what `before` leaves."""
    device = open_device("cpu")
    with device.probe_memory() as probe:
        run_until_state(step)
        kept = before()
        device.settle()
        step(probe.on_phase)
        del kept
    return probe.peaks()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", ["off", "every:2"])
def test_the_accumulation_estimate_equals_a_second_micro_batch(tmp_path, family, strategy):
    """The traps: gradients that are added at once, and a tied one that waits for its other half (gpt2)."""
    source = sources.resolve(str(tiny.write_model(tmp_path / family, family)))
    step = build(source, "fp32", "adamw_torch", strategy)

    def first_micro_batch():
        torch.manual_seed(0)
        step.model(**step.inputs).loss.backward()

    truth = peak_of(step, first_micro_batch)
    estimate = timeline.exact(accumulating(predicted(source, "fp32", strategy))).memory
    for phase in ("forward", "backward", "optimizer"):
        assert abs(estimate.of_phase(phase) - truth.of_phase(phase)) <= SCALARS_BYTES, phase


def test_accumulation_of_a_step_traced_in_full_is_at_most_a_gradient_too_low(tmp_path):
    source = sources.resolve(str(tiny.write_model(tmp_path / "llama", "llama")))
    whole, composed = (predicted(source, "fp32", "off", exact=exact) for exact in (True, False))
    assert whole.accumulating() is None
    there, here = (timeline.exact(accumulating(step)).memory for step in (whole, composed))
    largest = max(int(whole.timeline.nbytes[whole.assembly.kinds == 3].max()), 1)
    assert 0 <= here.allocated_bytes - there.allocated_bytes <= largest
    assert there.forward_bytes == pytest.approx(here.forward_bytes, abs=SCALARS_BYTES)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_the_estimate_for_retained_outputs_equals_a_loop_that_retains_them(tmp_path, precision):
    source = sources.resolve(str(tiny.write_model(tmp_path / "llama", "llama")))
    step = build(source, precision, "adamw_torch", "per-layer")

    def step_before():
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            outputs = step.model(**step.inputs)
        outputs.loss.backward()
        step.optimizer.zero_grad(set_to_none=True)
        return outputs

    truth = peak_of(step, step_before)
    line = with_outputs(predicted(source, precision, "per-layer").assembly)
    assert line is not None
    assert abs(timeline.exact(line).memory.allocated_bytes - truth.allocated_bytes) <= SCALARS_BYTES


def adding(name, gib, peak):
    return Addition(name=name, nbytes=round(gib * GIB), peak_bytes=round(peak * GIB))


def test_the_sentence_names_bytes_and_what_would_not_fit():
    chosen = Setting(
        name="every:2", fits=True, additions=(adding(ACCUMULATION, 14.96, 147), adding(KEPT_OUTPUTS, 1, 133))
    )
    other = Setting(name="per-layer", fits=True, additions=(adding(ACCUMULATION, 1, 100),))
    tight = Setting(name="off", fits=True, additions=(adding(ACCUMULATION, 1, 141),))
    text = sentence(chosen, [other, tight], usable_bytes=140 * GIB)
    assert text == (
        "Not in these figures: gradient accumulation (all gradients stay allocated from the second micro-batch "
        "on) adds 14.96 GiB to every:2, which then needs 147 GiB and does not fit (off would not fit); a loop that "
        "keeps `outputs`, and so the logits, in a variable adds 1.00 GiB to every:2."
    )
    assert sentence(other, [], usable_bytes=None) is not None
    assert sentence(Setting(name="off", fits=True, additions=()), [tight], usable_bytes=None) is None


def test_kernels_that_would_change_little_are_not_named():
    """The trap: "accounts for 0 B of the peak", where the peak is the optimizer's."""
    little, much = (Fallback(packages=("mamba-ssm",), nbytes=round(share * GIB)) for share in (0.004, 0.9))
    assert kernels_sentence(None, "off", GIB) is kernels_sentence(little, "off", GIB) is None
    assert "accounts for 922 MiB of the 1.00 GiB of off; with mamba-ssm installed" in (
        kernels_sentence(much, "off", GIB) or ""
    )


def test_a_prediction_reports_what_a_run_adds(cli, model):
    """On the screen, in the stored report, and as columns."""
    command = (
        *("predict", "-m", model(), "--batch", 8, "--seq-len", 128),
        *("--device", "cpu", "--strategies", "off,per-layer"),
    )
    result = cli(*command, "--out", "there")
    assert "Not in these figures: " in result.out and "gradient accumulation" in result.out
    assert "gradient accumulation" in Path("there/report.md").read_text(encoding="utf-8")
    rows = cli(*command, "--json").rows
    assert all(row["kept_outputs_add_bytes"] == 8 * 128 * 256 * 4 for row in rows.values())
    assert rows["per-layer"]["accumulation_adds_bytes"] > 0


def test_missing_kernel_packages_are_reported_for_a_card_alone(cli, model):
    """Mamba's scan in PyTorch; the kernels of mamba-ssm cannot be traced. Attention has no such thing."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    arguments = ("--batch", 2, "--seq-len", 12, "--strategies", "off")
    for device, family, words in (("h100", "mamba", True), ("cpu", "mamba", False), ("h100", "llama", False)):
        changes = sizes if family == "mamba" else {}
        result = cli("predict", "-m", model(family, **changes), *arguments, "--device", device)
        assert result.code == 0, result.err
        assert ("with causal-conv1d and mamba-ssm installed" in result.out) is words, result.out
