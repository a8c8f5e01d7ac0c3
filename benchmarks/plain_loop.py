"""Trains in a plain loop, as people write it, and keeps what PyTorch's CUDA allocator counted: a truth of its own.

    python benchmarks/plain_loop.py OUT.json              every case that OUT.json lacks, each in a fresh process
    python benchmarks/plain_loop.py OUT.json NAME …       those cases

Nothing of gcbench trains or measures here: a model from its config, AdamW, `loss.backward()`. What the predictor is
held to must not have come from the code that it imitates. Besides the peaks every allocation of the measured step is
kept in order (`events`: bytes taken, negative where given back), so that a difference can be found, not guessed.
A case that `gcbench run` can express also has its `settings` there, and its figures as a `cell` of `truth.py`'s grid.
Needs a CUDA device, which may be emulated: the file then says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gcbench.emulate.environment import emulated_card

CASES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b, off": {"model": "qwen2.5-0.5b", "batch": 2, "seq": 1024},
    "qwen2.5-0.5b, per-layer": {"model": "qwen2.5-0.5b", "batch": 2, "seq": 1024, "every": 1},
    "opt-125m, bf16-mixed, per-layer": {
        "model": "opt-125m",
        "batch": 4,
        "seq": 512,
        "every": 1,
        "mixed": "bfloat16",
        "set": {"layerdrop": 0.0},
    },
    "qwen3-1.7b, LoRA, off": {"model": "qwen3-1.7b", "batch": 2, "seq": 1024, "layers": 6, "lora_r": 8},
    "qwen2.5-0.5b, LoRA, outputs kept": {
        "model": "qwen2.5-0.5b",
        "batch": 1,
        "seq": 1024,
        "lora_r": 16,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "keeps_outputs": True,
    },
    "llama-3.2-1b, off": {"model": "llama-3.2-1b", "batch": 2, "seq": 1024},
    "llama-3.2-1b, layers 1, 3, 5 …": {"model": "llama-3.2-1b", "batch": 2, "seq": 1024, "every": 2, "start": 1},
    "llama-3.2-1b, bf16-mixed, off": {"model": "llama-3.2-1b", "batch": 2, "seq": 1024, "mixed": "bfloat16"},
    "gpt2, bf16-mixed, off": {"model": "gpt2", "batch": 8, "seq": 1024, "mixed": "bfloat16"},
    "gpt2, fp32, per-layer": {"model": "gpt2", "batch": 8, "seq": 1024, "dtype": "float32", "every": 1},
    "llama-3.2-1b, three micro-batches": {"model": "llama-3.2-1b", "batch": 2, "seq": 1024, "micro_batches": 3},
    "llama-3.2-1b, three micro-batches, per-layer, outputs kept": {
        "model": "llama-3.2-1b",
        "batch": 2,
        "seq": 1024,
        "every": 1,
        "micro_batches": 3,
        "keeps_outputs": True,
    },
    "gemma-3-1b, 12 layers, off": {"model": "gemma-3-1b", "batch": 2, "seq": 1024, "layers": 12},
    "qwen3-30b-a3b, 3 layers, off": {"model": "qwen3-30b-a3b", "batch": 1, "seq": 1024, "layers": 3},
}
"""Sizes in sequences and tokens; parameters in bf16 unless `dtype` or `mixed` (fp32 under autocast) says other.

