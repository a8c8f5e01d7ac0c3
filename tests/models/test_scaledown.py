"""What must hold of every model that is made smaller, on families that are put together differently."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gcbench.models import build as models
from gcbench.models.scaledown import HEADS, MAX_LAYERS, VOCAB, WIDTH, scaled_down
from gcbench.models.sources import ModelSource
from gcbench.training.step import TrainingStep, random_batch

FAMILIES = (
    "llama",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v3",
    "gpt_oss",
    "bloom",
    "falcon",
    "opt",
    "phi3",
    "mamba2",
    "bamba",
    "jamba",
    "zamba",
    "zamba2",
    "bart",
)
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "activation_sparsity_pattern")


def config(family: str) -> Any:
    wide = {"hidden_size": 1024, "n_head": 16} if family == "bloom" else {}  # 64 wide by default
    return CONFIG_MAPPING[family](**wide).to_dict()


def model(values: dict[str, Any]) -> torch.nn.Module:
    source = ModelSource(name="small", origin="", config=values, location="")
    built = models.build_config(source, layers=None, overrides={})
    return models.build(source, built, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_small_and_trains(family: str) -> None:
    small = model(scaled_down(config(family)))
    assert sum(p.numel() for p in small.parameters()) < 3_000_000
    before = [p.detach().clone() for p in small.parameters()]
    batch = random_batch(small, batch_size=2, seq_len=16, seed=0)
    TrainingStep(small, batch=batch, precision="fp32", optim="sgd", seed=0)()
    after = list(small.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("family", [family for family in FAMILIES if any(config(family).get(name) for name in LISTS)])
def test_every_kind_of_layer_survives(family: str) -> None:
    """Combinations too: a dense layer with full attention is not a sparse one with it."""
    full = config(family)
    small = scaled_down(full)
    names = [name for name in LISTS if full.get(name)]
    kinds = {*zip(*(full[name] for name in names), strict=True)}
    assert {*zip(*(small[name] for name in names), strict=True)} == kinds
    assert {len(small[name]) for name in names} == {small["num_hidden_layers"]}
    assert small["num_hidden_layers"] <= MAX_LAYERS


def test_layers_that_differ_keep_their_differences() -> None:
    small = scaled_down(config("gemma4_text"))
    full = [place for place, kind in enumerate(small["layer_types"]) if kind == "full_attention"]
    assert small["per_layer_config"] == {f"{place:02}": {"head_dim": 2 * small["head_dim"]} for place in full}


def test_layers_that_share_keys_and_values_stay_beside_those_that_have_them() -> None:
    small = scaled_down(config("gemma3n_text"))
    shared = small["num_kv_shared_layers"]
    assert 0 < shared < small["num_hidden_layers"]
    assert {*small["layer_types"][-shared:]} <= {*small["layer_types"][:-shared]}


def test_the_last_layers_are_those_that_share() -> None:
    values = {"model_type": "gemma3n_text", "num_hidden_layers": 12, "num_kv_shared_layers": 2}
    small = scaled_down(values | {"activation_sparsity_pattern": [0.0] * 12})
    assert small["num_kv_shared_layers"] == 1
    assert {*small["layer_types"][:-1]} == {"sliding_attention", "full_attention"}


def test_hybrid_layers_that_share_weights_stay_two() -> None:
    """One alone has nothing to share, and zamba cannot be built."""
    for family in ("zamba", "zamba2"):
        assert scaled_down(config(family))["layers_block_type"].count("hybrid") == 2


def test_a_pattern_that_only_numbers_tell_is_there_once() -> None:
    """jamba has its attention at layer 4 of each 8 and experts in every second one."""
    assert scaled_down(config("jamba"))["num_hidden_layers"] == 8


def test_a_pattern_that_is_listed_once_is_there_once() -> None:
    """recurrent_gemma repeats its three kinds of block."""
    assert scaled_down(config("recurrent_gemma"), layers=1)["num_hidden_layers"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_divide(family: str) -> None:
    small = CONFIG_MAPPING[family].from_dict(scaled_down(config(family)))
    heads = getattr(small, "num_attention_heads", None)
    keys = getattr(small, "num_key_value_heads", None) or heads
    if family != "mamba2":
        assert heads == HEADS and small.hidden_size == WIDTH and heads % keys == 0
    if hasattr(small, "n_groups"):
        assert small.num_heads % small.n_groups == 0


@pytest.mark.parametrize(("keys", "expected"), [(32, 4), (8, 2), (1, 1)])
def test_sharing_of_keys_stays_what_it_was(keys: int, expected: int) -> None:
    """All heads with their own, groups of heads, and one for all are three kinds of attention."""
    values = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": keys}
    assert scaled_down(values)["num_key_value_heads"] == expected


def test_experts_stay_a_choice() -> None:
    small = scaled_down(config("deepseek_v3"))
    assert small["num_experts_per_tok"] < small["n_routed_experts"]
    assert small["topk_group"] < small["n_group"]
    assert small["n_routed_experts"] % small["n_group"] == 0
    assert small["qk_head_dim"] == small["qk_nope_head_dim"] + small["qk_rope_head_dim"]


def test_special_tokens_stay_in_the_vocabulary_and_apart() -> None:
    values = {"model_type": "llama", "vocab_size": 32000, "bos_token_id": 31998, "eos_token_id": [31999, 2]}
    small = scaled_down(values)
    first, last = small["bos_token_id"], small["eos_token_id"]
    assert small["vocab_size"] == VOCAB
    assert last[1] == 2 and len({first, *last}) == 3 and max(first, *last) < VOCAB


def test_the_width_that_parts_share_is_still_shared() -> None:
    """What one part puts out is as wide as the other, whatever its own width."""
    text = {"hidden_size": 1024, "num_heads": 16, "num_layers": 12}
    vision = {"hidden_size": 512, "num_heads": 8, "num_layers": 12, "out_hidden_size": 1024}
    small: Any = scaled_down({"model_type": "new", "text_config": text, "vision_config": vision})
    assert small["vision_config"]["out_hidden_size"] == small["text_config"]["hidden_size"] == WIDTH


def test_scaled_rotary_factors_fit_the_narrower_head() -> None:
    """96 wide heads have 48 factors; the config refuses any other number."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
    values = config("phi3") | {"rope_parameters": rope, "max_position_embeddings": 131072}
    small = scaled_down(values)
    assert len(small["rope_parameters"]["long_factor"]) == 8
    model(small)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_grows_and_the_input_is_not_touched(family: str) -> None:
    full = config(family)
    kept = copy.deepcopy(full)
    small = scaled_down(full)
    assert full == kept

    def check(old: Any, new: Any, name: str) -> None:
        if isinstance(old, dict) and name != "per_layer_config":
            for key in new.keys() & old.keys():
                check(old[key], new[key], key)
        elif isinstance(old, list):
            assert len(new) <= len(old), name
        elif isinstance(old, int):
            assert new <= old, name

    check(full, small, "")


