"""The built-in catalogue: every architecture builds and has the published number of parameters."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gcbench.models import catalogue
from gcbench.models.catalogue import Architecture, architectures, config_of, find, nearest

REQUIRED_FAMILIES = {
    "DeepSeek",
    "Falcon",
    "Gemma 2",
    "Gemma 3",
    "GPT-2",
    "gpt-oss",
    "Llama 2",
    "Llama 3",
    "Mamba",
    "Mistral",
    "Mixtral",
    "OLMo 2",
    "OPT",
    "Phi",
    "Pythia",
    "Qwen2.5",
    "Qwen3",
    "SmolLM2",
    "TinyLlama",
}

NOT_ARCHITECTURE = {
    "_name_or_path",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}

# Hub safetensors totals that count more than distinct parameters, with the surplus: stored
# causal masks (GPT-2), rotary inverse frequencies (Llama 2), a second copy of the tied output
# embedding (Falcon, Qwen3).
HUB_TOTALS = {
    "gpt2": (137_022_720, 12 * 1024 * 1024),
    "llama-2-7b": (6_738_417_664, 32 * 64),
    "llama-2-13b": (13_015_866_880, 40 * 64),
    "llama-2-70b": (68_976_653_312, 80 * 64),
    "falcon-7b": (7_217_189_760, 65_024 * 4544),
    "falcon-40b": (41_835_970_560, 65_024 * 8192),
    "qwen3-0.6b": (751_632_384, 151_936 * 1024),
    "qwen3-1.7b": (2_031_739_904, 151_936 * 2048),
}


def named(name: str) -> Architecture:
    architecture = find(name)
    assert architecture is not None, name
    return architecture


def built_params(architecture: Architecture) -> int:
    config = config_of(architecture)
    parsed = CONFIG_MAPPING[str(config["model_type"])].from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", architectures(), ids=lambda a: a.name)
def test_built_model_has_the_published_number_of_parameters(architecture: Architecture) -> None:
    """Traps: tied embeddings counted twice, padded vocabularies, biases, query and key norms."""
    built = built_params(architecture)
    error = abs(built - architecture.published_params) / architecture.published_params
    assert error <= architecture.params_tolerance, f"{built:,} built: {architecture.published_as}"


@pytest.mark.parametrize("name", HUB_TOTALS)
def test_hub_total_less_its_surplus_is_the_published_count(name: str) -> None:
    """The correction of a Hub total is arithmetic on known shapes, not a fit to what is built."""
    total, surplus = HUB_TOTALS[name]
    assert named(name).published_params == total - surplus


@pytest.mark.parametrize("architecture", architectures(), ids=lambda a: a.name)
def test_tolerance_is_no_wider_than_the_published_rounding(architecture: Architecture) -> None:
    digits = str(architecture.published_params)
    unit = 10 ** (len(digits) - len(digits.rstrip("0")))
    assert 0 <= architecture.params_tolerance <= unit / 2 / architecture.published_params


@pytest.mark.parametrize("architecture", architectures(), ids=lambda a: a.name)
def test_an_exact_count_is_quoted_digit_by_digit_or_derived_from_one(
    architecture: Architecture,
) -> None:
    quoted = {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d", architecture.published_as)}
    total, _ = HUB_TOTALS.get(architecture.name, (architecture.published_params, 0))
    if architecture.params_tolerance == 0:
        assert quoted & {total, architecture.published_params}


def test_every_configuration_is_indexed_and_the_reverse() -> None:
    files = (resources.files(catalogue) / "configs").iterdir()
    stored = {file.name.removesuffix(".json") for file in files}
    assert stored == {architecture.name for architecture in architectures()}


def test_at_least_forty_architectures_and_every_required_family() -> None:
    assert len(architectures()) >= 40
    assert {architecture.family for architecture in architectures()} >= REQUIRED_FAMILIES


def test_configurations_hold_architecture_fields_only() -> None:
    for architecture in architectures():
        config = config_of(architecture)
        assert not NOT_ARCHITECTURE & config.keys(), architecture.name
        assert config["architectures"], architecture.name


def test_sorted_by_family_then_size() -> None:
    keys = [(a.family.casefold(), a.published_params) for a in architectures()]
    assert keys == sorted(keys)


def test_no_two_architectures_share_a_name_hub_id_or_alias() -> None:
    keys = [
        key.casefold()
        for a in architectures()
        for key in {a.name.casefold(), a.hub_id.casefold(), *map(str.casefold, a.aliases)}
    ]
    assert len(keys) == len(set(keys))


def test_config_of_returns_a_fresh_copy() -> None:
    gpt2 = named("gpt2")
    config_of(gpt2)["n_layer"] = 0
    assert config_of(gpt2)["n_layer"] == 12


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("gpt2", "gpt2"),
        ("GPT2", "gpt2"),
        (" gpt2 ", "gpt2"),
        ("openai-community/gpt2", "gpt2"),
        ("EleutherAI/pythia-160m-deduped", "pythia-160m"),
        ("meta-llama/llama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Mistral-Nemo-Base-2407", "mistral-nemo-12b"),
        ("Llama-3.3-70B-Instruct", "llama-3.3-70b"),
    ],
)
def test_find_by_name_hub_id_alias_and_last_path_part(asked: str, name: str) -> None:
    assert named(asked).name == name


@pytest.mark.parametrize("asked", ["", "gpt", "meta-llama/", "someone/gpt2", "llama-3.1-9b"])
def test_find_does_not_guess(asked: str) -> None:
    """Trap: a private fine-tune called `someone/gpt2` need not have the shapes of GPT-2."""
    assert find(asked) is None


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("lama-3.1-8b", "llama-3.1-8b"),
        ("gpt-2", "gpt2"),
        ("GPT2XL", "gpt2-xl"),
        ("meta-llama/Llama-3-1-8B", "llama-3.1-8b"),
        ("EleutherAI/pythia-160", "pythia-160m"),
        ("qwen-3-30b-a3b", "qwen3-30b-a3b"),
        ("mixtral8x7b", "mixtral-8x7b"),
        ("gpt-oss:20b", "gpt-oss-20b"),
    ],
)
def test_nearest_finds_what_was_meant(asked: str, name: str) -> None:
    assert nearest(asked)[0] == name


def test_nearest_obeys_its_limit_and_stays_silent_when_nothing_is_close() -> None:
    assert len(nearest("llama")) <= 3
    assert len(nearest("llama-3.1-8", limit=1)) == 1
    assert nearest("zzzz") == ()
    assert nearest("") == ()
    assert nearest("///") == ()


def test_nearest_rejects_a_limit_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        nearest("gpt2", limit=0)
