"""Bad input, each through the real command line: one sentence with its remedy, the exit code, nothing left behind."""

from __future__ import annotations

import socket

import pytest
import torch
from conftest import ROOT

QUICK = ("--batch", 1, "--seq-len", 16, "--rounds", 1, "--steps", 1, "--device", "cpu", "--strategies", "off,per-layer")


# The model


@pytest.mark.parametrize("endpoint", ["refused", "silent"])
def test_an_unknown_model_without_a_network_fails_fast_with_near_names(cli_process, tmp_path, endpoint):
    """The trap: the Hub's client retries for 23 s before it says that there is no network."""
    with socket.socket() as listener:
        if endpoint == "silent":  # takes the name and never answers, as behind a firewall that drops packets
            url = "http://203.0.113.1"
        else:
            listener.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
        result = cli_process("run", "--model", "gtp2", "--batch", 1, env=env)
        result.refused(3, "'gtp2'", "the Hub cannot be reached", "near names in the catalogue: gpt2")
    assert not (tmp_path / "results").exists()


def test_a_model_in_the_catalogue_needs_no_network(cli_process, tmp_path):
    """Refused for its batch alone, with an unreachable Hub: the catalogue came first."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "no_proxy": "*"}
    result = cli_process(
        *("run", "-m", "gpt2", "-b", 1, "--seq-len", 8, "--layers", 1, "--set", "vocab_size=256"),
        *("--set", "bos_token_id=0", "--set", "eos_token_id=0"),
        *("--strategies", "off", "--rounds", 1, "--device", "cpu", "--json"),
        env=env,
    )
    assert result.code == 0, result.err


def test_a_folder_without_config_json(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    cli("run", "-m", tmp_path / "empty", *QUICK).refused(3, "has no config.json", "save_pretrained")


def test_a_path_that_is_not_there(cli):
    cli("run", "-m", "./no/such/folder", *QUICK).refused(3, "there is no ./no/such/folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama",', "is not valid JSON (line 1"),
        ("", "is not valid JSON (line 1"),
        ("[1, 2]", "names no model_type"),
        ('{"hidden_size": 8}', "names no model_type"),
        ('{"model_type": "lama"}', "which this transformers does not know"),
        ('{"model_type": "vit"}', "cannot build as a causal language model"),
        ('{"model_type": "llama", "hidden_size": 31, "num_attention_heads": 4}', "(31) is not a multiple of"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "num_hidden_layers"),
    ],
)
def test_a_config_that_no_model_can_be_built_from(cli, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    result = cli("run", "-m", tmp_path, *QUICK, "--out", tmp_path / "run")
    result.refused(3, message)
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_not_text(cli, tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00binary")
    cli("run", "-m", tmp_path, *QUICK).refused(3, "cannot be read")


def test_pretrained_without_weights(cli, model):
    cli("run", "-m", model(), *QUICK, "--pretrained").refused(3, "has no weights", "leave the flag out")


def test_a_change_of_a_field_the_config_does_not_have(cli, model):
    """The trap: transformers takes any keyword, so a misspelt one would change nothing, silently."""
    cli("run", "-m", model(), *QUICK, "--set", "hiden_size=8").refused(2, "no such field", "hidden_size")


def test_a_change_to_a_value_that_transformers_refuses(cli, model):
    result = cli("run", "-m", model(), *QUICK, "--set", "hidden_size=31")
    result.refused(2, "with these --layers and --set", "(31) is not a multiple of", "change them")


def test_a_change_that_is_no_assignment(cli, model):
    cli("run", "-m", model(), *QUICK, "--set", "hidden_size").refused(2, "not key=value", "hidden_size=512")


# Strategies


@pytest.mark.parametrize("spec", ["every:0", "every:-1", "every:x", "every:", "every", "every:1.5", "every:²"])
def test_a_malformed_stride(cli, model, spec):
    cli("run", "-m", model(), *QUICK, "--strategies", spec).refused(2, repr(spec), "write it like every:2")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("per_layr", "did you mean per-layer?"),
        ("everything", "legal are off, "),
        ("off:2", "takes no argument; write off"),
        ("off,,per-layer", "has an empty item"),
        ("", "has an empty item"),
    ],
)
def test_an_unknown_strategy(cli, model, spec, message):
    cli("run", "-m", model(), *QUICK, "--strategies", spec).refused(2, message)


def test_a_stride_beyond_the_layers_is_refused_when_it_was_requested(cli, model, tmp_path):
    result = cli("run", "-m", model(), *QUICK, "--strategies", "off,every:5", "--out", tmp_path / "run")
    result.refused(2, "every:5 needs at least 5 layers and the model has 4", "from 1 to 4")
    assert not (tmp_path / "run").exists()


def test_a_stride_beyond_the_layers_is_left_out_when_it_is_a_default(cli, model):
    """Exit 0 and a notice: a default that does not suit a small model is not the user's mistake."""
    result = cli("run", "-m", model(num_hidden_layers=1), *QUICK[:-2], "--json")
    assert result.code == 0, result.err
    assert list(result.rows) == ["off", "per-layer"]
    for spec in ("every:2", "every:4"):
        assert f"Left out of the default strategies: {spec} needs" in result.err


