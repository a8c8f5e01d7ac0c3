"""A quantised checkpoint is never taken for a full one: recognised in any form, refused, or said in every output."""

from __future__ import annotations

import json

import pytest
import tiny
from conftest import table
from parent_imports import HEAVY, imported

from gcbench.core.errors import UnavailableError
from gcbench.models import quantized, sources

NULL = ("--set", "quantization_config=null")
QUICK = ("-b", 1, "--seq-len", 16, "--device", "cpu", "--strategies", "off,per-layer")
NF4 = {
    "_load_in_4bit": True,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "quant_method": "bitsandbytes",
}
SAID = "The checkpoint is 4-bit (bitsandbytes nf4); gcbench uses full weights"
INT4_GROUP = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": {"num_bits": 8}}

FORMS = {
    "bitsandbytes 4": ({"quantization_config": NF4}, "4-bit (bitsandbytes nf4)"),
    "bitsandbytes 8": (
        {"quantization_config": {"load_in_8bit": True, "load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}},
        "8-bit (bitsandbytes)",
    ),
    "legacy flag": ({"load_in_4bit": True}, "4-bit (bitsandbytes)"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 128}}, "3-bit (gptq)"),
    "awq": ({"quantization_config": {"quant_method": "awq", "w_bit": 4, "version": "gemm"}}, "4-bit (awq)"),
    "fp8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "8-bit (fp8)"),
    "fbgemm": ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "8-bit (fbgemm_fp8)"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "4-bit (mxfp4)"),
    "bitnet": ({"quantization_config": {"quant_method": "bitnet"}}, "2-bit (bitnet)"),
    "eetq": ({"quantization_config": {"quant_method": "eetq", "weights": "int8"}}, "8-bit (eetq)"),
    "quanto": ({"quantization_config": {"quant_method": "quanto", "weights": "int2"}}, "2-bit (quanto)"),
    "hqq": (
        {"quantization_config": {"quant_config": {"weight_quant_params": {"nbits": 3}}, "quant_method": "hqq"}},
        "3-bit (hqq)",
    ),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": INT4_GROUP}}},
        "4-bit (compressed-tensors)",
    ),
    "compression_config": ({"compression_config": {"config_groups": {"g": INT4_GROUP}}}, "4-bit"),
    "torchao": (
        {
            "quantization_config": {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}},
            }
        },
        "4-bit (torchao)",
    ),
    "torchao text": (
        {"quantization_config": {"quant_method": "torchao", "quant_type": "int4_weight_only"}},
        "4-bit (torchao)",
    ),
    "modelopt": (
        {
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "kv_cache_scheme": {"num_bits": 8},
            }
        },
        "4-bit (modelopt NVFP4)",
    ),
    "aqlm": (
        {"quantization_config": {"quant_method": "aqlm", "nbits_per_codebook": 16, "num_codebooks": 1}},
        "quantised (aqlm)",
    ),
    "unknown": ({"quantization_config": {"quant_method": "tomorrow"}}, "quantised (tomorrow)"),
    "nameless": ({"quantization_config": {"group_size": 64}}, "quantised"),
    "a text": ({"quantization_config": "awq"}, "quantised (awq)"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "4-bit (mlx)"),
    "chatglm": ({"quantization_bit": 4}, "4-bit"),
    "float8 weights": ({"torch_dtype": "float8_e4m3fn"}, "8-bit (float8_e4m3fn)"),
    "nested": ({"text_config": {"quantization_config": NF4}}, "4-bit (bitsandbytes nf4)"),
    "nested twice": (
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 8}}}},
        "8-bit (gptq)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_recognised_with_its_method_and_bits(form):
    config, words = FORMS[form]
    places = quantized.found({"model_type": "llama", **config})
    assert [place.words for place in places] == [words]
    with pytest.raises(UnavailableError, match="use the unquantised model"):
        quantized.check("x", config, {})


