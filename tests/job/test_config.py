"""Settings: every spelling, what wins over what, all mistakes at once, and storing them in a report."""

from __future__ import annotations

import inspect

import pytest

from gcbench.cli import app as cli
from gcbench.cli import options as flags
from gcbench.core.errors import UsageError
from gcbench.core.records import Lora
from gcbench.job import settings as configs
from gcbench.job import settings_file
from gcbench.job.settings import Settings, as_json, settings
from gcbench.report import report_file as reports

LEAST = {"model": "gpt2", "batch_size": 1}
FULL = {
    "model": "gpt2",
    "batch_size": "1,2,4",
    "seq_len": "64,128",
    "strategies": "off,per-layer,every:2",
    "precision": "bf16-mixed",
    "optim": "adafactor",
    "attn_implementation": "eager",
    "device": "cuda:1",
    "warmup": "2",
    "steps": "7",
    "rounds": "4",
    "seed": "3",
    "layers": "6",
    "set": ["hidden_size=512", "hidden_act=gelu"],
    "pretrained": True,
    "trust_remote_code": True,
    "memory_limit": "1.5GiB",
    "timeout": "90",
    "lora_r": "8",
    "lora_target_modules": "q_proj,v_proj",
}


def mistakes(given: dict[str, object]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        settings(given)
    text = str(caught.value)
    return [line.removeprefix("- ") for line in text.splitlines()] if text.startswith("- ") else [text]


def test_flags_and_toml_mean_the_same():
    """Text from the command line, values from a file."""
    from_toml = {
        **FULL,
        "batch_size": [1, 2, 4],
        "seq_len": [64, 128],
        "strategies": ["off", "per-layer", "every:2"],
        "warmup": 2,
        "steps": 7,
        "rounds": 4,
        "seed": 3,
        "layers": 6,
        "set": {"hidden_size": 512, "hidden_act": "gelu"},
        "memory_limit": 3 * 2**29,
        "timeout": 90.0,
        "lora_r": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    parsed = settings(FULL)
    assert parsed == settings(from_toml)
    assert parsed == Settings(
        model="gpt2",
        batch_size=(1, 2, 4),
        seq_len=(64, 128),
        strategies=("off", "per-layer", "every:2"),
        precision="bf16-mixed",
        optim="adafactor",
        attn_implementation="eager",
        device="cuda:1",
        warmup=2,
        steps=7,
        rounds=4,
        seed=3,
        layers=6,
        set={"hidden_size": 512, "hidden_act": "gelu"},
        pretrained=True,
        trust_remote_code=True,
        memory_limit=3 * 2**29,
        timeout=90.0,
        lora_r=8,
        lora_target_modules=("q_proj", "v_proj"),
    )


def test_a_setting_that_is_not_set_has_its_default():
    assert settings({**LEAST, "seq_len": None}) == Settings(model="gpt2", batch_size=(1,))


@pytest.mark.parametrize("given", [LEAST, FULL, {**LEAST, "timeout": "none"}, {**LEAST, "set": {"a.b": None}}])
def test_settings_survive_a_report(given):
    """The trap: None for "no limit" read back as "not set", which is an hour."""
    parsed = settings(given)
    assert settings(as_json(parsed)) == parsed


def test_every_field_can_be_set():
    """The trap: a new setting that no flag and no file reaches."""
    every = {*FULL, "emulate"}  # which contradicts the device; see tests/measure/test_emulated_run.py
    instead = {"target_interval", "max_time"}  # of a number of rounds, which FULL has
    assert set(as_json(settings(LEAST))) == every | instead
    assert set(as_json(settings(FULL))) == every
    every |= instead
    assert every <= {name.removesuffix("_") for name in inspect.signature(cli.run).parameters}


def test_what_flags_give_has_the_names_of_settings():
    """The trap: a parameter under another name than its setting, which `settings_passed` would silently leave out."""
    parameters = {**dict.fromkeys(inspect.signature(cli.run).parameters), "set_": [], "config": "run.toml"}
    assert flags.settings_passed(parameters) == {}
    assert flags.settings_passed({**parameters, "set_": ["a=1"], "pretrained": False, "lora_r": "8"}) == {
        "set": ["a=1"],
        "pretrained": False,
        "lora_r": "8",
    }


@pytest.mark.parametrize(
    "key",
    [
        *("seq_len", "seq-len", "sequence_length", "sequence-length"),
        *("batch_size", "batch-size", "batch", "strategies", "strategy", "optim", "optimizer"),
        *("attn_implementation", "attn-implementation", "attention-implementation"),
        *("warmup", "warmup_steps", "warmup-steps", "layers", "num_layers", "num-layers"),
        *("memory_limit", "memory-limit", "trust-remote-code"),
    ],
)
def test_every_spelling_of_a_toml_key(tmp_path, key):
    values = {"batch_size": "8", "optim": '"sgd"', "strategies": '"off"', "attn_implementation": '"eager"'}
    values |= {"seq_len": "8", "warmup": "8", "layers": "8", "memory_limit": "'8GiB'", "trust_remote_code": "true"}
    name = configs.canonical(key)
    (tmp_path / "run.toml").write_text(f"{key} = {values[name]}\n")
    raw = settings_file.read(tmp_path / "run.toml", "run").settings
    assert list(raw) == [name]
    changed = settings({**LEAST, **raw})
    assert getattr(changed, name) != getattr(settings(LEAST), name)


FLAGS = {
    "--seq-len": "seq_len",
    "--seq_len": "seq_len",
    "--sequence-length": "seq_len",
    "--sequence_length": "seq_len",
    "--batch": "batch_size",
    "--batch-size": "batch_size",
    "--batch_size": "batch_size",
    "-b": "batch_size",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_spelling_of_a_flag(cli, model, flag):
    """Seen by the mistake in its value, which costs no measurement."""
    name = {"seq_len": "--seq-len", "batch_size": "--batch"}[FLAGS[flag]]
    result = cli("run", "-m", model(), "--batch", 1, "--seq-len", 8, flag, "wrong")
    result.refused(2, f"{name}: 'wrong' is not a whole number")


@pytest.mark.parametrize(
    "flags",
    [
        ("--attn_implementation", "nosuch"),
        ("--attention-implementation", "nosuch"),
        ("--attention_implementation", "nosuch"),
    ],
)
def test_both_spellings_of_attention(cli, model, flags):
    cli("run", "-m", model(), "-b", 1, "--device", "cpu", *flags).refused(2, "nosuch")


def test_a_flag_wins_over_the_file_and_the_file_over_what_is_stored(cli, model, tmp_path):
    """Two spellings of one setting, one in each place, are one setting."""
    (tmp_path / "run.toml").write_text(
        f'model = "{model()}"\nbatch = 2\nsequence-length = 8\nstrategies = ["off"]\n'
        'rounds = 1\nsteps = 1\ndevice = "cpu"\nseed = 5\n'
    )
    result = cli("run", "--config", "run.toml", "--batch-size", 3, "--out", "run")
    assert result.code == 0, result.err
    stored = reports.load(tmp_path / "run")
    assert stored.settings["batch_size"] == [3]
    assert stored.settings["seq_len"] == [8] and stored.settings["seed"] == 5
    assert [outcome.cell.workload.batch_size for outcome in stored.outcomes] == [3]

    resumed = cli("run", "--resume", "--out", "run", "--config", "run.toml")
    resumed.refused(2, "batch_size [3] is now [2]")


def test_all_mistakes_are_reported_at_once():
    messages = mistakes({"batch_size": 0, "seq_len": "x", "strategies": "every:0", "optim": 3, "colour": "red"})
    starts = ["--batch: 0 is", "--seq-len: 'x' is", "--strategies: 'every:0'", "--optim: 3 is", "there is no setting"]
    assert len(messages) == 6
    for start in [*starts, "--model is missing"]:
        assert any(line.startswith(start) for line in messages), messages


def test_a_mistake_in_a_value_is_not_reported_as_missing_too():
    assert mistakes({"model": "gpt2", "batch_size": "x"}) == ["--batch: 'x' is not a whole number; write 1 or more"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": True}, "True is not a whole number"),
        ({"batch_size": 1.5}, "1.5 is not a whole number"),
        ({"batch_size": []}, "has an empty item"),
        ({"batch_size": "1, ,2"}, "has an empty item"),
        ({"seq_len": "1"}, "1 is too small"),
        ({"strategies": [True]}, "there is no strategy 'True'"),
        ({"precision": "FP8"}, "'FP8' is unknown"),
        ({"model": ""}, "is not a name"),
        ({"model": 7}, "7 is not a name"),
        ({"set": "hidden_size"}, "is not key=value"),
        ({"set": ["=3"]}, "is not key=value"),
        ({"timeout": True}, "is not a time"),
        ({"timeout": "inf"}, "is not a time"),
        ({"timeout": 0}, "is not a time"),
        ({"memory_limit": True}, "is not an amount of memory"),
        ({"memory_limit": -5}, "leaves no memory"),
        ({"device": "cuda:"}, "legal are auto"),
        ({"device": "cpu:0"}, "legal are auto"),
        ({"seed": 2**31}, "is out of range (max 2,147,483,647)"),
        ({"lora_r": 2**17}, "is out of range (max 65,536)"),
        ({"lora_r": 8, "lora_target_modules": [7]}, "7 is not a name"),
        ({"lora_r": 8, "lora_target_modules": []}, "has an empty item"),
    ],
)
def test_a_value_of_the_wrong_kind(given, words):
    (messages,) = mistakes({**LEAST, **given})
    assert words in messages


def test_repeated_items_are_one_cell():
    parsed = settings({**LEAST, "batch_size": "2,2,1", "strategies": "off,OFF,every:2,every:02"})
    assert parsed.batch_size == (2, 1)
    assert parsed.strategies == ("off", "every:2")


@pytest.mark.parametrize("typed", ["all-linear", "ALL_LINEAR", ["all-linear"]])
def test_every_spelling_of_all_linear_layers(typed):
    parsed = settings({**LEAST, "lora_r": 8, "lora_target_modules": typed})
    assert parsed.lora == Lora(r=8, target_modules=("all-linear",))


def test_a_missing_rank_is_reported_once():
    """A rank with a mistake in it is not missing too."""
    assert mistakes({**LEAST, "lora_target_modules": "q_proj"}) == [
        "--lora-target-modules also needs the rank of the adapters; add it, like --lora-r 8"
    ]
    assert mistakes({**LEAST, "lora_r": 0, "lora_target_modules": "q_proj"}) == [
        "--lora-r: 0 is too small; it must be 1 or more"
    ]


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("a=1", 1),
        ("a=1.5", 1.5),
        ("a=true", True),
        ("a=True", True),
        ("a=None", None),
        ("a=null", None),
        ("a=gelu", "gelu"),
        ("a=", ""),
        ("a='1'", "1"),
        ("a=[1, 2]", [1, 2]),
        ("a=b=c", "b=c"),
        ("a={x = 1}", {"x": 1}),
    ],
)
def test_the_value_of_a_change(typed, value):
    assert settings({**LEAST, "set": [typed]}).set == {"a": value}


@pytest.mark.parametrize(("typed", "name"), [("BF16_mixed", "bf16-mixed"), ("FP32", "fp32")])
def test_precision_in_any_case_and_with_either_line(typed, name):
    assert settings({**LEAST, "precision": typed}).precision == name
    assert settings({**LEAST, "optim": "AdamW-Torch"}).optim == "adamw_torch"


@pytest.mark.parametrize(("typed", "seconds"), [("600", 600.0), ("1.5s", 1.5), (30, 30.0), ("none", None)])
def test_a_time(typed, seconds):
    assert settings({**LEAST, "timeout": typed}).timeout == seconds
