"""Emitted settings express the plan in each tool, and each tool knows every one of them."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from test_export import DATA, EXPRESSED, FOUND_PLAN, SPECS, TARGETS, arguments, flags, handover, rival, settings

import gcbench
from gcbench import export
from gcbench.core.errors import UsageError
from gcbench.export._handover import SEARCHED
from gcbench.job.settings import PRECISION_NAMES
from gcbench.strategies.selective import NAMED
from gcbench.training import optimizers

# The workload


def test_a_program_can_be_compiled_and_a_file_parsed():
    for target in TARGETS:
        for precision in PRECISION_NAMES:
            for optim in optimizers.names():
                for lora in ({}, {"lora_r": 4, "lora_target_modules": ("q_proj", "v_proj")}):
                    given = handover("every:2", precision=precision, optim=optim, **lora)
                    try:
                        text = export.emit(target, given).text
                    except UsageError:
                        assert target in ("axolotl", "llama-factory", "torchtitan")
                        continue
                    assert text.endswith("\n") and "\n\n\n\n" not in text
                    assert max(map(len, text.splitlines())) <= 120
                    if target in ("python", "trainer", "trl"):
                        compile(text, target, "exec")
                    elif target == "torchtitan":
                        assert arguments(text)[0] == "torchrun"
                    else:
                        assert isinstance(settings(text), dict)


@pytest.mark.parametrize("target", ["trainer", "trl"])
def test_precision_is_stated_for_the_weights_and_for_autocast(target):
    """The traps: trl's default is bf16 autocast, and transformers' default for the weights is the checkpoint's."""
    said = {"fp32": ("torch.float32", False, False), "bf16": ("torch.bfloat16", False, False)}
    said |= {"bf16-mixed": ("torch.float32", True, False), "fp16-mixed": ("torch.float32", False, True)}
    for precision, (dtype, bf16, fp16) in said.items():
        text = export.emit(target, handover("off", precision=precision)).text
        assert f"dtype={dtype},\n" in text and f"    bf16={bf16},\n" in text and f"    fp16={fp16},\n" in text


def test_precision_is_set_in_the_other_tools():
    def said(target: str, precision: str) -> dict[str, object]:
        return settings(export.emit(target, handover("off", precision=precision)).text)

    assert {name: said("accelerate-fsdp", name)["mixed_precision"] for name in PRECISION_NAMES} == {
        "fp32": "no",  # a text: YAML's own no is False
        "bf16": "no",
        "bf16-mixed": "bf16",
        "fp16-mixed": "fp16",
    }
    of_weights = {"fp32": None, "bf16": "pure_bf16", "bf16-mixed": "bf16", "fp16-mixed": "fp16"}
    for name, key in of_weights.items():
        assert {key for key in of_weights.values() if key and said("llama-factory", name).get(key)} == {key} - {None}
    assert said("axolotl", "bf16")["bf16"] is True and said("axolotl", "fp32")["bf16"] is False
    mixed = flags(export.emit("torchtitan", handover("off", precision="bf16-mixed")).text)
    assert (mixed["--training.dtype"], mixed["--training.mixed_precision_param"]) == ("float32", "bfloat16")
    assert (
        "torch.autocast(device, torch.bfloat16)" in export.emit("python", handover("off", precision="bf16-mixed")).text
    )
    assert "GradScaler" in export.emit("python", handover("off", precision="fp16-mixed")).text
    assert "autocast" not in export.emit("python", handover("off")).text


