"""Other tools' names of settings: unambiguous ones are translated, ambiguous ones are refused with a hint."""

from __future__ import annotations

import pytest

from gcbench.core import spellings
from gcbench.core.errors import UsageError
from gcbench.core.units import GIB, MIB, parse_memory
from gcbench.job import settings as config
from gcbench.job.settings import settings

LEAST = {"model": "gpt2", "batch_size": 1}


def taken(key: str, typed: object) -> object:
    return getattr(settings({**LEAST, key: typed}), key)


def refused(key: str, typed: object) -> str:
    with pytest.raises(UsageError) as caught:
        settings({**LEAST, key: typed})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        *((typed, "fp32") for typed in ("float32", "FLOAT32", "torch.float32", "32-true", "32", 32, "full", "no")),
        *((typed, "bf16") for typed in ("bfloat16", "torch.bfloat16", "bf16-true", "pure_bf16")),
        *((typed, "bf16-mixed") for typed in ("bf16_mixed", "BF16 mixed", "bfloat16-mixed", "bf16")[:3]),
        *(
            (typed, "fp16-mixed")
            for typed in ("float16", "fp16", "half", "16-mixed", 16, "fp16_mixed", "torch.float16")
        ),
    ],
)
def test_a_precision_of_another_tool(typed, name):
    assert taken("precision", typed) == name
    assert config.several("--precision", typed, config.precision) == (name,)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("amp", "did you mean bf16-mixed or fp16-mixed?"),
        ("mixed", "did you mean bf16-mixed or fp16-mixed?"),
        ("16-true", "did you mean fp16-mixed"),
        ("tf32", "did you mean fp32?"),
        ("nf4", "legal are fp32, bf16"),
        ("bf61", "did you mean bf16?"),
        (True, "write it as text"),
    ],
)
def test_an_ambiguous_precision_is_refused(typed, said):
    assert said in refused("precision", typed)


def test_a_value_that_may_mean_something_else_is_reported_once():
    """`float16` literally means fp16 weights, which nobody trains."""
    said = config.notices({"precision": "float16", "seq_len": "4k,512"})
    assert said == (
        "--precision float16 is read as fp16-mixed: weights in fp32, computation in fp16.",
        "--seq-len 4k is read as 4096 tokens.",
    )
    assert config.notices({"precision": "fp16-mixed", "seq_len": (4096,)}) == ()
    assert config.notices({"precision": ["half", "bf16"]})[0].startswith("--precision half")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        *((typed, "adamw_torch") for typed in ("adamw", "AdamW", "adamw_hf", "adam-w", "torch.optim.AdamW")),
        *((typed, "adamw_torch_fused") for typed in ("adamw-torch-fused", "fused_adamw", "adamw_fused")),
        ("SGD", "sgd"),
        ("Adafactor", "adafactor"),
    ],
)
def test_an_optimizer_of_another_tool(typed, name):
    assert taken("optim", typed) == name


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("paged_adamw_8bit", "legal are adafactor, adamw_torch, adamw_torch_fused, sgd"),
        ("adamw_bnb_8bit", "legal are adafactor"),
        ("galore_adamw", "legal are adafactor"),
        ("adam", "did you mean adamw_torch?"),
        ("lion", "is unknown; legal are"),
    ],
)
def test_an_unsupported_optimizer_is_refused(typed, said):
    assert said in refused("optim", typed)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        *(
            (typed, "flash_attention_2")
            for typed in ("flash", "fa2", "flash-attention-2", "FlashAttention2", "flash_attn")
        ),
        ("fa3", "flash_attention_3"),
        ("flex", "flex_attention"),
        ("SDPA", "sdpa"),
        ("eager", "eager"),
        ("default", None),
        ("kernels-community/flash-attn", "kernels-community/flash-attn"),
    ],
)
def test_an_attention_of_another_tool(typed, name):
    assert taken("attn_implementation", typed) == name