@pytest.mark.parametrize("form", FORMS)
def test_null_takes_every_form_out_and_nothing_else(form):
    config = {"model_type": "llama", "hidden_size": 8, **FORMS[form][0]}
    rest = quantized.without(config, {"quantization_config": None})
    assert not quantized.found(rest)
    assert rest["hidden_size"] == 8 and config == {"model_type": "llama", "hidden_size": 8, **FORMS[form][0]}
    assert quantized.check("x", config, {"quantization_config": None})


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_bit": 0},
        {"load_in_4bit": False, "load_in_8bit": False},
        {"torch_dtype": "bfloat16"},
        {"dtype": "float32", "bits": 4},
        {"quantization": False},
        {"rope_scaling": {"type": "linear", "factor": 8}},
    ],
)
def test_a_full_checkpoint_is_not_taken_for_a_quantised_one(config):
    assert quantized.found({"model_type": "llama", **config}) == ()


def test_no_config_of_the_catalogue_is_refused():
    from gcbench.models import catalogue

    for entry in catalogue.architectures():
        assert quantized.found(catalogue.config_of(entry)) == (), entry.name


def test_a_nested_null_takes_out_that_part_alone():
    config = {"text_config": {"quantization_config": NF4}, "vision_config": {"quantization_config": NF4}}
    with pytest.raises(UnavailableError):
        quantized.check("x", config, {"text_config.quantization_config": None})
    both = {"text_config.quantization_config": None, "vision_config.quantization_config": "null"}
    assert len(quantized.check("x", config, both)) == 2
    assert quantized.without(config, both) == {"text_config": {}, "vision_config": {}}


def test_a_change_that_makes_a_full_model_quantised_is_refused():
    for changes in ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {"load_in_4bit": True}):
        with pytest.raises(UnavailableError, match="4-bit"):
            quantized.check("x", {"model_type": "llama"}, changes)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "4-bit (gptq)"),
        ("quant_config.json", {"w_bit": 4, "zero_point": True}, "4-bit (awq)"),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
            "8-bit (modelopt FP8)",
        ),
    ],
)
def test_what_lies_beside_the_config_is_read_too(tmp_path, file, content, words):
    """The trap: AutoGPTQ and ModelOpt have left config.json as that of the full model."""
    folder = tiny.write_model(tmp_path / "m", "llama")
    (folder / file).write_text(json.dumps(content))
    for name in (folder, folder / "config.json"):
        with pytest.raises(UnavailableError, match=words.replace("(", r"\(").replace(")", r"\)")):
            sources.resolve(str(name))
    assert sources.resolve(str(folder), overrides={"quantization_config": None}).quantised[0].words == words


def test_a_cache_that_alone_is_quantised_leaves_full_weights(tmp_path):
    folder = tiny.write_model(tmp_path / "m", "llama")
    only_cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(only_cache))
    assert sources.resolve(str(folder)).quantised == ()


# The commands


@pytest.mark.parametrize("command", ["run", "predict", "plan", "check"])
def test_every_command_refuses_it_without_torch_and_leaves_nothing(model, tmp_path, command):
    folder = model(quantization_config=NF4)
    args = [command, "-m", folder, "--out", tmp_path / "out"] + (["-b", 1] if command in ("run", "predict") else [])
    code, names = imported(*args)
    assert code == 3
    assert not names & set(HEAVY)
    assert not (tmp_path / "out").exists()


def test_the_refusal_is_one_sentence_with_both_remedies(cli, model):
    folder = model(quantization_config=NF4)
    result = cli("predict", "-m", folder, *QUICK)
    result.refused(3, "4-bit (bitsandbytes nf4)", "the unquantised model", "--set quantization_config=null")
    cli("predict", "-m", folder / "config.json", *QUICK).refused(3, "4-bit (bitsandbytes nf4)")
    result = cli("run", "-m", folder, *QUICK, "--pretrained", *NULL)
    result.refused(3, "--pretrained", "4-bit (bitsandbytes nf4)", "leave out --pretrained")


