"""Asks `gcbench plan` which setting of the same training would fit on the card."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gcbench.core.files import write_text
from gcbench.dry_run.records import Workload, WouldFit
from gcbench.export._handover import SEARCHED

_OPTIMIZERS = {"AdamW": "adamw_torch", "SGD": "sgd", "Adafactor": "adafactor"}
_MOST_BATCHES = 5
CONFIG_NAME = "config.json"


def why_no_plan(workload: Workload) -> str | None:
    """Return why `gcbench plan` cannot plan what the script trains; None where it can."""
    reason = why_not_expressible(workload)
    return None if reason is None else f"it cannot be planned, as {reason}"


def why_not_expressible(workload: Workload) -> str | None:
    """Return why gcbench has no settings for what the script trains; None where it has."""
    if workload.config is None:
        return f"{workload.model_class} is not a Hugging Face model" if workload.model_class else "no model was seen"
    if not workload.causal_lm:
        return f"{workload.model_class} is not a causal language model"
    if workload.quantized:
        return "its weights are quantised"
    if workload.batch_size is None or workload.seq_len is None:
        return "the shape of its inputs was not seen"
    if workload.optimizer is not None and workload.optimizer not in _OPTIMIZERS:
        return f"gcbench does not know the optimizer {workload.optimizer}"
    if precision(workload) is None:
        return f"gcbench does not know weights in {workload.dtype}"
    if workload.peft_type not in (None, "LORA"):
        return f"gcbench does not know adapters of kind {workload.peft_type}"
    if workload.peft_type is None and workload.num_trainable != workload.num_params:
        return "only some of the parameters are trained, without LoRA"
    return None


def precision(workload: Workload) -> str | None:
    """Return gcbench's name for the precision; None for one that it does not know."""
    if workload.dtype == "bfloat16":
        return "bf16"
    if workload.dtype != "float32":
        return None
    return {None: "fp32", "bfloat16": "bf16-mixed", "float16": "fp16-mixed"}.get(workload.autocast)


def optimizer(workload: Workload) -> str:
    """Return gcbench's name for the optimizer; AdamW where none was seen."""
    name = _OPTIMIZERS.get(workload.optimizer or "AdamW", "adamw_torch")
    return "adamw_torch_fused" if name == "adamw_torch" and workload.fused else name


def batch_sizes(batch_size: int) -> tuple[int, ...]:
    """Return the divisors of a batch size, the largest first few: with gradient accumulation each is the same batch."""
    divisors = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    return tuple(sorted({*divisors[: _MOST_BATCHES - 1], 1}))


def arguments(workload: Workload, config: Path, device: Sequence[str]) -> list[str]:
    """Return the arguments of `gcbench plan` for the script's training.

    Args:
        device: the flags that name the card.
    """
    return ["plan", *settings(workload, config, batch_sizes(workload.batch_size or 1)), *device]


def settings(workload: Workload, config: Path, sizes: Sequence[int]) -> list[str]:
    """Return the flags that describe the script's training, with these batch sizes."""
    parts = ["--model", str(config), "--batch", ",".join(map(str, sizes)), "--seq-len", str(workload.seq_len)]
    parts += ["--precision", precision(workload) or "fp32", "--optim", optimizer(workload)]
    if workload.attn_implementation in ("eager", "sdpa"):
        parts += ["--attn-implementation", workload.attn_implementation]
    if workload.lora_r is not None:
        parts += ["--lora-r", str(workload.lora_r)]
        if workload.lora_target_modules:
            parts += ["--lora-target-modules", ",".join(workload.lora_target_modules)]
    return parts


def plan(
    workload: Workload, device: Sequence[str], emulated: Mapping[str, str], *, folder: Path, keep: Path | None
) -> WouldFit:
    """Plan the script's training for the card.

    Args:
        emulated: environment in which torch can be imported where it otherwise cannot.
        folder: a private folder.
        keep: folder in which the model's config is kept, for planning again; None for none.
    """
    reason = why_no_plan(workload)
    if reason is not None:
        return WouldFit(sentence=reason)
    assert workload.config is not None
    config = Path(workload.config)
    if keep is not None:
        write_text(keep / CONFIG_NAME, config.read_text(encoding="utf-8"))
        config = keep / CONFIG_NAME
    wanted = arguments(workload, config, device)
    shutil.rmtree(folder / "plan", ignore_errors=True)
    planned = run_gcbench([*wanted, "--out", str(folder / "plan")], importable(emulated))
    command = None if keep is None else shlex.join(["gcbench", *wanted])
    if isinstance(planned, str):
        return WouldFit(sentence=f"it cannot be planned: {planned}", command=command)
    choice = planned.get("choice")
    if not isinstance(choice, dict):
        smallest = planned.get("smallest_peak_bytes")
        return WouldFit(
            sentence="no setting fits",
            command=command,
            peak_bytes=smallest if isinstance(smallest, int) else None,
        )
    same = _fastest_at(planned.get("rows"), workload.batch_size)
    return WouldFit(
        command=command,
        strategy=_named(choice),
        batch_size=choice["batch_size"],
        peak_bytes=choice["peak_bytes"],
        allocated_bytes=choice["peak_allocated_bytes"],
        source=choice["source"],
        same_batch_strategy=None if same is None else _named(same),
        same_batch_peak_bytes=None if same is None else same["peak_bytes"],
    )


def _named(row: Mapping[str, Any]) -> str:
    strategy = str(row["strategy"])
    return "a searched plan" if strategy == SEARCHED else strategy


def _fastest_at(rows: object, batch_size: int | None) -> dict[str, Any] | None:
    """Return the candidate with the most tokens per second of those that fit at a batch size."""
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    fitting = [row for row in found if row["status"] == "ok" and row["batch_size"] == batch_size]
    return max(fitting, key=lambda row: float(row["tokens_per_s"]), default=None)


def importable(emulated: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which torch can be imported: without the emulated card, if that works."""
    plain = dict(os.environ)
    tried = subprocess.run([sys.executable, "-c", "import torch"], env=plain, capture_output=True, check=False)
    return plain if tried.returncode == 0 else plain | dict(emulated)


def run_gcbench(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, object] | str:
    """Return the document of another command of gcbench, or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-m", "gcbench", *arguments, "--json", "--quiet"],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        document = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return lines[-1].removeprefix("error: ")
    return document if isinstance(document, dict) else "it printed no document"