@pytest.mark.parametrize("family", tiny.CHECKPOINTING)
def test_a_tiny_config_stays_as_it_is(family: str) -> None:
    values: dict[str, Any] = dict(tiny.CHECKPOINTING[family])
    if "sliding_window" in values:
        values["sliding_window"] = 8  # so that it cuts the shortest sequence
    small = scaled_down(values)
    assert {name: small.get(name) for name in values} == values


def test_a_narrow_part_keeps_its_heads() -> None:
    values = {"model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": 8, "intermediate_size": 1000}
    small = scaled_down(values)
    assert (small["num_attention_heads"], small["intermediate_size"]) == (8, 1000)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_small_is_not_scaled_again(family: str) -> None:
    small = scaled_down(config(family))
    assert scaled_down(small) == small


def test_nested_values_of_the_input_are_not_touched() -> None:
    """The config class itself writes into the old form of the rotary settings."""
    values: Any = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 8.0}}
    kept = copy.deepcopy(values)
    scaled_down(values)
    assert values == kept


def test_a_type_that_is_not_known_is_scaled_by_its_names() -> None:
    small = scaled_down({"model_type": "new", "hidden_size": 1024, "num_heads": 16, "num_layers": 48, "d_ff": 4096})
    assert small == {"model_type": "new", "hidden_size": 64, "num_heads": 4, "num_layers": 4, "d_ff": 256}
