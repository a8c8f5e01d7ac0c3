"""What is said of a model that is refused, or built as another: each with a next step that works."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import tiny

from gcbench.core.errors import MissingLibrary, UnavailableError
from gcbench.core.units import counted
from gcbench.job import preflight
from gcbench.models import catalogue, refusals, sources
from gcbench.models.sources import ModelSource

TEXT = {"model_type": "llama", **tiny.LLAMA_LIKE}
BERT = {
    "model_type": "bert",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BART = {
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 256,
    "is_encoder_decoder": True,
}


def notices(config, **overrides):
    source = ModelSource(name="it", origin="a test", config=config, location=".")
    return preflight.examine(source, preflight.Requested(overrides=overrides)).notices


# A model for something else than text to come


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**BERT, "architectures": ["BertForSequenceClassification"]}, ("BertLMHeadModel", "256 tokens", "are lower")),
        ({**BERT, "architectures": ["BertForTokenClassification"]}, ("does not have", "are lower")),
        ({**BERT, "architectures": ["BertForQuestionAnswering"]}, ("does not have", "are lower")),
        ({**BERT, "architectures": ["BertForMaskedLM"]}, ("the same layers", "only those before it")),
        ({**BERT, "architectures": ["BertModel"]}, ("does not have", "are lower")),
        ({**TEXT, "architectures": ["LlamaForSequenceClassification"]}, ("LlamaForCausalLM", "are lower")),
        ({**tiny.CONFIGS["gpt2"], "architectures": ["GPT2DoubleHeadsModel"]}, ("GPT2LMHeadModel", "differ")),
        (
            {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "vision_config": {}},
            ("only its text model (Llama4ForCausalLM)",),
        ),
        ({**TEXT, "architectures": ["LlamaForRewardModel"]}, ("LlamaForCausalLM", "are lower")),
    ],
)
def test_what_is_built_in_place_of_another_head_is_said(config, words):
    (said,) = notices(config)
    assert said.startswith(f"The config is of {config['architectures'][0]}; gcbench trains ")
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "config",
    [
        TEXT,
        {**TEXT, "architectures": []},
        {**TEXT, "architectures": ["LlamaForCausalLM"]},
        {**TEXT, "architectures": ["LLaMAForCausalLM"]},
        {**tiny.CONFIGS["gpt2"], "architectures": ["GPT2LMHeadModel"]},
        {**BART, "architectures": ["BartForCausalLM"]},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
    ],
)
def test_nothing_is_said_of_a_causal_lm(config):
    assert notices(config) == ()


def test_no_model_of_the_catalogue_is_said_to_be_another():
    for entry in catalogue.architectures():
        said = preflight.examine(sources.resolve(entry.name), preflight.Requested(overrides={})).notices
        assert all("is published in" in notice for notice in said), entry.name


def test_every_table_says_it(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TEXT, "architectures": ["LlamaForSequenceClassification"]}))
    result = cli("predict", "-m", tmp_path, "-b", 1, "--seq-len", 8, "--strategies", "off", "--device", "cpu")
    assert result.code == 0, result.err
    assert "The config is of LlamaForSequenceClassification" in result.out


def test_half_a_model_is_not_taken_for_all_of_it(cli, tmp_path):
    """The trap: transformers builds the decoder of an encoder-decoder as a causal LM, half of its parameters."""
    (tmp_path / "config.json").write_text(json.dumps(BART))
    args = ("predict", "-m", tmp_path, "-b", 1, "--seq-len", 8, "--strategies", "off", "--device", "cpu")
    cli(*args).refused(3, "encoder-decoder (BartForConditionalGeneration)", "--set is_encoder_decoder=false")
    result = cli(*args, "--set", "is_encoder_decoder=false", "--json")
    assert result.code == 0, result.err
    assert "gcbench trains only its decoder (BartForCausalLM)" in result.rows["off"]["model_notice"]


def test_an_encoder_decoder_that_does_not_say_so_is_one_all_the_same():
    config = {name: value for name, value in BART.items() if name not in ("is_encoder_decoder", "architectures")}
    with pytest.raises(UnavailableError, match="is an encoder-decoder"):
        notices(config)


# Models of images and text


def refusal(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnavailableError) as refused:
        preflight.examine(sources.resolve(str(folder)), preflight.Requested(overrides={}))
    return str(refused.value)


MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llava", "text_config": TEXT}, "llama"),
        (
            {
                "model_type": "qwen2_5_vl",
                "text_config": {**TEXT, "model_type": "qwen2_5_vl_text", "rope_scaling": MROPE},
            },
            "qwen2",
        ),
        ({**TEXT, "model_type": "qwen2_vl", "vision_config": {"depth": 2}, "rope_scaling": MROPE}, "qwen2"),
        (
            {
                "model_type": "qwen2_5_omni",
                "thinker_config": {"text_config": {**TEXT, "model_type": "qwen2_5_omni_text"}},
            },
            "qwen2",
        ),
        ({"model_type": "qwen3_vl", "text_config": {**TEXT, "model_type": "qwen3_vl_text"}}, "qwen3"),
        ({"model_type": "mistral3", "text_config": {**TEXT, "model_type": "mistral"}}, "mistral"),
    ],
)
def test_the_command_that_is_told_makes_a_model_that_can_be_taken(tmp_path, config, kind):
    said = refusal(config, tmp_path)
    command = re.search(r'python -c "(.*)", then use -m text\.json', said)[1]
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    text = json.loads((tmp_path / "text.json").read_text())
    assert text["model_type"] == kind and text["hidden_size"] == TEXT["hidden_size"]
    from gcbench.models import build as models

    source = preflight.examine(sources.resolve(str(tmp_path / "text.json")), preflight.Requested(overrides={}))
    built = models.build_config(source, layers=None, overrides={})
    assert models.facts(source, built, None).num_layers == tiny.NUM_LAYERS


def test_a_catalogue_model_of_the_same_sizes_is_named(tmp_path):
    config = catalogue.config_of(catalogue.find("qwen3-8b"))
    said = refusal({"model_type": "qwen3_vl", "text_config": {**config, "model_type": "qwen3_vl_text"}}, tmp_path)
    assert said.endswith("its text model has the sizes of qwen3-8b, so use -m qwen3-8b")


# Packages, adapters, weights


@pytest.mark.parametrize(
    ("err", "package"),
    [
        (ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment."), "timm"),
        (ImportError("Using X needs its kernels: `pip install causal-conv1d`"), "causal-conv1d"),
        (ModuleNotFoundError("No module named 'einops.layers'", name="einops.layers"), "einops"),
    ],
)
def test_a_package_that_is_missing_is_told_with_the_command_that_installs_it(err, package):
    said = refusals.missing_library("m", err)
    assert isinstance(said, MissingLibrary)
    assert str(said).endswith(f"; install it with pip install {package}")


def test_other_errors_are_no_missing_package():
    assert refusals.missing_library("m", ValueError("requires the timm library")) is None
    assert refusals.missing_library("m", ImportError("libfoo.so.1: cannot open shared object file")) is None


def test_a_folder_with_an_adapter_names_its_model(cli, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B", "r": 8}')
    cli("predict", "-m", tmp_path, "-b", 1).refused(3, "a LoRA adapter of Qwen/Qwen3-8B", "--lora-r")


def test_a_file_of_weights_is_no_config(cli, tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF\x03\x00")
    cli("predict", "-m", tmp_path / "model.Q4_K_M.gguf", "-b", 1).refused(3, "is a weights file", "config.json")


def test_weights_that_cannot_be_fetched_are_told_without_near_names(cli, monkeypatch, tmp_path):
    from gcbench.models import sources as module

    monkeypatch.setattr(module, "_online", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = cli("run", "-m", "phi-2", "-b", 1, "--pretrained")
    result.refused(3, "the weights of 'phi-2' are not in the cache", "hf download microsoft/phi-2", "leave out --pretr")
    assert "near names" not in result.err


@pytest.mark.parametrize("command", ["run", "check", "env"])
@pytest.mark.parametrize("name", ["h100", "A100 40GB", "rtx_4090"])
def test_a_card_that_is_not_here_leads_to_predict(cli, command, name):
    args = {"run": ("-m", "gpt2", "-b", 1), "check": ("-m", "gpt2"), "env": ()}[command]
    cli(command, *args, "--device", name).refused(2, "gcbench predict --device", "gcbench plan --device", "cuda:N")


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (tiny.CONFIGS["mamba"], "in_proj, x_proj, dt_proj"),
        ({**tiny.CONFIGS["mixtral"], "model_type": "olmoe", "num_experts": 4}, "all linear layers"),
    ],
)
def test_a_check_puts_adapters_where_peft_knows_no_place(cli, tmp_path, config, where):
    """The trap: `not possible; add --lora-target-modules`, which check does not have, and peft refuses out_proj."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = ("--strategies", "per-layer", "--train", "lora", "--device", "cpu", "--json", "--out", tmp_path / "out")
    result = cli("check", "-m", tmp_path, *args)
    assert result.code == 0, result.err
    assert result.rows["per-layer"]["verdict"] == "identical"
    assert f"adapters are on {where}." in (tmp_path / "out" / "check.md").read_text()


# Numbers in sentences


def test_counts_of_one_are_singular():
    assert (counted(1, "layer"), counted(0, "layer"), counted(1234, "token")) == ("1 layer", "0 layers", "1,234 tokens")


@pytest.mark.parametrize(
    ("spec", "layers", "said"),
    [
        ("every:2", 1, "every:2 needs at least 2 layers and the model has 1; use every:1"),
        ("segment:4", 1, "the model has 1; use segment:1"),
        ("last:2", 1, "the model has 1; use last:1"),
        ("first:1", 0, "first:1 needs at least 1 layer and the model has 0; use off"),
        ("first:9", 2, "the model has 2; use a number from 1 to 2"),
    ],
)
def test_a_range_of_one_value_is_that_value(spec, layers, said):
    from gcbench import strategies

    with pytest.raises(ValueError, match=said):
        strategies.parse(spec).plan_for(layers)


def test_what_no_card_holds_is_to_be_shared(cli):
    args = ("-b", 1, "--seq-len", 8, "--strategies", "off", "--precision", "bf16", "--device", "h200")
    result = cli("predict", "-m", "llama-3.1-405b", *args)
    assert "No card has that much memory: 22 or more of this size could share it (FSDP or ZeRO-3" in " ".join(
        result.out.split()
    )
