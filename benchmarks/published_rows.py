"""Reads the published figures and says how gcbench expresses a row, or why it cannot.

published-truth.json holds what others measured on real cards: one object a row, facts and their sources only. `value`
is in `unit`; `kind` says what the run was (a full training step, a forward and backward pass alone, an operator alone);
`completeness` is 5 where the source names everything that decides memory; `also` holds other figures of the same run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from gcbench import __version__
from gcbench.core.files import write_text

HERE = Path(__file__).parent
_BYTES_PER_UNIT = {"bytes": 1, "MB(1e6)": 10**6, "GB(1e9)": 10**9, "MiB": 2**20, "GiB": 2**30, "GB(=GiB)": 2**30}

_MODELS = {
    "ibm/PowerLM-3b": str(HERE / "published-models" / "powerlm-3b"),
    "bigcode/gpt_bigcode-santacoder": str(HERE / "published-models" / "gpt-bigcode-santacoder"),
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B-Instruct",
}
_CARDS = {"A100-80GB": "a100-80gb", "RTX 4080 16GB (Windows 11)": "rtx-4080"}
_PRECISIONS = {"bf16 weights, no autocast": "bf16"}
_OPTIMIZERS = {"AdamW torch (foreach), wd 0.01": "adamw_torch", "paged_adamw_8bit": "sgd"}
_ATTENTIONS = {"flash_attention_2": "flash_attention_2", "sdpa": "sdpa"}
_STRATEGIES = {"off": "off", "all layers": "per-layer", "all layers (HF gradient_checkpointing)": "per-layer"}
_TARGETS = {"q,k,v,o": "q_proj,k_proj,v_proj,o_proj", "q,k,v,o (attention scope)": "q_proj,k_proj,v_proj,o_proj"}
_FULL_LOGITS = ("full logits, HF loss", "full logits, HF loss, random full-length tokens")
_NOTES = {
    "paged_adamw_8bit": "sgd for paged_adamw_8bit, whose large states are in managed memory outside torch's allocator",
}
_KINDS = {
    "component": "an operator or a loss alone, no training step",
    "fwd_bwd": "a forward and backward pass without an optimizer, most with the sum of the logits for a loss",
    "forward_resident": "what a forward pass leaves allocated, no training step",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published figure: what was measured (allocated, reserved or process), and bytes."""

    measure: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Expressed:
    """A row as arguments of `gcbench predict`.

    Attributes:
        holds_outputs: the published loop holds a step's outputs until those of the next.
        figures: what to compare; the first is the row's own, the others come from `also`.
        notes: settings that stand in for others, each with its reason.
    """

    arguments: tuple[str, ...]
    holds_outputs: bool
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


def rows() -> list[dict[str, Any]]:
    """Read all published rows."""
    stored: list[dict[str, Any]] = json.loads((HERE / "published-truth.json").read_text(encoding="utf-8"))
    return stored


def express(row: dict[str, Any]) -> Expressed | str:
    """Return the row as a prediction to make, or the reason why gcbench cannot express it."""
    reason = _unlike_gcbench(row) or _not_published(row) or _unknown(row)
    if reason is not None:
        return reason
    arguments = [
        *("-m", _MODELS[row["model"]], "--device", _CARDS[row["gpu"]]),
        *("--batch", str(row["batch"]), "--seq-len", str(row["seq_len"])),
        *("--precision", _PRECISIONS[row["precision"]], "--optim", _OPTIMIZERS[row["optimizer"]]),
        *("--attn-implementation", _ATTENTIONS[row["attention"]]),
        *("--strategies", _STRATEGIES[row["checkpointing"]]),
    ]
    notes = [_NOTES[row["optimizer"]]] if row["optimizer"] in _NOTES else []
    if row["lora"]:
        arguments += ["--lora-r", str(row["lora"]["r"]), "--lora-target-modules", _TARGETS[row["lora"]["targets"]]]
        if row["lora"].get("dropout"):
            notes.append("adapters without dropout, which acts inside a layer and not on the logits")
    return Expressed(
        arguments=tuple(arguments),
        holds_outputs="holds the outputs" in row.get("loop", ""),
        figures=tuple(_figures(row)),
        notes=tuple(notes),
    )


