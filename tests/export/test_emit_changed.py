"""`--emit` with `--layers` or `--set` writes code for the planned model, or is refused before any planning."""

from __future__ import annotations

import json

import planned
import pytest
from test_export import TARGETS, handover
from tiny import CHECKPOINTING, write_model

from gcbench import export
from gcbench.core import model_changes
from gcbench.core.errors import UsageError
from gcbench.core.model_changes import ChangedConfig
from gcbench.models import build as models
from gcbench.models import changed_config
from gcbench.models.sources import ModelSource

LOADS_BY_NAME = ("axolotl", "llama-factory", "torchtitan")
CHANGES = [
    ("llama", 2, {}, True),
    ("llama", None, {"hidden_size": 64}, False),
    ("gpt2", 2, {"n_embd": 64}, False),
    ("gpt2", 2, {"hidden_size": 64}, False),
    ("gemma2", 6, {"sliding_window": 8}, True),
    ("qwen3", 3, {"attention_dropout": 0.1}, True),
]


def source(folder, family):
    return ModelSource(name=family, origin="", config=CHECKPOINTING[family], location=str(folder))


@pytest.mark.parametrize(("family", "layers", "overrides", "keeps"), CHANGES)
def test_the_emitted_program_makes_the_model_that_was_planned(tmp_path, family, layers, overrides, keeps):
    """The traps: fields that follow from the changed one, lists with an entry for each layer, other spellings."""
    folder = write_model(tmp_path / family, family)
    of = source(folder, family)
    changed = changed_config.of(of, layers=layers, overrides=overrides)
    assert changed.keeps_weights == keeps
    told = model_changes.describe(layers, overrides)
    given = handover("off", model=family, hub_id=str(folder), precision="fp32", model_changes=told, config=changed)
    wanted = models.build_config(of, layers=layers, overrides=overrides)
    expected = {name: p.shape for name, p in models.build_meta(wanted).named_parameters()}
    for target in ("trainer", "trl", "python"):
        text = export.emit(target, given).text
        assert f"# for {family} with {told}" in text
        lines = text[text.index("config = AutoConfig") : text.index("model = ")]
        names: dict[str, object] = {}
        exec("from transformers import AutoConfig\n" + lines, names)
        made = names["config"]
        shapes = {name: p.shape for name, p in models.build_meta(made).named_parameters()}
        assert shapes == expected
        made.save_pretrained(tmp_path / "saved")  # transformers checks it then
        assert ("from_pretrained(\n" in text[text.index("model = ") :]) == keeps
        if not keeps:
            assert "model = AutoModelForCausalLM.from_config(\n    config," in text


def test_only_changed_fields_are_written():
    told = changed_config.of(planned.source_of("llama"), layers=2, overrides={})
    assert told.fields == {"num_hidden_layers": 2}
    grown = changed_config.of(planned.source_of("qwen3"), layers=3, overrides={})
    assert grown.fields["num_hidden_layers"] == 3
    assert all(len(value) == 3 for value in grown.fields.values() if isinstance(value, list))


@pytest.mark.parametrize("target", TARGETS)
def test_tools_that_load_a_model_by_its_name_refuse_and_others_write_it(target):
    config = ChangedConfig(fields={"num_hidden_layers": 2}, keeps_weights=True)
    given = handover(
        "off", precision="fp32", lora_target_modules=None, model_changes="num_hidden_layers=2", config=config
    )
    if target in LOADS_BY_NAME:
        with pytest.raises(UsageError, match=r"llama-3.2-1b with num_hidden_layers=2; save that model .* --emit"):
            export.emit(target, given)
        return
    text = export.emit(target, given).text
    assert "config.num_hidden_layers = 2" in text and "config=config" in text
    assert "num_hidden_layers" not in export.emit(target, handover("off", precision="fp32")).text


REFUSED = [
    (("--emit", "axolotl", "--layers", 2), "--emit axolotl: axolotl loads the unchanged model"),
    (("--emit", "llama-factory", "--set", "hidden_size=64"), "with hidden_size=64"),
    (("--emit", "axolotl", "--precision", "bf16-mixed"), "axolotl has no bf16-mixed"),
    (("--emit", "torchtitan", "--optim", "sgd"), "torchtitan has no sgd"),
    (("--emit", "torchtitan", "--lora-r", 4), "torchtitan has LoRA only in its models' Python configs"),
    (("--emit", "llama-factory", "--attn-implementation", "flex_attention"), "does not know the attention"),
    (("--emit", "axolotl", "--lora-r", 4), "plan with --lora-target-modules"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_a_workload_that_a_tool_cannot_run_is_refused_before_planning(cli, monkeypatch, tmp_path, flags, said):
    """The trap: 24 seconds of planning, and then the sentence."""
    monkeypatch.setattr(
        "gcbench.models.sources.resolve", lambda *args, **kwargs: pytest.fail("the model was looked for")
    )
    cli("plan", "-m", "gpt2", "--device", "h100", *flags, "--out", "p").refused(2, said)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_a_changed_model_is_exported_with_all_changes(cli, model, tmp_path):
    done = cli(
        *("plan", "-m", model(), "--layers", 2, "--seq-len", 16, "--device", "rtx-4090", "-b", 2),
        *("--strategies", "off", "--emit", "trainer", "--out", "p", "-q"),
    )
    assert done.code == 0, done.err
    assert "config.num_hidden_layers = 2" in done.out and "num_hidden_layers=2" in done.out
    again = cli("plan", "--from", "p", "--emit", "python", "-q")
    assert "config.num_hidden_layers = 2" in again.out
    cli("plan", "--from", "p", "--emit", "axolotl").refused(2, "loads the unchanged model")
    stored = json.loads((tmp_path / "p" / "planned.json").read_text())
    assert stored["changed"] == {"fields": {"num_hidden_layers": 2}, "keeps_weights": True}