def test_lora_is_set_in_each_tool():
    named = handover("per-layer", lora_r=16, lora_target_modules=("q_proj", "v_proj"))
    every = handover("per-layer", lora_r=16, lora_target_modules=("all-linear",))
    peft_s = handover("per-layer", lora_r=16)
    for target in ("python", "trainer", "trl"):
        assert 'LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type=' in export.emit(target, named).text
        assert 'LoraConfig(r=16, target_modules="all-linear", task_type=' in export.emit(target, every).text
        assert 'LoraConfig(r=16, task_type="CAUSAL_LM")' in export.emit(target, peft_s).text
    axolotl = settings(export.emit("axolotl", named).text)
    assert (axolotl["adapter"], axolotl["lora_r"], axolotl["lora_target_modules"]) == ("lora", 16, ["q_proj", "v_proj"])
    assert settings(export.emit("axolotl", every).text)["lora_target_linear"] is True
    factory = settings(export.emit("llama-factory", named).text)
    assert (factory["finetuning_type"], factory["lora_rank"], factory["lora_target"]) == ("lora", 16, "q_proj,v_proj")
    assert settings(export.emit("llama-factory", every).text)["lora_target"] == "all"
    assert "#   LoRA of rank 16 on ['q_proj', 'v_proj']\n" in export.emit("accelerate-fsdp", named).text


def test_axolotl_saves_attention_with_lora_but_no_matrix_products():
    """axolotl refuses matrix products then, because peft adds to them in place."""
    lora = {"lora_r": 4, "lora_target_modules": ("q_proj",)}
    assert export.emit("axolotl", handover("selective:attention", **lora)).notice is None
    emitted = export.emit("axolotl", handover("selective:matmul", **lora))
    assert emitted.expressed.strategy == "selective:attention"
    assert "cannot save the outputs of matrix products with LoRA" in str(emitted.notice)