With `pretrained` the model is loaded from a checkpoint and moved to the card.
"""
PRECISIONS = {
    ("bfloat16", None): "bf16",
    ("float32", None): "fp32",
    ("bfloat16", "bfloat16"): "bf16-mixed",
    ("bfloat16", "float16"): "fp16-mixed",
}
"""(dtype of the parameters without autocast, autocast's dtype) -> what gcbench calls it."""


def train(case: dict[str, Any]) -> dict[str, Any]:
    """The peaks of the third step, in bytes, and its allocations in order."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    from gcbench.models import build as models
    from gcbench.models import sources

    torch.manual_seed(0)
    config = models.build_config(
        sources.resolve(case["model"]), layers=case.get("layers"), overrides=case.get("set", {})
    )
    mixed = case.get("mixed")
    dtype = torch.float32 if mixed else getattr(torch, case.get("dtype", "bfloat16"))
    if case.get("pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda")
    else:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if "lora_r" in case:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=case["lora_r"], task_type="CAUSAL_LM", target_modules=case.get("lora_targets"))
        )
    model.train()
    if "every" in case:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if "lora_r" in case:  # made for reentrant checkpointing, in vain: the embedding's output would need a gradient
            model.disable_input_require_grads()
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = (number - case.get("start", 0)) % case["every"] == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    scaler = torch.amp.GradScaler("cuda", enabled=mixed == "float16")
    ids = torch.randint(100, 1000, (case["batch"], case["seq"]), device="cuda")

    phases: dict[str, int] = {}
    reserved = [0]

    def ends(phase: str) -> None:
        """Keep the peak of the phase that ends here; the allocator counts on the host."""
        phases[phase] = max(phases.get(phase, 0), torch.cuda.max_memory_allocated())
        reserved[0] = max(reserved[0], torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        for _ in range(case.get("micro_batches", 1)):
            with torch.autocast("cuda", dtype=getattr(torch, mixed or "bfloat16"), enabled=bool(mixed)):
                if case.get("keeps_outputs"):
                    outputs = model(input_ids=ids, labels=ids, use_cache=False)
                    loss = outputs.loss
                else:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            ends("forward")
            scaler.scale(loss).backward()
            ends("backward")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ends("optimizer")

    for _ in range(2):
        step()
        torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    phases.clear()
    reserved[0] = 0
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(context=None)
    step()
    torch.cuda.synchronize()
    peaks = max(phases.values()), reserved[0]
    (trace,) = torch.cuda.memory._snapshot()["device_traces"][:1]
    signs = {"alloc": 1, "free_completed": -1}
    return {
        "allocated_bytes": peaks[0],
        "reserved_bytes": peaks[1],
        "allocated_before_bytes": before,
        "num_alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "phases": phases,
        "machine": _machine(),
        "events": [signs[event["action"]] * event["size"] for event in trace if event["action"] in signs],
    }


def settings_of(case: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of a `gcbench run` that does the same; None where no strategy says it."""
    every = case.get("every")
    if {"micro_batches", "keeps_outputs"} & case.keys() or case.get("start"):
        return None
    strategy = "off" if every is None else "per-layer" if every == 1 else f"every:{every}"
    precision = PRECISIONS[case.get("dtype", "bfloat16"), case.get("mixed")]
    return {
        "model": case["model"],
        "batch_size": case["batch"],
        "seq_len": case["seq"],
        "strategies": [strategy],
        "precision": precision,
        **{name: case[name] for name in ("layers", "set", "lora_r", "pretrained") if name in case},
        **({"lora_target_modules": case["lora_targets"]} if "lora_targets" in case else {}),
    }


def as_cell(case: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the `settings` and the `cell` of a case in `truth.py`'s form; empty where there are none."""
    settings = settings_of(case)
    if "phases" not in found or settings is None:
        return {}
    memory = {
        "allocated_bytes": found["allocated_bytes"],
        "reserved_bytes": found["reserved_bytes"],
        "process_bytes": None,
        **{f"{phase}_bytes": nbytes for phase, nbytes in found["phases"].items()},
    }
    cell = {
        "strategy": settings["strategies"][0],
        "memory": memory,
        "failure": None,
        "kind": None,
        "num_alloc_retries": found["num_alloc_retries"],
    }
    return {"settings": settings, "cell": cell}


def main() -> None:
    """Run the cases that are asked for and are not there yet, and save after each."""
    path, names = Path(sys.argv[1]), sys.argv[2:]
    if names[:1] == ["--one"]:
        print(json.dumps(train(CASES[names[1]] if names[1] in CASES else json.loads(names[1]))), flush=True)
        os._exit(0)  # an interpreter that ends would end the process with autograd's thread, if that is still busy
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    waiting = [name for name in names or CASES if "allocated_bytes" not in stored["cases"].get(name, {})]
    # What a process allocates does not depend on others, as long as the card has room for all.
    with ThreadPoolExecutor(min(3, os.cpu_count() or 1)) as pool:
        running = {pool.submit(in_a_process, name): name for name in waiting}
        for done in as_completed(running):
            name, found = running[done], done.result()
            stored.update(found.pop("machine", {}))
            stored["source"] = "measured" if emulated_card() is None else "emulated"
            stored["cases"][name] = {**CASES[name], **found, **as_cell(CASES[name], found)}
            path.write_text(json.dumps(stored) + "\n")
            said = found.get("failure") or f"{found['allocated_bytes']:,} and {found['reserved_bytes']:,} reserved"
            print(f"{name}: {said}", flush=True)


def in_a_process(case: str, added: Mapping[str, str] = {}) -> dict[str, Any]:
    """Train a case, by name or as JSON, in a process of its own with `added` to its environment.

    Returns what `train` does, or the `failure`.
    """
    command = [sys.executable, __file__, "", "--one", case]
    done = subprocess.run(command, env={**os.environ, **added}, capture_output=True, text=True)
    if done.returncode:
        return {"failure": done.stderr.strip()[-400:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _machine() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "command": "python benchmarks/plain_loop.py",
        "device_name": torch.cuda.get_device_name(0),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
