"""Reads published step times and says how gcbench expresses a row, or why it cannot.

Three sources: the rows of published-truth.json that give a speed; published-steps.json, which has steps and pairs with
and without checkpointing, found for the time model alone; and gcbench's own runs on an H100 (results/reference/*-h100).
A pair is the same step with and without checkpointing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published_rows import _FULL_LOGITS, _MODELS, _TARGETS, HERE

from gcbench.report import report_file
from gcbench.report.rows import rows as rows_of

OWN, PUBLISHED = "own", "published"
COMPLETE = 4
"""From this completeness on, the source names all that decides a step's time but the machine around the card."""
LAPTOP = HERE / "published-models" / "rtx-3080-ti-laptop.toml"
REFERENCE = HERE.parent / "results" / "reference"
OWN_RUNS = ("gpt2-h100", "llama-3.2-1b-h100", "llama-3.1-8b-lora-h100")

_HUBS = {
    "openai-community/gpt2-large": "gpt2-large",
    "EleutherAI/pythia-410m-deduped": "EleutherAI/pythia-410m-deduped",
}
_CARDS = {
    "A100-80GB": "a100-80gb",
    "RTX 4080 16GB (Windows 11)": "rtx-4080",
    "RTX 3080 Ti 16GB (laptop)": "rtx-3080-ti-laptop",
}
_PRECISIONS = {"bf16 weights, no autocast": "bf16", "fp16 weights, no autocast": "bf16"}
_OPTIMIZERS = {
    "AdamW torch (foreach), wd 0.01": "adamw_torch",
    "paged_adamw_8bit": "sgd",
    "none (no optimizer; grads set to None each step)": "adamw_torch",
}
_ATTENTIONS = {"flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
_STRATEGIES = {"off": "off", "all layers": "per-layer", "all layers (HF gradient_checkpointing)": "per-layer"}
_LOSSES = (*_FULL_LOGITS, "logits.sum() (no labels, no cross entropy)")
_NOTES = {
    "fp16 weights, no autocast": "bf16 for fp16, which has the same size and rate on this card",
    "paged_adamw_8bit": "sgd for paged_adamw_8bit, of the adapters alone",
    "logits.sum() (no labels, no cross entropy)": "with the loss, where the source sums up the logits",
    "RTX 3080 Ti 16GB (laptop)": "the card's power limit is not published",
    "RTX 4080 16GB (Windows 11)": "Windows, whose driver launches kernels more slowly",
}
_SPEEDS = (
    (re.compile(r"([\d.]+) s/step"), None),
    (re.compile(r"([\d.]+) s per fwd\+bwd"), None),
    (re.compile(r"([\d.]+) tok/s(?: per device)?$"), "tokens"),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A published step as a prediction to make.

    Attributes:
        origin: `OWN` for gcbench's own runs, `PUBLISHED`.
        seconds: of a step, as published.
        passes_only: the published step has no optimizer phase.
        pair: the name that all steps have that differ in their strategy alone; None for none.
        orientation: why it is shown and does not count; None where it counts.
        notes: what stands in for something else.
    """

    id: str
    origin: str
    source: str
    url: str
    model: str
    device: str
    batch: int
    seq_len: int
    precision: str
    optim: str
    strategy: str
    seconds: float
    completeness: int
    attention: str | None = None
    passes_only: bool = False
    pair: str | None = None
    lora_r: int | None = None
    lora_targets: str | None = None
    orientation: str | None = None
    notes: tuple[str, ...] = ()


def express(row: dict[str, Any]) -> Step | str:
    """Return a row of published-truth.json as a step, or the reason why gcbench cannot express it."""
    reason = _unlike_gcbench(row) or _unknown(row)
    if reason is not None:
        return reason
    seconds = seconds_of(row)
    if seconds is None:
        return "its speed is not that of a step"
    lora = row["lora"] or {}
    return Step(
        id=row["id"],
        origin=PUBLISHED,
        source=row["source"],
        url=row["url"],
        model=(_MODELS | _HUBS)[row["model"]],
        device=_CARDS[row["gpu"]],
        batch=row["batch"],
        seq_len=row["seq_len"],
        precision=_PRECISIONS[row["precision"]],
        optim=_OPTIMIZERS[row["optimizer"]],
        attention=_ATTENTIONS[row["attention"]],
        strategy=_STRATEGIES[row["checkpointing"]],
        seconds=seconds,
        completeness=row["completeness"],
        passes_only=row["kind"] == "fwd_bwd",
        lora_r=lora.get("r"),
        lora_targets=_TARGETS[lora["targets"]] if lora else None,
        notes=tuple(_NOTES[row[name]] for name in ("precision", "optimizer", "loss", "gpu") if row[name] in _NOTES),
    )


def seconds_of(row: dict[str, Any]) -> float | None:
    """Return the seconds of a step from the source's own words; None where they say something else."""
    for part in (row["speed"] or "").split(", "):
        for pattern, unit in _SPEEDS:
            match = pattern.search(part.strip())
            if match is not None and float(match[1]) > 0:
                speed = float(match[1])
                return row["batch"] * row["seq_len"] / speed if unit else speed
    return None


def _unlike_gcbench(row: dict[str, Any]) -> str | None:
    """Return what of the row gcbench does not do, or what the source does not say."""
    if not row["speed"]:
        return "no time is published"
    if row["num_gpus"] != 1:
        return "several GPUs"
    if row["quantization"]:
        return "a quantised base model"
    if "compile" in row["versions"] or "float8" in row["versions"]:
        return "a compiled model"
    if row["loss"] == "sequence classification" or row["model"].startswith(("toy", "Megatron")):
        return "no causal language model of the hub"
    if "chunk" in row["loss"] or "iger" in row["loss"] or "Triton" in row["loss"]:
        return "a chunked or fused loss"
    if not isinstance(row["seq_len"], int) or not isinstance(row["batch"], int):
        return "the lengths of its batches vary or are not published"
    if row["grad_accum"] != 1:
        return "gradient accumulation"
    return None


def _unknown(row: dict[str, Any]) -> str | None:
    """Return the setting that has no counterpart here."""
    tables: dict[str, Any] = {"gpu": _CARDS, "precision": _PRECISIONS, "optimizer": _OPTIMIZERS}
    tables |= {"attention": _ATTENTIONS, "checkpointing": _STRATEGIES, "model": _MODELS | _HUBS, "loss": _LOSSES}
    unknown = next((name for name, table in tables.items() if row[name] not in table), None)
    if unknown is not None:
        return f"{unknown}: {row[unknown]}"
    if row["lora"] and row["lora"]["targets"] not in _TARGETS:
        return "the adapters' targets are not published"
    return None


def found_since() -> Iterator[Step]:
    """Yield the steps of published-steps.json."""
    for row in json.loads((HERE / "published-steps.json").read_text(encoding="utf-8")):
        folder = HERE / row["model"]
        model = str(folder) if folder.is_dir() else row["model"]
        yield Step(origin=PUBLISHED, **{**row, "model": model, "notes": tuple(row["notes"])})


def own() -> Iterator[Step]:
    """Yield the steps that gcbench itself measured on an H100."""
    for name in OWN_RUNS:
        report = report_file.load(REFERENCE / name)
        settings = report.settings
        for row in rows_of(report):
            if row.step_time_s is None:
                continue
            yield Step(
                id=f"{name}-{row.strategy}",
                origin=OWN,
                source="gcbench run",
                url=f"results/reference/{name}",
                model=row.model,
                device="h100",
                batch=row.batch_size,
                seq_len=row.seq_len,
                precision=row.precision,
                optim=row.optim,
                strategy=row.strategy,
                seconds=row.step_time_s,
                completeness=5,
                pair=name,
                lora_r=settings.get("lora_r"),  # type: ignore[arg-type]  # a number or None
            )


def device_file(device: str) -> Path | None:
    """Return the file of a card that is not in the catalogue."""
    return LAPTOP if device == LAPTOP.stem else None