# Numbers and names


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch", "0", "--batch: 0 is too small; it must be 1 or more"),
        ("--batch", "-3", "-3 is too small"),
        ("--batch", "four", "'four' is not a whole number"),
        ("--batch", "1.5", "'1.5' is not a whole number"),
        ("--batch", "2,0", "0 is too small"),
        ("--batch", "2,,4", "has an empty item"),
        ("--batch", "1000000000", "is out of range (max 1,000,000)"),
        ("--seq-len", "0", "--seq-len: 0 is too small"),
        ("--seq-len", "1", "1 is too small; it must be 2 or more"),
        ("--seq-len", "-64", "-64 is too small"),
        ("--seq-len", "99999999999", "is out of range"),
        ("--layers", "0", "--layers: 0 is too small"),
        ("--steps", "0", "--steps: 0 is too small"),
        ("--warmup", "0", "--warmup: 0 is too small"),
        ("--rounds", "0", "--rounds: 0 is too small"),
        ("--seed", "-1", "--seed: -1 is too small"),
        ("--precision", "fp8", "legal are fp32, bf16, bf16-mixed, fp16-mixed"),
        ("--precision", "bf16-mixd", "did you mean bf16-mixed?"),
        ("--optim", "adam", "did you mean adamw_torch?"),
        ("--memory-limit", "8 bananas", "write it like 8GiB"),
        ("--memory-limit", "0", "leaves no memory at all"),
        ("--timeout", "-1", "is not a time"),
        ("--timeout", "soon", "is not a time"),
        ("--device", "tpu", "legal are auto, cpu, cuda and cuda:N"),
        ("--device", "cuda:x", "legal are auto, cpu, cuda and cuda:N"),
    ],
)
def test_a_value_out_of_range_or_malformed_is_refused(cli, model, flag, value, message):
    cli("run", "-m", model(), *QUICK, flag, value).refused(2, message)


def test_a_length_beyond_the_models_maximum(cli, model, tmp_path):
    """The trap: an embedding of positions read beyond its end is a crash on the CPU and poison on a GPU."""
    result = cli("run", "-m", model(), *QUICK, "--seq-len", "64,129", "--out", tmp_path / "run")
    result.refused(2, "--seq-len 129 is beyond the 128 positions", "--set max_position_embeddings=129")
    assert not (tmp_path / "run").exists()
    mended = cli("run", "-m", model(), *QUICK, "--seq-len", 129, "--set", "max_position_embeddings=129")
    assert mended.code == 0, mended.err


def test_all_mistakes_are_reported_together(cli):
    """The trap: one mistake a run, mended five times over."""
    result = cli("run", "--batch", "0", "--seq-len", "x", "--strategies", "every:0", "--precision", "int4")
    assert result.code == 2 and result.out == ""
    first, *lines = result.err.strip().splitlines()
    assert first == "error:"
    for flag in ("--batch", "--seq-len", "--strategies", "--precision", "--model is missing"):
        assert sum(line.startswith(f"- {flag}") for line in lines) == 1, result.err
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--modl", "gpt2"], "--modl"),
        (["run", "--model"], "--model"),
        (["runn"], "runn"),
        (["run", "extra"], "extra"),
        (["report"], "DIR"),
        (["report", ".", "--format", "docx"], "legal are"),
        (["compare", "a", "b", "--fail-on", "speed:3%"], "--fail-on"),
        (["compare", "a", "b", "--fail-on", "memory"], "--fail-on"),
    ],
)
def test_a_command_that_cannot_be_read(cli, args, message):
    cli(*args).refused(2, message)


