"""`--config`: one file for every command, all of a command's keys, and nothing ignored without a notice."""

from __future__ import annotations

import inspect

import pytest

from gcbench.cli import app as command_line
from gcbench.core.errors import UsageError
from gcbench.core.units import GIB
from gcbench.job import settings_file
from gcbench.job.settings_file import KEYS

NO_SETTINGS = {"config", "out", "snapshot", "resume", "json", "quiet"}
"""Of a call, not of what is asked for."""


def write(folder, text):
    path = folder / "shared.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", KEYS)
def test_every_option_of_a_command_is_a_key_of_its_file(command):
    """The trap: a new option that the file does not know. memory_limit is read for a plan as it is for a prediction."""
    parameters = inspect.signature(getattr(command_line, command)).parameters
    options = {"from" if name == "from_run" else name.removesuffix("_") for name in parameters} - NO_SETTINGS
    assert set(KEYS[command]) - options <= ({"memory_limit"} if command == "plan" else set())
    assert options <= set(KEYS[command])
    assert "config" in parameters


def test_keys_of_other_commands_are_ignored_with_a_notice(tmp_path):
    path = write(tmp_path, 'model = "x"\nrounds = 3\ndevice_memory = "8GiB"\nmeasure = true\n')
    read = settings_file.read(path, "check")
    assert dict(read.values) == {"model": "x"}
    assert read.skipped == (f"{path}: gcbench check has no rounds, device_memory or measure; left out.",)
    assert settings_file.read(None, "check").skipped == ()


@pytest.mark.parametrize("command", KEYS)
def test_a_card_is_a_device_where_predictions_are_made(tmp_path, command):
    read = settings_file.read(write(tmp_path, 'device = "a40"\n'), command)
    if command in ("predict", "plan"):
        assert read.values == {"device": "a40"} and not read.skipped
    else:
        assert not read.values and "is a card to predict for" in read.skipped[0]


@pytest.mark.parametrize("command", KEYS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "modle = 'x'\n",
            "there is no setting 'modle'; did you mean model? legal are attn_implementation, batch_size, ",
        ),
        ("zzz = 1\n", "there is no setting 'zzz'; legal are "),
        ("batch = 1\nbatch_size = 2\n", "batch_size sets batch_size a second time; keep one of them"),
        ("model = gpt2\n", "is not valid TOML"),
    ],
)
def test_a_file_with_a_mistake_is_one_sentence(tmp_path, command, text, words):
    with pytest.raises(UsageError) as caught:
        settings_file.read(write(tmp_path, text), command)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_legal_keys_are_all_of_the_commands(tmp_path):
    with pytest.raises(UsageError) as caught:
        settings_file.read(write(tmp_path, "zzz = 1\n"), "predict")
    legal = str(caught.value).partition("legal are ")[2].split(", ")
    assert legal == sorted(KEYS["predict"]) and "device_memory" in legal


@pytest.mark.parametrize("value", ['"yes"', "1"])
def test_a_switch_is_true_or_false(tmp_path, value):
    read = settings_file.read(write(tmp_path, f"explain = {value}\n"), "predict")
    with pytest.raises(UsageError, match="is neither true nor false; write explain = true"):
        read.is_set("explain", False)


def test_an_option_with_a_value_is_read_as_from_a_flag(tmp_path):
    read = settings_file.read(write(tmp_path, 'reserve = 0.02\nbatch = [1, 2]\nfrom = "r"\nemit = false\n'), "plan")
    assert read.text("reserve", None) == "0.02"
    assert read.text("reserve", "5%") == "5%"
    assert read.text("batch_size", None) == "1,2"
    assert str(read.file("from", None)) == "r"
    with pytest.raises(UsageError, match="write it in quotes"):
        read.text("emit", None)


@pytest.fixture
def asked(monkeypatch):
    """What each command would have done: the settings that reached its session."""
    from gcbench.check import session as check_session
    from gcbench.measure import session
    from gcbench.plan import session as plan_session
    from gcbench.predict import session as forecast

    seen = {}
    monkeypatch.setattr(session, "measure", lambda wanted, **rest: seen.update(wanted=wanted))
    monkeypatch.setattr(
        forecast,
        "predict",
        lambda wanted, target_options, **rest: seen.update(wanted=wanted, target_options=target_options),
    )
    monkeypatch.setattr(check_session, "check", lambda wanted, **rest: seen.update(wanted=wanted))
    monkeypatch.setattr(
        plan_session,
        "plan",
        lambda wanted, target_options, options, **rest: seen.update(
            wanted=wanted, target_options=target_options, asked=options
        ),
    )
    return seen