def _unlike_gcbench(row: dict[str, Any]) -> str | None:
    """Return what of the row gcbench does not do."""
    if row["kind"] in _KINDS:
        return _KINDS[row["kind"]]
    if row["num_gpus"] != 1:
        return "several GPUs"
    if row["quantization"]:
        return "a quantised base model"
    if row["loss"] == "sequence classification":
        return "no causal language model"
    if "chunk" in row["loss"] or "iger" in row["loss"]:
        return "a chunked or fused loss"
    if "Triton" in row["loss"]:
        return "fused kernels of a package"
    if "in the script" in row["optimizer"] or row["optimizer"] in ("AdamW bf16 states",):
        return "an optimizer or a trainer of the project's own"
    return None


def _not_published(row: dict[str, Any]) -> str | None:
    """Return which fact that decides memory is missing at the source."""
    if not isinstance(row["seq_len"], int):
        return "the length of the longest batch is not published"
    if not isinstance(row["batch"], int):
        return "the batch size is not published"
    if any("not stated" in str(row[name]) for name in ("precision", "attention", "checkpointing", "gpu")):
        return "precision, attention, checkpointing or card is not published"
    if row["lora"] and row["lora"]["targets"] not in _TARGETS and "?" in str(row["lora"]):
        return "the adapters' targets are not published"
    if row["unit"] != "OOM" and _nbytes(row) is None:
        return "the unit of the figure is ambiguous"
    if row["unit"] != "OOM" and row["value"] < 1 and len(str(row["value"])) < 5:
        return "the figure has one digit"
    return None


def _unknown(row: dict[str, Any]) -> str | None:
    """Return the setting that has no counterpart here."""
    tables = {"gpu": _CARDS, "precision": _PRECISIONS, "optimizer": _OPTIMIZERS, "attention": _ATTENTIONS}
    tables |= {"checkpointing": _STRATEGIES, "model": _MODELS}
    for name, table in tables.items():
        if row[name] not in table:
            return f"{name}: {row[name]}"
    if row["loss"] not in _FULL_LOGITS:
        return f"loss: {row['loss']}"
    if row["grad_accum"] != 1:
        return "gradient accumulation"
    return None


def _nbytes(row: dict[str, Any]) -> int | None:
    scale = _BYTES_PER_UNIT.get(row["unit"])
    return None if scale is None or row["value"] is None else round(row["value"] * scale)


def _figures(row: dict[str, Any]) -> list[Figure]:
    """Return the row's own figure first; empty if all it says is that memory ran out."""
    nbytes, also = _nbytes(row), row["also"] or {}
    found = [] if nbytes is None else [Figure(measure=_measure(row["measured"]), nbytes=nbytes)]
    if "max_reserved_GiB" in also:
        found.append(Figure(measure="reserved", nbytes=round(also["max_reserved_GiB"] * 2**30)))
    if "nvidia_smi_peak_minus_initial_MiB" in also:
        found.append(Figure(measure="process", nbytes=round(also["nvidia_smi_peak_minus_initial_MiB"] * 2**20)))
    return found


def _measure(words: str) -> str:
    """`reserved`, `process` (what nvidia-smi shows) or `allocated`, from the source's own words."""
    if "reserved" in words:
        return "reserved"
    return "process" if "nvidia-smi" in words else "allocated"


def runs_out(row: dict[str, Any]) -> bool | None:
    """Return whether the published run ran out of memory; None if the row does not say."""
    if row["unit"] == "OOM":
        return True
    oom = (row["also"] or {}).get("oom")
    return False if oom is None and row["value"] is not None else oom


def conclude(path: Path | None, found: dict[str, Any]) -> NoReturn:
    """Store what was found, with the versions it was found by, print the bars that it missed, and exit accordingly.

    `path` is None where only some rows were compared; then nothing is stored.
    """
    if path is not None:
        versions = {"gcbench": __version__, "torch": version("torch"), "transformers": version("transformers")}
        write_text(path, json.dumps({**versions, **found}, indent=1, ensure_ascii=False) + "\n")
    for sentence in found["missed"]:
        print(f"missed: {sentence}")
    raise SystemExit(1 if found["missed"] else 0)