# The config file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "x"\nbatch_size = 1\nbatchsize = 2\n', "there is no setting 'batchsize'; did you mean batch_size?"),
        ('model = "x"\nbatch = 1\nzzz = 9\n', "there is no setting 'zzz'; legal are "),
        ("model = gpt2\n", "is not valid TOML (Invalid value (at line 1"),
        ('model = "x"\nbatch = 1\nstrategies = [false]\n', "there is no strategy 'False'"),
        ('model = "x"\nbatch = true\n', "True is not a whole number"),
        ('model = "x"\nbatch = 1\npretrained = "yes"\n', "'yes' is neither true nor false"),
        ('[run]\nmodel = "x"\n', "there is no setting 'run'"),
    ],
)
def test_a_config_file_with_a_mistake(cli, tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    result = cli("run", "--config", tmp_path / "run.toml")
    assert result.code == 2 and result.out == ""
    assert message in result.err and "Traceback" not in result.err


def test_a_config_file_that_is_not_there(cli):
    cli("run", "--config", "nowhere.toml").refused(2, "there is no nowhere.toml")


# What the model or the machine refuses


def test_a_snapshot_of_a_run_needs_a_cuda_device(cli, model, tmp_path):
    """Before anything is measured, and without a folder left behind."""
    arguments = ("-m", model(), "--batch", 1, "--device", "cpu", "--strategies", "off", "--snapshot", "s.pickle")
    result = cli("run", *arguments, "--out", tmp_path / "run")
    result.refused(3, "--snapshot needs a CUDA device", "--device cuda", "gcbench predict with --snapshot")
    assert not (tmp_path / "run").exists() and not (tmp_path / "s.pickle").exists()


def test_a_snapshot_cannot_be_added_to_a_stored_run(cli, model, tmp_path):
    result = cli("run", "--resume", "--out", tmp_path, "--snapshot", "s.pickle")
    result.refused(2, "--snapshot cannot be added to a stored run", "leave out --resume")


def test_an_attention_that_the_model_refuses(cli, model, tmp_path):
    result = cli(
        "run", "-m", model("gemma2"), *QUICK, "--attn-implementation", "flash_attention_2", "--out", tmp_path / "run"
    )
    result.refused(2, "does not support --attn-implementation flash_attention_2", "leave the flag out")
    assert not (tmp_path / "run").exists()


def test_an_attention_that_does_not_exist(cli, model):
    cli("run", "-m", model(), *QUICK, "--attn-implementation", "sdpaa").refused(2, "sdpaa", "leave the flag out")


def test_the_requested_attention_is_used(cli, model):
    result = cli("run", "-m", model(), *QUICK, "--attn-implementation", "eager", "--json")
    assert result.code == 0, result.err
    assert {row["attn_implementation"] for row in result.rows.values()} == {"eager"}


def test_a_device_that_is_not_there(cli, model):
    result = cli("run", "-m", model(), *QUICK, "--device", "cuda:99")
    result.refused(3, "'cuda:99'" if torch.cuda.is_available() else "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("command", ["run", "env"])
def test_no_gpu(cli, model, tmp_path, command):
    arguments = ("run", "-m", model(), *QUICK, "--out", tmp_path / "run") if command == "run" else ("env",)
    cli(*arguments, "--device", "cuda").refused(3, "cuda", "--device cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_library_that_is_broken(cli_process, model, tmp_path, error):
    """The traps: what a library prints when it is imported in the middle of a JSON document, and the trace of a process
    that the user has never heard of."""
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text(
        f"print('a greeting')\nraise {error}('libfoo.so.1: cannot open shared object file')\n"
    )
    env = {"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}
    result = cli_process("run", "-m", model(), *QUICK, "--json", "--out", tmp_path / "run", env=env)
    result.refused(3, "libfoo.so.1: cannot open shared object file", "install gcbench again")
    assert not (tmp_path / "run").exists()
