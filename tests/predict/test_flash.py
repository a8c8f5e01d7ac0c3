"""`flash_attention_2` in predictions: torch's kernel replaces that of the package, or a sentence says why not."""

from __future__ import annotations

import pytest

from gcbench.core.errors import UsageError
from gcbench.devices.target import Target, TargetOptions, resolve_target
from gcbench.models import flash_attention

QUICK = ("--batch", 2, "--seq-len", 64, "--strategies", "off,per-layer", "--precision", "bf16", "--device", "a40")


def peaks(cli, *arguments):
    result = cli("predict", *arguments, "--json")
    assert result.code == 0, result.err
    return result, [row["peak_allocated_bytes"] for row in result.document["rows"]]


def test_flash_attention_needs_the_same_memory_as_the_flash_kernel_of_sdpa(cli, model):
    """No package here: the prediction says what stands in for it, and tables name what was requested."""
    folder = model("llama", num_key_value_heads=4)  # as many as query heads, of which sdpa repeats none
    arguments = ("-m", folder, *QUICK)
    result, by_package = peaks(cli, *arguments, "--attn-implementation", "fa2")
    assert flash_attention.NOTICE in result.err
    assert {row["attn_implementation"] for row in result.document["rows"]} == {"flash_attention_2"}
    assert by_package == peaks(cli, *arguments, "--attn-implementation", "sdpa")[1]


def test_a_sliding_window_needs_no_mask(cli, model):
    """The trap: sdpa, which takes another kernel and a mask of (batch, 1, length, length) for it."""
    arguments = (
        "-m",
        model("llama", model_type="mistral", sliding_window=16),
        *QUICK[2:],
        "--batch",
        1,
        "--seq-len",
        128,
    )
    with_mask = peaks(cli, *arguments, "--attn-implementation", "sdpa")[1]
    without = peaks(cli, *arguments, "--attn-implementation", "flash_attention_2")[1]
    assert all(fewer < more for fewer, more in zip(without, with_mask, strict=True))


def test_weights_in_fp32_are_cast_for_the_kernel(cli, model):
    arguments = ("-m", model("llama"), *QUICK[:-4], "--precision", "bf16-mixed", "--device", "h100")
    assert peaks(cli, *arguments, "--attn-implementation", "flash")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--precision", "fp32"), "only computes in 16 bits; add --precision bf16"),
        (("--device", "t4"), "older than Ampere; leave the flag out"),
        (("--strategies", "selective:attention"), "selective:attention saves none of them; leave that strategy out"),
        (("--attn-implementation", "fa3"), "is not predicted; use flash_attention_2"),
        (("--attn-implementation", "kernels-community/flash-attn2"), "a kernel from the hub, which is not predicted"),
        (("--attn-implementation", "flex"), "cannot be predicted: torch traces its backward pass on a GPU only"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(cli, model, flags, message):
    cli("predict", "-m", model(), *QUICK, "--attn-implementation", "fa2", *flags).refused(2, message)


def test_a_model_without_flash_attention_is_refused_by_its_own_name(cli, model):
    """The trap: the stand-in's name, which nobody typed."""
    result = cli("predict", "-m", model("mamba"), *QUICK, "--attn-implementation", "fa2")
    result.refused(2, "does not support --attn-implementation flash_attention_2", "leave the flag out")
    assert flash_attention.STAND_IN not in result.err


def test_a_plan_is_refused_with_what_to_take():
    card = resolve_target(TargetOptions(device="a40"), None)
    with pytest.raises(UsageError, match="plan with sdpa"):
        flash_attention.check_plan("flash_attention_2", card)
    flash_attention.check_plan("sdpa", card)
    flash_attention.check_plan("flash_attention_2", None)


def test_on_a_cpu_flash_attention_has_no_stand_in():
    cpu = Target(kind="cpu", name="cpu")
    assert flash_attention.traced_as("flash_attention_2", cpu) == "flash_attention_2"
    assert flash_attention.traced_as("flash_attention_2", None) == "flash_attention_2"
    flash_attention.check("flash_attention_2", cpu, precision="fp32", specs=("off",))