def test_a_kernel_of_sdpa_is_not_an_implementation():
    assert "did you mean eager or sdpa?" in refused("attn_implementation", "math")
    assert "did you mean sdpa?" in refused("attn_implementation", "xformers")


@pytest.mark.parametrize(
    ("typed", "spec"),
    [
        *((typed, "off") for typed in ("none", "no", "disabled", "OFF")),
        *((typed, "per-layer") for typed in ("full", "all", "layer", "per_layer", "per layer", "all-layers")),
        *((typed, "every:2") for typed in ("every2", "every-2", "every=2", "every_2", "EVERY:2")),
        ("first-1", "first:1"),
        ("uniform2", "segment:2"),
        ("selective-attention", "selective:attention"),
        ("selective=mm/addmm", "selective:mm/addmm"),
        ("every2+selective_matmul", "every:2+selective:matmul"),
    ],
)
def test_a_strategy_as_people_write_it(typed, spec):
    assert taken("strategies", typed) == (spec,)


def test_a_strategy_that_names_a_file_keeps_its_spelling():
    assert spellings.strategy("plan:Full_every-2.json") == "plan:Full_every-2.json"


@pytest.mark.parametrize(
    ("typed", "name"), [("gpu", "cuda"), ("cuda0", "cuda:0"), ("GPU:1", "cuda:1"), ("0", "cuda:0"), ("CPU", "cpu")]
)
def test_a_device_of_this_machine(typed, name):
    assert taken("device", typed) == name


def test_a_card_of_the_catalogue_is_not_a_device_of_this_machine():
    text = refused("device", "H100-SXM")
    assert "--emulate h100 emulates that card" in text
    assert "gcbench predict --device h100 and gcbench plan --device h100 predict for it" in text
    assert "is an Apple GPU" in refused("device", "mps")


@pytest.mark.parametrize(
    ("typed", "values"), [("16,", (16,)), ("8 16", (8, 16)), ("8, 16", (8, 16)), ("4_096", (4096,)), ("16.0", (16,))]
)
def test_numbers_as_people_write_them(typed, values):
    assert taken("batch_size", typed) == values


@pytest.mark.parametrize(("typed", "values"), [("4k", (4096,)), ("8K", (8192,)), ("1k,2k 512", (1024, 2048, 512))])
def test_a_length_in_k(typed, values):
    assert taken("seq_len", typed) == values


def test_a_thousands_separator_is_not_a_list():
    assert "did you mean 4096?" in refused("seq_len", "4,096")
    assert taken("seq_len", "512,128") == (512, 128)


@pytest.mark.parametrize("typed", ["16.0", 16.0, "16"])
def test_a_rank_in_the_form_of_other_configs(typed):
    assert taken("lora_r", typed) == 16


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("24", "'24' is 24 bytes; did you mean 24GiB?"),
        (24, "24 is 24 bytes; did you mean 24GiB?"),
        ("24576", "did you mean 24576MiB?"),
        (24.5, "did you mean 24.5GiB?"),
        ("24G", "did you mean 24GiB or 24GB?"),
        ("80000m", "did you mean 80000MiB or 80000MB?"),
        ("0", "leaves no memory"),
        (-8, "leaves no memory"),
        ("-8GiB", "write it like 8GiB"),
        ("inf", "write it like 8GiB"),
        (float("nan"), "write it like 8GiB"),
        ("9" * 400, "more bytes than any device has"),
        ("99999GiB", "more than any device has"),
        (True, "write it like 8GiB"),
        ([8], "write it like 8GiB"),
    ],
)
def test_memory_without_a_unit_is_refused_with_the_likely_unit(raw, said):
    """The trap: a card of 24 bytes, into which nothing fits."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_memory(raw)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (8 * GIB, 8 * GIB),
        (str(8 * GIB), 8 * GIB),
        (MIB, MIB),
        ("24 gib", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("0.5GiB", GIB // 2),
    ],
)
def test_unambiguous_memory_sizes(raw, count):
    assert parse_memory(raw) == count
