"""Suggests what a command line that cannot be parsed was meant to say: options of other tools or commands, values."""

from __future__ import annotations

import re
from collections.abc import Mapping

_OF_OTHER_TOOLS: Mapping[str, str] = {
    **dict.fromkeys(("--bf16", "--bfloat16"), "--precision bf16-mixed (or bf16, with weights in 16 bits too)"),
    **dict.fromkeys(("--fp16", "--amp", "--half", "--mixed-precision"), "--precision bf16-mixed or fp16-mixed"),
    **dict.fromkeys(("--fp32", "--tf32"), "--precision fp32"),
    **dict.fromkeys(("--dtype", "--torch-dtype", "--compute-dtype"), "--precision"),
    **dict.fromkeys(("--per-device-train-batch-size", "--micro-batch-size", "--train-batch-size", "--bs"), "--batch"),
    **dict.fromkeys(
        ("--max-seq-length", "--max-seq-len", "--max-length", "--block-size", "--cutoff-len", "--context-length"),
        "--seq-len",
    ),
    **dict.fromkeys(("--model-name-or-path", "--model-name", "--model-id", "--base-model"), "--model"),
    **dict.fromkeys(("--lora-rank", "--lora-dim", "--rank"), "--lora-r"),
    **dict.fromkeys(("--lora-target", "--target-modules"), "--lora-target-modules"),
    **dict.fromkeys(("--gpu", "--gpus", "--card", "--hardware"), "--device"),
    **dict.fromkeys(("--memory", "--vram", "--gpu-memory", "--budget", "--memory-limit"), "--device-memory"),
    "--device-memory": "--memory-limit",
    **dict.fromkeys(("--attn", "--attention", "--attn-impl"), "--attn-implementation"),
    **dict.fromkeys(("--gradient-checkpointing", "--activation-checkpointing", "--ac-mode"), "--strategies per-layer"),
    "--flash-attn": "--attn-implementation flash_attention_2",
    "--use-flash-attention-2": "--attn-implementation flash_attention_2",
}
_MODEL = "--model"
_NUMBERS = re.compile(r"\d+(?:\s*,\s*\d+)*,?")


def sentence(message: str, command_path: str, options: Mapping[str, frozenset[str]]) -> str:
    """Return a parser's message with what to write instead and where the options are listed."""
    suggestion = hint(message, command_path.rpartition(" ")[2], options)
    if suggestion is not None:
        message = message.partition(" (Possible options")[0]
    parts = [
        f"{message[:1].lower()}{message[1:]};",
        *([suggestion if suggestion.endswith("?") else f"{suggestion};"] if suggestion else []),
    ]
    return f"{' '.join(parts)} see {command_path} --help"


def hint(message: str, command: str, options: Mapping[str, frozenset[str]]) -> str | None:
    """Return what to write instead, for a parser's message about `command`; None when there is no suggestion.

    Args:
        options: command -> its options, like `--seq-len`.
    """
    here = options.get(command, frozenset())
    missing = re.match(r"No such option:? '?(--?[\w-]+)'?", message)
    if missing is not None:
        return _for_option(missing[1], command, options)
    extra = re.match(r"Got unexpected extra argument\(?s?\)? \((.*)\)$", message)
    if extra is not None:
        return _for_arguments(extra[1].split(), here)
    return None


def _for_option(option: str, command: str, options: Mapping[str, frozenset[str]]) -> str | None:
    here = options.get(command, frozenset())
    meant = _OF_OTHER_TOOLS.get(option.lower().replace("_", "-"))
    if meant is not None and meant.split()[0] in here:
        return f"did you mean {meant}?"
    elsewhere = [name for name, names in options.items() if option in names and name != command]
    if not elsewhere:
        return None
    *first, last = (f"gcbench {name}" for name in elsewhere)
    return f"{', '.join(first)} and {last} have it" if first else f"{last} has it"


def _for_arguments(words: list[str], here: frozenset[str]) -> str | None:
    if all(_NUMBERS.fullmatch(word) for word in words):
        return f"write several values as one, like 8,{words[0].strip(',')}"
    if _MODEL in here:
        return f"did you mean {_MODEL} {words[0]}?"
    return None
