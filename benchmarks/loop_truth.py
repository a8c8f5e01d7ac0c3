"""Trains other types of models in plain loops on an emulated card, and keeps what PyTorch's allocator counted.

    python benchmarks/loop_truth.py --emulate h100

The types (`loop-models/`, small invented shapes) are mostly not those of `truth.py`'s grid, and no line of gcbench
trains them: `plain_loop.py` does. Every third case starts from a checkpoint, as most training does. Saved after every
case into results/reference/truth-loops-CARD-torch2.13.json, for `accuracy.py` to compare; goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import plain_loop
import truth

from gcbench.core.files import write_text
from gcbench.core.json_codec import encode
from gcbench.devices import cards
from gcbench.emulate.environment import environment
from gcbench.processes.children import ForkedChildren

HERE = Path(__file__).parent
ROOT = HERE.parent
PER_TYPE = 3
SIZES = ((1, 1024), (2, 512), (3, 700), (4, 1024), (2, 1536))
"""Sequences and tokens, taken in turn."""
KINDS: tuple[dict[str, str], ...] = (
    {"dtype": "bfloat16"},
    {"dtype": "float32"},
    {"mixed": "bfloat16"},
    {"mixed": "float16"},
)
STRIDES = (None, 1, 2, 1)
"""Every how manieth layer is checkpointed; None for none."""
LORA_EVERY = 5
"""Which case in turn has LoRA, where peft has default targets for the type."""
WITHOUT_TARGETS = (
    *("cohere", "cohere2", "deepseek_v3", "exaone4", "glm", "granite", "helium", "nemotron"),
    *("olmo", "olmo2", "olmoe", "persimmon", "phi3", "qwen3_moe", "smollm3", "starcoder2"),
)
"""Types that peft 0.21 has none for; peft itself would import torch here, which needs the emulated card."""


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, case of `plain_loop.train`), three for each type: precisions, strides, sizes, LoRA and loading in turn."""
    for place, folder in enumerate(sorted((HERE / "loop-models").iterdir())):
        for turn in range(PER_TYPE):
            number = PER_TYPE * place + turn
            batch, seq = SIZES[number % len(SIZES)]
            kind, stride = KINDS[(place + turn) % len(KINDS)], STRIDES[(place // 2 + turn) % len(STRIDES)]
            case: dict[str, Any] = {"model": str(folder.relative_to(ROOT)), "batch": batch, "seq": seq, **kind}
            if stride is not None:
                case["every"] = stride
            if number % LORA_EVERY == 0 and folder.name not in WITHOUT_TARGETS:
                case["lora_r"] = 8
            if turn == PER_TYPE - 1:
                case["pretrained"] = True
            precision = plain_loop.PRECISIONS[case.get("dtype", "bfloat16"), case.get("mixed")]
            words = [folder.name, precision, "off" if stride is None else f"every {stride}"]
            words += [word for name, word in (("lora_r", "LoRA"), ("pretrained", "loaded")) if name in case]
            yield ", ".join(words), case


def main() -> None:
    parser = argparse.ArgumentParser(description="Train other types of models in plain loops on an emulated card.")
    parser.add_argument("--emulate", metavar="CARD", required=True, help="The card to emulate.")
    card = cards.find(parser.parse_args().emulate)
    added = environment(card)
    os.chdir(ROOT)  # where the paths of the models begin
    begin = time.perf_counter()
    with ForkedChildren(environment=added) as children:
        machine = truth.machine_of(children, "cuda")
    path = truth.REFERENCE / f"truth-loops-{card.name}-torch{truth.torch_release(machine)}.json"
    wanted = dict(cases())
    done = {
        name: case
        for name, case in truth.stored_cases(path, machine).items()
        if name in wanted and case["settings"] == plain_loop.settings_of(wanted[name])
    }
    header = {**truth.emulated_header("loop_truth.py", card, added), "machine": encode(machine)}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = {
            pool.submit(plain_loop.in_a_process, json.dumps(case), added): name
            for name, case in wanted.items()
            if name not in done
        }
        for future in as_completed(running):
            name, found = running[future], future.result()
            if "failure" in found:
                print(f"{name}: {found['failure']}", flush=True)
                continue
            both = plain_loop.as_cell(wanted[name], found)
            done[name] = {"name": name, "settings": both["settings"], "cells": [both["cell"]]}
            document = {**header, "cases": [done[each] for each in wanted if each in done]}
            write_text(path, truth.as_text(document))
            print(f"{name}: {found['allocated_bytes']:,} and {found['reserved_bytes']:,} reserved", flush=True)
    print(f"{path}: {len(done)} of {len(wanted)} cases, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