def test_code_of_the_models_own_changes_nothing(cli, tmp_path):
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": auto_map, "quantization_config": NF4})
    )
    cli("predict", "-m", tmp_path, *QUICK, "--trust-remote-code").refused(3, "4-bit (bitsandbytes nf4)")


def test_a_run_with_full_weights_says_so_everywhere(cli, model, tmp_path):
    folder, out = model(quantization_config=NF4), tmp_path / "run"
    result = cli("run", "-m", folder, *QUICK, *NULL, "--rounds", 1, "--steps", 1, "--out", out, "--quiet")
    assert result.code == 0, result.err
    assert f"{SAID} in fp32." in result.out
    assert f"{SAID} in fp32." in (out / "report.md").read_text()
    assert {row["model_notice"] for row in table(out).values()} == {f"{SAID} in fp32."}
    assert json.loads((out / "report.json").read_text())["model_notices"] == [f"{SAID} in fp32."]
    for format in ("terminal", "markdown", "csv", "json"):
        assert SAID in cli("report", out, "--format", format).out, format
    assert f"A and B: {SAID}" in cli("compare", out, out).out
    planned = cli("plan", "--from", out, "--device-memory", "1GiB", "--emit", "python", "--out", tmp_path / "plan")
    assert planned.code == 0, planned.err
    assert f"\n# {SAID} in fp32.\n" in planned.out and SAID in planned.err
    compile(planned.out, "emitted", "exec")
    again = cli("run", "--resume", "--out", out, "--quiet")
    assert again.code == 0, again.err


def test_a_prediction_and_a_plan_with_full_weights_say_so_everywhere(cli, model, tmp_path):
    folder = model(text_config=None, quantization_config=NF4)
    args = ("-m", folder, "--seq-len", 16, "--precision", "bf16", *NULL)
    predicted = cli("predict", *args, "-b", 1, "--strategies", "off", "--device", "cpu", "--json")
    assert predicted.rows["off"]["model_notice"] == f"{SAID} in bf16."
    assert f"{SAID} in bf16." in predicted.err
    out = tmp_path / "plan"
    planned = cli(
        *("plan", *args, "-b", 1, "--strategies", "per-layer", "--device-memory", "1GiB", "--emit", "trainer"),
        *("--out", out, "--quiet"),
    )
    assert planned.code == 0, planned.err
    assert planned.out.splitlines()[1] == f"# {SAID} in bf16."
    for file in ("plan.md", "plan.txt", "decision.json"):
        assert f"{SAID} in bf16." in (out / file).read_text(), file


def test_a_check_with_full_weights_says_so_everywhere(cli, model, tmp_path):
    folder, out = model(quantization_config=NF4), tmp_path / "check"
    args = ("-m", folder, "--strategies", "per-layer", "--precision", "fp32,bf16", "--no-compile", "--device", "cpu")
    result = cli("check", *args, *NULL, "--out", out)
    assert result.code == 0, result.err
    said = f"{SAID} in each precision."
    assert said in result.out
    assert said in (out / "check.md").read_text()
    assert json.loads((out / "check.json").read_text())["notices"] == [said]


def test_null_for_a_model_that_is_not_quantised_changes_nothing(cli, model):
    result = cli("predict", "-m", model(), *QUICK, *NULL, "--json")
    assert result.code == 0, result.err
    assert {row["model_notice"] for row in result.rows.values()} == {None}


def test_what_a_catalogue_model_is_published_in_is_said(cli):
    result = cli(
        *("predict", "-m", "gpt-oss-20b", "-b", 1, "--seq-len", 8, "--device", "h100", "--strategies", "off"),
        *("--layers", 1, "--precision", "bf16", "--json"),
    )
    assert result.rows["off"]["model_notice"] == (
        "gpt-oss-20b is published in MXFP4; gcbench uses full weights in bf16."
    )
    cli("run", "-m", "deepseek-v3", *QUICK, "--pretrained").refused(3, "FP8", "leave out --pretrained")
