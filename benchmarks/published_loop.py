"""Trains one published row for three steps on the card at hand, with whatever versions are installed.

    python benchmarks/published_loop.py fms-mistral-7b-lora-none-g1-b4

It is the evidence where a prediction is off because the row was measured with other versions: run it on an emulated
card (`gcbench dry-run --device a100-80gb -- python benchmarks/published_loop.py …`) in an environment with the row's
version of transformers, and put the line that it prints into published-evidence.json. It imports nothing of gcbench,
which does not run with versions that old. flash_attention_2 is run as sdpa, which takes the flash kernel of torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from published_rows import HERE, express, rows
from transformers import AutoConfig, AutoModelForCausalLM

CATALOGUE = HERE.parent / "gcbench" / "models" / "catalogue" / "configs"
DTYPE = torch.bfloat16


def build(name: str) -> Any:
    """Build the model on the card, in bf16, without initialising its weights."""
    folder = Path(name)
    path = folder / "config.json" if folder.is_dir() else CATALOGUE / f"{name}.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    torch.set_default_dtype(DTYPE)
    for name in ("normal_", "uniform_", "kaiming_uniform_"):  # kernels that fill the weights; their values are not used
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.tie_weights()
    return model.train()


def adapted(model: Any, lora: dict[str, Any], targets: str) -> Any:
    """Add the row's adapters, in fp32 as peft makes them, and let the embeddings' output require a gradient."""
    model.requires_grad_(False)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora.get("dropout", 0.0),
            target_modules=targets.split(","),
            task_type="CAUSAL_LM",
        ),
    )
    model.enable_input_require_grads()
    return model


def main() -> None:
    row = next(row for row in rows() if row["id"] == sys.argv[1])
    expressed = express(row)
    if isinstance(expressed, str):
        raise SystemExit(f"{row['id']}: {expressed}")
    arguments = dict(zip(expressed.arguments[::2], expressed.arguments[1::2], strict=True))
    model = build(arguments["-m"])
    if row["lora"]:
        model = adapted(model, row["lora"], arguments["--lora-target-modules"])
    if arguments["--strategies"] == "per-layer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-5, weight_decay=0.01)
    tokens = torch.ones(row["batch"], row["seq_len"], dtype=torch.long, device="cuda")
    for _ in range(3):
        outputs = model(input_ids=tokens, labels=tokens)
        loss = outputs.loss
        if not expressed.holds_outputs:
            del outputs
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not expressed.holds_outputs:
            del loss  # as the Trainer does: its graph holds the embeddings' output and their gradient
    seen = {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name(),
    }
    print(json.dumps({row["id"]: seen}))


if __name__ == "__main__":
    main()