SHARED = """
model = "gpt2"
device = "a40"
batch_size = 2
seq_len = "4k"
precision = "bfloat16"
optim = "adamw"
attn_implementation = "flash"
strategies = ["off", "full", "every2"]
layers = 3
rounds = 2
reserve = "2%"
emit = "trainer"
device_memory = "20GiB"
expandable_segments = true
explain = true
exact = true
no_compile = true
full_size = true
train = "lora"
"""


def test_one_file_serves_every_command(cli, tmp_path, asked):
    """A shared setting means the same in all commands."""
    write(tmp_path, SHARED)
    for command in KEYS:
        result = cli(command, "--config", "shared.toml")
        assert result.code == 0, result.err
        assert "shared.toml: gcbench" in result.err and "left out" in result.err
        wanted = asked["wanted"]
        assert (wanted.model, wanted.layers) == ("gpt2", 3)
        if command == "check":
            assert (wanted.precisions, wanted.optims, wanted.tuned) == (("bf16",), ("adamw_torch",), ("lora",))
            assert (wanted.strategies, wanted.attentions) == (("per-layer", "every:2"), ("flash_attention_2",))
            assert wanted.full_size and not wanted.compiled and wanted.device == "auto"
        else:
            assert (wanted.precision, wanted.optim, wanted.seq_len) == ("bf16", "adamw_torch", (4096,))
            assert wanted.strategies == ("off", "per-layer", "every:2")
        if command in ("predict", "plan"):
            assert asked["target_options"].device == "a40" and asked["target_options"].device_memory == 20 * GIB
            assert asked["target_options"].expandable_segments
        if command == "predict":
            assert asked["target_options"].explain and asked["target_options"].exact
        if command == "plan":
            assert (asked["asked"].batch_sizes, asked["asked"].emit) == ((2,), "trainer")
            assert asked["asked"].reserve_frac == pytest.approx(0.02)
        if command == "run":
            assert (wanted.rounds, wanted.device) == (2, "auto")


def test_flags_win_over_the_file_in_every_command(cli, tmp_path, asked):
    write(tmp_path, SHARED)
    assert cli("plan", "--config", "shared.toml", "--batch", "auto", "--reserve", "7%", "--seq-len", 8).code == 0
    assert asked["asked"].batch_sizes is None and asked["asked"].reserve_frac == pytest.approx(0.07)
    assert cli("check", "--config", "shared.toml", "--precision", "fp32,bf16", "--seq-len", 8).code == 0
    assert asked["wanted"].precisions == ("fp32", "bf16") and asked["wanted"].seq_len == 8


@pytest.mark.parametrize("command", ["predict", "plan"])
def test_the_limit_of_a_run_is_the_memory_of_a_prediction(cli, tmp_path, asked, command):
    write(tmp_path, 'model = "gpt2"\nbatch_size = 1\nmemory_limit = "3GiB"\n')
    assert cli(command, "--config", "shared.toml").code == 0
    assert asked["target_options"].device_memory == 3 * GIB


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("run", "--memory-limit"),
        ("predict", "--device-memory"),
        ("predict", "--memory-limit"),
        ("plan", "--device-memory"),
    ],
)
def test_a_bare_number_of_gigabytes_is_refused_everywhere(cli, tmp_path, command, flag):
    """By flag, and in a file as a number and as text."""
    cli(command, "-m", "gpt2", "-b", 1, flag, 24).refused(2, f"{flag}: '24' is 24 bytes; did you mean 24GiB?")
    for value in ("24", '"24"'):
        key = flag.removeprefix("--").replace("-", "_")
        write(tmp_path, f'model = "gpt2"\nbatch_size = 1\n{key} = {value}\n')
        cli(command, "--config", "shared.toml").refused(2, flag, "is 24 bytes; did you mean 24GiB?")


def test_a_notice_goes_to_standard_error_and_can_be_silenced(cli, tmp_path, asked):
    write(tmp_path, 'model = "gpt2"\nbatch_size = 1\nprecision = "float16"\nreserve = "2%"\n')
    result = cli("run", "--config", "shared.toml", "--json")
    assert result.out == "" and len(result.err.splitlines()) == 2
    assert cli("run", "--config", "shared.toml", "--quiet").err == ""


def test_what_a_file_asks_for_is_what_flags_ask_for(cli, tmp_path, asked):
    """Both ways to predict get the same settings."""
    write(tmp_path, 'model = "gpt2"\nbatch = [1, 2]\nsequence-length = 8\ndevice = "gpu"\nexact = true\n')
    assert cli("predict", "--config", "shared.toml").code == 0
    from_file = dict(asked)
    assert cli("predict", "-m", "gpt2", "-b", "1,2", "--seq-len", 8, "--device", "gpu", "--exact").code == 0
    assert from_file == asked and asked["target_options"].device == "cuda"