REFUSED = {
    "axolotl holds weights in 16 bits": ("axolotl", {"precision": "bf16-mixed"}, "--precision bf16"),
    "axolotl names its attention": ("axolotl", {"attn_implementation": "paged"}, "sdpa"),
    "axolotl has no default targets": ("axolotl", {"lora_r": 4}, "--lora-target-modules"),
    "llama-factory has other default targets": ("llama-factory", {"lora_r": 4}, "--lora-target-modules"),
    "llama-factory keeps the checkpoint's dtype": (
        "llama-factory",
        {"lora_r": 4, "precision": "fp32"},
        "--precision bf16",
    ),
    "llama-factory names its attention": ("llama-factory", {"attn_implementation": "flex_attention"}, "sdpa"),
    "torchtitan has no LoRA": ("torchtitan", {"lora_r": 4}, "--emit trainer"),
    "torchtitan has no fp16": ("torchtitan", {"precision": "fp16-mixed"}, "--precision bf16-mixed"),
    "torchtitan has no SGD": ("torchtitan", {"optim": "sgd"}, "--optim adamw_torch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_workload_that_a_tool_cannot_run_is_refused(name):
    """The trap: another optimizer or dtype of the weights than was planned takes other memory."""
    target, changes, remedy = REFUSED[name]
    with pytest.raises(UsageError, match=rf"^--emit {target}: .*; .*{remedy}") as refused:
        export.emit(target, handover("per-layer", **changes))
    assert len(str(refused.value).splitlines()) == 1


def test_attention_is_not_set_where_the_model_chooses():
    for target in TARGETS:
        text = export.emit(target, handover("off", attn_implementation=None)).text
        assert "sdpa" not in text and "attn" not in text


def test_the_model_is_named_as_the_tool_finds_it():
    for target in set(TARGETS) - {"accelerate-fsdp"}:
        assert "meta-llama/Llama-3.2-1B" in export.emit(target, handover("off")).text
        local = export.emit(target, handover("off", model='my "own" model', hub_id=None)).text
        if target in ("axolotl", "llama-factory"):
            assert 'my "own" model' in settings(local).values()
        elif target == "torchtitan":
            assert flags(local)["--hf_model"] == 'my "own" model'
        else:
            assert 'from_pretrained(\n    "my \\"own\\" model",' in local


# Checkpointing


@pytest.mark.parametrize("target", ["axolotl", "llama-factory", "trainer", "trl"])
def test_use_reentrant_is_explicit_wherever_layers_are_checkpointed(target):
    """The trap: the default is reentrant in axolotl and LLaMA-Factory, and with any kwargs in transformers."""
    for spec in EXPRESSED[target] - {"off"}:
        text = export.emit(target, handover(spec)).text
        reentrant = "reentrant" in spec
        if "use_unsloth_gc" in text:  # a function of its own
            continue
        if target in ("axolotl", "llama-factory"):
            said = settings(text)
            assert {**said, **said.get("gradient_checkpointing_kwargs", {})}.get(
                "use_reentrant", said.get("use_reentrant_gc")
            ) is reentrant, spec
        else:
            assert f'"use_reentrant": {reentrant}' in text, spec


def test_off_is_explicit_where_the_default_is_on():
    assert "activation_checkpointing=False" in export.emit("trl", handover("off")).text
    assert settings(export.emit("llama-factory", handover("off")).text)["disable_gradient_checkpointing"] is True
    assert arguments(export.emit("torchtitan", handover("off")).text)[-1] == "activation-checkpoint:none"
    assert settings(export.emit("axolotl", handover("off")).text)["gradient_checkpointing"] is False


@pytest.mark.parametrize("target", ["trainer", "trl"])
def test_a_function_is_never_among_a_trainer_s_arguments(target):
    """The trap: the run stops with its first checkpoint, hours in, since the arguments cannot be pickled."""
    text = export.emit(target, handover("every:2+selective:matmul")).text
    _, _, after = text.partition("args = ")
    assert "context_fn" in text and "context_fn" not in after and "activation_checkpointing=False" in after


@pytest.mark.parametrize("target", ["trainer", "trl"])
def test_a_program_that_saves_attention_warns_of_dropout_inside_it(target):
    """The trap: on CUDA torch does not repeat the draws of a saved operator; gradients are wrong without an error."""
    for spec, warned in (("selective:attention", True), ("selective:matmul", True), ("selective:mm", False)):
        assert ("With attention dropout on CUDA" in export.emit(target, handover(spec)).text) == warned
    assert "dropout" not in export.emit(target, handover("per-layer")).text


@pytest.mark.parametrize("target", ["trainer", "trl"])
def test_the_spelling_before_5_23_is_named(target):
    for spec in ("off", "per-layer", "selective:matmul"):
        text = export.emit(target, handover(spec)).text
        assert "write gradient_checkpointing wherever this says\n# activation_checkpointing" in text
        assert "5.16" not in text and "5.17" not in text
    text = export.emit(target, handover("every:2+offload")).text
    assert "every_n_layers needs 5.16" in text and "offload needs 5.17" in text


def test_operators_have_their_namespace_once():
    spec = "selective:mm/aten::bmm/flash_attn::_flash_attn_forward"
    text = export.emit("trainer", handover(spec)).text
    assert 'SAVED = {\n    "aten::mm",\n    "aten::bmm",\n    "flash_attn::_flash_attn_forward",\n}' in text


def test_axolotl_saves_operators_by_their_full_names():
    said = settings(export.emit("axolotl", handover("every:2+selective:matmul+offload")).text)
    assert said["selective_checkpointing"]["save"] == [f"aten::{name}" for name in NAMED["matmul"]]
    assert said["selective_checkpointing"]["save_sliding_window"] is True
    assert said["gradient_checkpointing_kwargs"] == {"use_reentrant": False, "every_n_layers": 2}
    assert said["activation_offloading"] == "hidden_states"


def test_compiled_blocks_in_torchtitan():
    def words(spec: str) -> list[str]:
        return arguments(export.emit("torchtitan", handover(spec)).text)

    assert words("compile")[-4:] == ["--compile.enable", "--compile.components", "model", "activation-checkpoint:none"]
    assert words("per-layer+compile")[-1] == "activation-checkpoint:full"
    assert words("compile:0.5")[-3:] == [
        *("activation-checkpoint:memory-budget", "--activation_checkpoint.memory_budget", "0.5"),
    ]


@pytest.mark.parametrize("spec", [*SPECS, SEARCHED])
def test_python_applies_the_spec_or_the_file_or_the_plan_itself(spec):
    chosen = rival(spec, plan=FOUND_PLAN if spec == SEARCHED else None)
    stored = export.emit("python", handover(chosen)).text
    assert f'gcbench.apply(model, "{"plan:found.json" if spec == SEARCHED else spec}")\n' in stored
    assert f'"{spec}")' in export.emit("python", handover(chosen, plan_file="x.json")).text or spec == SEARCHED
    whole = export.emit("python", handover(replace(chosen, strategy=SEARCHED), plan_file=None)).text
    start = whole.index("gcbench.Plan(")
    assert eval(whole[start : whole.index("gcbench.apply(model, plan)")], {"gcbench": gcbench}) == chosen.plan


# Keys of tools that cannot be installed beside these libraries


@pytest.fixture(scope="module")
def legal() -> dict[str, dict[str, object]]:
    return tomllib.loads((DATA / "legal_keys.toml").read_text(encoding="utf-8"))


def every_text(target: str) -> list[str]:
    """Return the text for every setting, precision and optimizer that the target accepts."""
    lora = {"lora_r": 4, "lora_target_modules": ("q_proj",)}
    texts = []
    for spec in SPECS:
        for changes in ({}, lora, {**lora, "lora_target_modules": ("all-linear",)}, {"precision": "fp32"}):
            for more in ({}, {"precision": "bf16-mixed"}, {"precision": "fp16-mixed"}, {"optim": "adamw_torch_fused"}):
                try:
                    texts.append(export.emit(target, handover(spec, **(changes | more))).text)
                except UsageError:
                    continue
    return texts


def test_axolotl_knows_every_key(legal):
    """Keys of axolotl 0.19.0, read from its schema; it pins other versions of what these tests run with."""
    keys = str(legal["axolotl"]["keys"]).split()
    texts = every_text("axolotl")
    assert len(texts) > 50
    for text in texts:
        said = settings(text)
        inner = [f"selective_checkpointing.{key}" for key in said.get("selective_checkpointing", {})]
        assert {*said, *inner} <= set(keys)
        assert said["attn_implementation"] in legal["axolotl"]["attn_implementation"]
        assert said.get("activation_offloading", "disk") in legal["axolotl"]["activation_offloading"]


def test_axolotl_s_attention_is_all_that_it_names(legal):
    for name in legal["axolotl"]["attn_implementation"]:
        assert (
            settings(export.emit("axolotl", handover("off", attn_implementation=name)).text)["attn_implementation"]
            == name
        )


def test_llama_factory_knows_every_key(legal):
    """Keys of llamafactory 0.9.5, read from its arguments; it needs transformers 5.6 or older."""
    texts = every_text("llama-factory")
    assert len(texts) > 50
    for text in texts:
        said = settings(text)
        assert set(said) <= set(str(legal["llama-factory"]["keys"]).split())
        assert said["flash_attn"] in legal["llama-factory"]["flash_attn"]
    named = {
        settings(export.emit("llama-factory", handover("off", attn_implementation=name)).text)["flash_attn"]
        for name in ("eager", "sdpa", "flash_attention_2")
    }
    assert named < set(legal["llama-factory"]["flash_attn"]) and len(named) == 3


def test_torchtitan_knows_every_flag(legal):
    """Flags of torchtitan 0.3.0, read from its --help; it needs Triton to import."""
    known = legal["torchtitan"]
    texts = every_text("torchtitan")
    assert len(texts) > 50
    for text in texts:
        words = arguments(text)
        inner = words[words.index("torchtitan.train") + 1 :]
        named = [word.removeprefix("--") for word in inner if word.startswith("--")]
        assert set(named) <= set(str(known["keys"]).split())
        (mode,) = [word.partition(":")[2] for word in inner if word.startswith("activation-checkpoint:")]
        assert mode in known["activation_checkpoint"]
        assert flags(text)["--training.dtype"] in known["dtype"]
        assert flags(text)["--optimizer.implementation"] in known["implementation"]
