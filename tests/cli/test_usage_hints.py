"""A command line that cannot be parsed gets a suggestion; no message names an option that its command lacks."""

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
    "models/lora.py": ("run", "predict", "plan"),  # a check names targets itself where peft knows none
    "api.py": None,  # takes the option's name off
    "calibration/op_times.py": ("plan",),
    "devices/cards.py": ("predict", "plan"),
    "plan/emulated.py": ("plan",),
    "emulate/properties.py": None,  # names a whole gcbench predict
    "emulate": None,  # names options of pip, nvidia-smi and binutils
    "check/view.py": ("check",),
    "predict/worker.py": None,  # names a whole gcbench run
    "strategies/_for_model.py": None,  # the same
    "check/worker.py": ("check",),
    "cli/compare_options.py": None,
    "cli/check_options.py": ("check",),
    "dry_run/step_time.py": ("predict",),  # calls it
    "dry_run/would_fit.py": ("plan",),  # calls it
    "dry_run": ("dry-run",),
    "check/models.py": ("check",),
    "check/session.py": ("check",),
    "checkpointing/apply.py": FOUR,
    "processes/children.py": FOUR,
    "cli/listings.py": None,
    "cli/results.py": None,
    "measure/command.py": ("run",),
    "measure/side_by_side.py": ("run", "plan"),
    "cli/run_options.py": ("run",),
    "report/timing.py": ("run",),
    "job/parsers.py": None,  # names the options of the command in hand
    "predict/command.py": ("predict",),
    "check/command.py": ("check",),
    "plan/stored.py": ("plan",),
    "check/stored.py": ("check",),
    "report/compare.py": None,
    "report/thresholds.py": ("compare",),
    "models/quantized.py": None,
    "job/preflight.py": FOUR,
    "models/refusals.py": ("run", "predict", "plan"),  # names options of the command that both came from
    "plan/compare.py": None,
    "job/settings.py": None,
    "devices/backends/__init__.py": FOUR,
    "devices/backends/cuda.py": FOUR,
    "diagnoses/known_causes.toml": FOUR,
    "report/explanation.py": ("predict",),
    "export": ("plan",),
    "models/flash_attention.py": ("predict", "plan"),
    "predict/session.py": ("predict",),
    "core/headroom.py": ("predict", "plan"),
    "core/snapshot_files.py": ("run", "predict"),
    "models/build.py": FOUR,
    "plan/command.py": ("plan",),
    "plan/from_run.py": None,  # names a whole gcbench run, too
    "plan/confirm.py": ("plan",),
    "plan/named.py": ("plan",),
    "plan/session.py": ("plan",),
    "plan/view.py": ("plan",),
    "plan/search": ("plan",),
    "report/predictions.py": ("predict",),
    "report/report_file.py": ("run",),
    "job/resolve.py": ("run", "predict", "plan"),
    "measure/runner.py": ("run",),
    "measure/session.py": ("run",),
    "job/settings_file.py": None,  # names the memory of a device in the command's own words
    "models/sources.py": ("run", "predict"),  # --pretrained, which the others never ask for
    "core/spellings.py": FOUR,
    "report/stored_kind.py": ("report",),
    "report/sentences.py": ("run",),
    "report/run_folder.py": ("run",),  # --resume is named where the command has it; --out all have
    "cli/usage.py": None,
    "measure/worker.py": ("run", "predict", "plan"),
}
"""Module or package -> the commands that may show what it says; None where it chooses the command's own words."""
NOT_A_MESSAGE = ("app.py", "options.py", "dry_run_options.py")
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
    found = [*SOURCES.rglob("*.py"), SOURCES / "diagnoses/known_causes.toml"]
    return [path for path in found if path.name not in NOT_A_MESSAGE and _named(path)]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(SOURCES)))
def test_a_message_names_options_that_its_commands_have(path):
    """The trap: check, which has no --lora-target-modules, advised its user to name them there."""
    relative = path.relative_to(SOURCES)
    key = next((str(place) for place in (relative, *relative.parents) if str(place) in SHOWN_BY), str(relative))
    assert key in SHOWN_BY, f"{relative} names {sorted(_named(path))}: say which commands show it"
    if SHOWN_BY[key] is None:
        return
    for command in SHOWN_BY[key]:
        lacking = _named(path) - OPTIONS[command]
        assert not lacking, f"{relative} may be shown by {command}, which has no {lacking}"


def test_only_what_can_be_resumed_is_offered_to_be(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="add --resume to continue it, or choose another --out"):
        Store.create(tmp_path, can_resume=True)
    with pytest.raises(UsageError, match="is not empty; choose another --out"):
        Store.create(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
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
def test_the_intended_option_is_suggested(cli, args, message):
    cli(*args).refused(2, message, f"see gcbench {args[0]} --help")


def test_every_suggestion_is_an_option_of_the_command():
    """Every remedy of the table exists somewhere."""
    from gcbench.cli import usage

    for meant in usage._OF_OTHER_TOOLS.values():
        assert any(meant.split()[0] in names for names in OPTIONS.values()), meant
