"""A command line that cannot be parsed gets what was meant; no message names an option that its command lacks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gcbench
from gcbench.cli import app as command_line
from gcbench.core.errors import UsageError
from gcbench.report.run_folder import Store

OPTIONS = command_line._options()
SOURCES = Path(gcbench.__file__).parent
FOUR = ("run", "predict", "plan", "check")

SHOWN_BY = {
    "adapters.py": ("run", "predict", "plan"),  # a check names targets itself where peft knows none
    "api.py": None,  # takes the option's name off
    "calibrated.py": ("plan",),
    "cards.py": ("predict", "plan"),
    "checker.py": ("check",),
    "check_models.py": ("check",),
    "check_session.py": ("check",),
    "checkpointing.py": FOUR,
    "children.py": FOUR,
    "commands.py": None,
    "compare.py": None,
    "thresholds.py": ("compare",),
    "quantized.py": None,
    "preflight.py": FOUR,
    "model_words.py": ("run", "predict", "plan"),  # names options of the command that both came from
    "compare_plans.py": None,
    "config.py": None,
    "devices/__init__.py": FOUR,
    "devices/cuda.py": FOUR,
    "diagnoses.toml": FOUR,
    "explained.py": ("predict",),
    "export": ("plan",),
    "flash.py": ("predict", "plan"),
    "forecast.py": ("predict",),
    "headroom.py": ("predict", "plan"),
    "models.py": FOUR,
    "plan_command.py": ("plan",),
    "plan_from.py": None,  # names a whole gcbench run, too
    "plan_measure.py": ("plan",),
    "plan_named.py": ("plan",),
    "plan_session.py": ("plan",),
    "plan_view.py": ("plan",),
    "planner": ("plan",),
    "predicted.py": ("predict",),
    "report.py": ("run",),
    "resolve.py": ("run", "predict", "plan"),
    "runner.py": ("run",),
    "session.py": ("run",),
    "settings_file.py": FOUR,
    "sources.py": ("run", "predict"),  # --pretrained, which the others never ask for
    "spellings.py": FOUR,
    "stored.py": ("report",),
    "stored_commands.py": ("report",),
    "words.py": ("run",),
    "store.py": ("run",),  # --resume is named where the command has it; --out all have
    "usage.py": None,
    "worker.py": ("run", "predict", "plan"),
}
"""Module or package -> the commands that may show what it says; None where it chooses the command's own words."""
NOT_A_MESSAGE = ("cli.py", "flags.py")
OF_OTHER_PROGRAMS = re.compile(
    r"nvidia-smi|--query-gpu|--format=csv|--id=|torchrun|--nproc|--training|--optimizer\.|--hf_|"
    r"--activation_checkpoint|--compile|--module|--config_file|--config transformers"
)


def _named(path: Path) -> set[str]:
    """The options in a module's texts, docstrings left out."""
    if path.suffix == ".toml":
        texts = [path.read_text(encoding="utf-8")]
    else:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ]
    texts = [text for text in texts if not OF_OTHER_PROGRAMS.search(text)]
    return {found for text in texts for found in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)}


def _modules() -> list[Path]:
    found = [*SOURCES.rglob("*.py"), SOURCES / "diagnoses.toml"]
    return [path for path in found if path.name not in NOT_A_MESSAGE and _named(path)]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(SOURCES)))
def test_a_message_names_options_that_its_commands_have(path):
    """The trap: check, which has no --lora-target-modules, told its user to name them there."""
    relative = path.relative_to(SOURCES)
    key = str(relative) if str(relative) in SHOWN_BY else relative.parts[0]
    assert key in SHOWN_BY, f"{relative} names {sorted(_named(path))}: say which commands show it"
    if SHOWN_BY[key] is None:
        return
    for command in SHOWN_BY[key]:
        lacking = _named(path) - OPTIONS[command]
        assert not lacking, f"{relative} may be shown by {command}, which has no {lacking}"


def test_only_what_can_be_resumed_is_offered_to_be(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="add --resume to continue it, or take another --out"):
        Store.create(tmp_path, can_resume=True)
    with pytest.raises(UsageError, match="is not empty; take another --out"):
        Store.create(tmp_path)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("predict", "gpt2"), "did you mean --model gpt2?"),
        (("check", "meta-llama/Llama-3.2-1B"), "did you mean --model meta-llama/Llama-3.2-1B?"),
        (("run", "-m", "gpt2", "--batch", 8, 16), "write several values as one, like 8,16"),
        (("run", "--bf16"), "did you mean --precision bf16-mixed"),
        (("predict", "--per_device_train_batch_size", 8), "did you mean --batch?"),
        (("plan", "--max-seq-length", 8), "did you mean --seq-len?"),
        (("plan", "--memory-limit", "8GiB"), "did you mean --device-memory?"),
        (("run", "--device-memory", "8GiB"), "did you mean --memory-limit?"),
        (("predict", "--memory", "8GiB"), "did you mean --device-memory?"),
        (("check", "--lora-r", 8), "gcbench run, gcbench predict and gcbench plan have it;"),
        (("check", "--measure"), "gcbench plan has it;"),
        (("predict", "--gradient-checkpointing"), "did you mean --strategies per-layer?"),
        (("devices", "--bf16"), "no such option: --bf16; see gcbench devices --help"),
        (("compare", "a", "b", "c"), "extra argument"),
    ],
)
def test_what_was_meant_is_named(cli, args, said):
    cli(*args).refused(2, said, f"see gcbench {args[0]} --help")


def test_what_is_meant_instead_is_an_option_of_the_command():
    """Every remedy of the table exists somewhere."""
    from gcbench.cli import usage

    for meant in usage._OF_OTHER_TOOLS.values():
        assert any(meant.split()[0] in names for names in OPTIONS.values()), meant
