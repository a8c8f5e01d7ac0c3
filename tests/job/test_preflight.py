"""Mistakes that the config shows are reported before torch is imported, and nothing is refused that works."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
from parent_imports import HEAVY, imported

from gcbench.core.errors import GcbenchError, UsageError
from gcbench.core.records import Lora
from gcbench.job import preflight
from gcbench.models import library_text, sources
from gcbench.models.scaledown import scaled_down
from gcbench.models.sources import ModelSource

LORA = ("--lora-r", 4)
GPT2 = ("-m", "gpt2", "-b", 1)


def examined(config, **requested):
    source = ModelSource(name="it", origin="a test", config=config, location=".")
    return preflight.examine(source, preflight.Requested(**{"overrides": {}, **requested}))


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("run", *GPT2, "--seq-len", 1025), 2, "--seq-len 1025 is beyond the 1024 positions of gpt2"),
        (("predict", *GPT2, "--seq-len", 1025), 2, "1024 positions"),
        (("plan", "-m", "gpt2", "--seq-len", 1025), 2, "1024 positions"),
        (("check", "-m", "gpt2", "--seq-len", 1025), 2, "1024 positions"),
        (("run", *GPT2, "--set", "hidden_sise=8"), 2, "--set hidden_sise: the model's config has no such field"),
        (("check", "-m", "gpt2", "--set", "n_layr=8"), 2, "did you mean n_layer"),
        (("predict", *GPT2, "--strategies", "off,every:13"), 2, "every:13 needs at least 13 layers"),
        (("plan", "-m", "gpt2", "--strategies", "first:2", "--layers", 1), 2, "the model has 1; use first:1"),
        (("check", "-m", "gpt2", "--strategies", "segment:13"), 2, "use groups of 1 to 12"),
        (("predict", *GPT2, *LORA, "--lora-target-modules", "c_attn,c_prjo"), 2, "did you mean c_proj?"),
        (("run", "-m", "mamba-130m", "-b", 1, *LORA), 2, "add --lora-target-modules in_proj,x_proj,dt_proj"),
    ],
)
def test_a_mistake_that_the_config_shows_needs_no_torch(args, code, said, monkeypatch, capfd):
    """The trap: 6 s of imports in a child before a word about a stride."""
    ended, names = imported(*args)
    assert ended == code
    assert not names & set(HEAVY)
    monkeypatch.setattr("sys.argv", ["gcbench", *map(str, args)])
    from gcbench.cli import app as cli
    from gcbench.processes import children

    monkeypatch.setattr(children.ForkedChildren, "run", lambda *args, **kwargs: pytest.fail("a child was asked"))
    with pytest.raises(SystemExit):
        cli.main()
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "lama"}, "does not know; did you mean llama?"),
        ({"model_type": "transfo-xl"}, "install an older one"),
        ({"model_type": "vit"}, "choose a causal LM"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "add --trust-remote-code"),
    ],
)
def test_a_type_that_cannot_be_built_needs_no_torch(tmp_path, config, said):
    with pytest.raises(GcbenchError, match=said.replace("?", r"\?")) as refused:
        examined(config)
    assert refused.value.exit_code == 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, names = imported("predict", "-m", tmp_path, "-b", 1)
    assert code == 3 and not names & set(HEAVY)


def test_all_mistakes_of_the_model_are_reported_together():
    config = tiny.CONFIGS["gpt2"]
    lora = Lora(r=4, target_modules=("c_prjo",))
    with pytest.raises(UsageError) as refused:
        examined(config, seq_lens=(64, 129), strategies=("every:5", "per-layer"), lora=lora)
    assert len(str(refused.value).splitlines()) == 3


def test_changes_count():
    gpt2 = tiny.CONFIGS["gpt2"]
    for changes in ({"max_position_embeddings": 200}, {"n_positions": 200}):
        examined(gpt2, seq_lens=(200,), overrides=changes)
    with pytest.raises(UsageError, match="beyond the 16 positions"):
        examined(gpt2, seq_lens=(64,), overrides={"n_positions": 16})
    for layers, changes in ((8, {}), (None, {"num_hidden_layers": 8}), (None, {"n_layer": 8})):
        examined(gpt2, strategies=("every:8",), layers=layers, overrides=changes)
        with pytest.raises(UsageError, match="has 8"):
            examined(gpt2, strategies=("every:9",), layers=layers, overrides=changes)


def test_the_positions_of_a_text_model_within_another_count():
    text = {"model_type": "gemma3_text", **tiny.LLAMA_LIKE}
    with pytest.raises(UsageError, match="beyond the 128 positions"):
        examined({"model_type": "gemma3", "text_config": text}, seq_lens=(129,))
    examined(
        {"model_type": "gemma3", "text_config": text},
        seq_lens=(129,),
        overrides={"text_config.max_position_embeddings": 129},
    )


@pytest.mark.parametrize(
    ("config", "requested"),
    [
        # Not one list of layers: an encoder and a decoder, a vision tower besides, one layer run many times.
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2}}, "every:5"),
        ({"model_type": "zamba2", "num_hidden_layers": 2}, "every:5"),
        ({"model_type": "ctrl", **tiny.CONFIGS["ctrl"]}, "every:9"),
        # Neither depth nor positions are given, or under two names.
        ({"model_type": "llama"}, "every:99"),
        ({"model_type": "gpt2", "n_layer": 4, "num_hidden_layers": 8, "n_positions": 8}, "every:6"),
    ],
)
def test_what_the_config_does_not_show_is_left_to_the_child(config, requested):
    examined(config, strategies=(requested,), seq_lens=(8,))


def test_code_of_the_models_own_is_left_to_the_child():
    source = ModelSource(
        name="it",
        origin="a test",
        config={"model_type": "gpt2", "auto_map": {}, "n_positions": 8},
        location=".",
        trust_remote_code=True,
    )
    requested = preflight.Requested(overrides={"own": 1}, seq_lens=(64,), strategies=("every:99",))
    assert preflight.examine(source, requested) == source


@pytest.mark.parametrize("name", ["0", "q_proj", "layers.3.self_attn.q_proj", "embed_tokens", "lm_head", "all-linear"])
def test_a_module_that_may_be_there_is_left_to_the_child(name):
    examined(tiny.CONFIGS["llama"], lora=Lora(r=4, target_modules=(name,)))


def test_names_of_experts_that_peft_translates_are_left_to_the_child():
    """transformers holds w1 and w3 as one parameter, and peft takes the old names for it."""
    examined(tiny.CONFIGS["mixtral"], lora=Lora(r=4, target_modules=("w1", "w2", "w3")))


# What is read as text, against transformers itself


@pytest.fixture(scope="module")
def causal_lms(request):
    transformers = pytest.importorskip("transformers")
    before = transformers.logging.get_verbosity()
    request.addfinalizer(lambda: transformers.logging.set_verbosity(before))
    transformers.logging.set_verbosity_error()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return CONFIG_MAPPING, CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_every_type_is_known_and_every_causal_lm_has_its_class(causal_lms):
    _, known, causal = causal_lms
    assert all(library_text.is_known(model_type) for model_type in known)
    assert {name: library_text.causal_lm_class(name) for name in known if name in causal} == dict(causal)
    assert {library_text.causal_lm_class(name) for name in known if name not in causal} == {""}


def test_every_field_of_every_config_is_among_its_names(causal_lms):
    """A field that was missing here would be refused although transformers takes it."""
    configs, _, causal = causal_lms
    compared = 0
    for model_type in causal:
        names = library_text.names_in_config(model_type)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fields = {**configs[model_type]().to_dict(), **configs[model_type].attribute_map}
        except Exception:  # some cannot be made without values
            continue
        assert names is None or not set(fields) - names, model_type
        for field in ("max_position_embeddings", "num_hidden_layers"):
            own = library_text.own_name(model_type, field)
            assert own in (None, configs[model_type].attribute_map.get(field, field)), model_type
        compared += names is not None
    assert compared > 150


@pytest.mark.parametrize("family", [*tiny.CONFIGS, "bert", "phi3", "gemma", "falcon", "qwen2", "olmo2"])
def test_depth_positions_and_modules_are_those_of_the_model(family):
    from gcbench.checkpointing import apply as checkpointing
    from gcbench.models import build as models

    config = tiny.CONFIGS.get(family) or scaled_down({"model_type": family}, layers=3)
    source = ModelSource(name=family, origin="a test", config=config, location=".")
    built = models.build_config(source, layers=None, overrides={})
    model = models.build_meta(built)
    depth = preflight._depth(config, None)
    assert depth in (None, len(checkpointing.checkpointable_layers(model)))
    assert depth is None or checkpointing.refusal(model) is None
    limit = preflight._size(config, "max_position_embeddings")
    assert limit in (None, models.max_seq_len(built))
    words = library_text.names_in_model(str(config["model_type"]))
    parts = {part for name, _ in model.named_modules() for part in name.split(".") if part and not part.isdecimal()}
    assert words is None or not parts - words


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "mixtral", "mamba", "bert"])
def test_depth_is_known_of_common_families(family):
    assert library_text.has_one_list_of_layers(family)


def test_a_transformers_that_reads_otherwise_leaves_all_to_the_child(monkeypatch):
    monkeypatch.setattr(library_text, "_text", lambda path, package="transformers": None)
    for cached in (library_text._causal_lms, library_text._module):
        cached.cache_clear()
    try:
        config = {"model_type": "lama", "num_hidden_layers": 2, "max_position_embeddings": 8}
        requested = {"seq_lens": (64,), "strategies": ("every:9",), "overrides": {"x": 1}}
        assert examined(config, lora=Lora(r=4, target_modules=("x",)), **requested).notices == ()
    finally:
        for cached in (library_text._causal_lms, library_text._module):
            cached.cache_clear()


def test_sources_are_resolved_before_anything_is_created(cli, tmp_path):
    result = cli("check", "-m", "gpt2", "--strategies", "every:13", "--out", tmp_path / "out")
    result.refused(2, "every:13")
    assert not (tmp_path / "out").exists()
    assert sources.resolve("gpt2").notices == ()
