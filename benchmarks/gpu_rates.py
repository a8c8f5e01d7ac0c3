"""Times operator calls on this machine's card and keeps them by operator, dtype and shape, for a model of step times.

    python benchmarks/gpu_rates.py OUT.json [SECONDS]      45 seconds by default; goes on where OUT.json stopped

First a grid of generic calls (matrix products, memory-bound operators over four decades of bytes, attention by length),
then every call of real training steps. `calibration` in OUT.json is a `gcbench.calibration.op_times.Calibration`: each
point has its operator, dtype, dimensions, bytes, FLOPs, the call itself as text, and its seconds. Predictions for this
card use the file once it lies in ~/.cache/gcbench/rates, or in gcbench/devices/rates to be shipped, under the name that
the card has in `gcbench devices`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gcbench import strategies
from gcbench.calibration.op_times import Calibration, Point, machine_key
from gcbench.calibration.timer import Timer
from gcbench.core.files import write_text
from gcbench.core.json_codec import decode, encode
from gcbench.core.records import Machine
from gcbench.core.units import KIB, MIB
from gcbench.devices import backends
from gcbench.devices import target as targets
from gcbench.devices.target import TargetOptions
from gcbench.emulate.environment import emulated_card
from gcbench.models import sources
from gcbench.operators import call_text
from gcbench.predict.task import PredictTask
from gcbench.predict.worker import Session
from gcbench.simulate.costs import Work, total
from gcbench.training.seeding import generators_restored

NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BYTES = (64 * KIB, MIB, 16 * MIB, 128 * MIB, 512 * MIB)
"""Of each tensor of a memory-bound call: from launch-bound to far beyond the card's cache."""
SIZES = (512, 1024, 2048, 4096, 8192)
"""Rows, columns and depth of square products."""
THIN = ((4096, 1024, 4096), (4096, 14336, 4096), (4096, 4096, 14336), (2048, 128_256, 2048), (8192, 64, 4096))
"""Rows, columns and depth of products as in models: grouped keys, gated units, a head, an adapter."""
LENGTHS = (512, 1024, 2048, 4096, 8192)
STEPS: tuple[dict[str, Any], ...] = (
    {"model": "llama-3.1-8b", "layers": 2, "precision": "bf16", "batch": 1, "seq": 4096},
    {"model": "llama-3.2-1b", "layers": 2, "precision": "bf16", "batch": 4, "seq": 2048},
    {"model": "gpt2", "layers": 2, "precision": "fp32", "batch": 16, "seq": 1024},
    {"model": "gpt2", "layers": 2, "precision": "bf16-mixed", "batch": 16, "seq": 1024},
    {"model": "qwen3-0.6b", "layers": 2, "precision": "bf16", "batch": 4, "seq": 1024},
    {"model": "gemma-2-2b", "layers": 2, "precision": "bf16", "batch": 2, "seq": 1024},
)
"""Steps whose calls are timed; layers repeat, so two of them have every call."""


def grid() -> Iterator[Work]:
    """Yield generic calls, those that decide most of a step's time first."""
    for dtype in NAMES:
        for rows, columns, depth in (*((size, size, size) for size in SIZES), *THIN):
            yield _product(dtype, rows, columns, depth)
        for nbytes in BYTES:
            yield from _memory_bound(dtype, nbytes)
    for dtype in ("bf16", "fp16"):
        for length in LENGTHS:
            yield _attention(dtype, length)


def _product(dtype: str, rows: int, columns: int, depth: int) -> Work:
    name, itemsize = NAMES[dtype], 4 if dtype == "fp32" else 2
    left, right = {"t": name, "s": [rows, depth]}, {"t": name, "s": [depth, columns], "d": [1, depth]}
    return Work(
        op="mm",
        kind="matmul",
        dtype=dtype,
        nbytes=(rows * depth + depth * columns + rows * columns) * itemsize,
        flops=2 * rows * columns * depth,
        dims=(1, rows, columns, depth),
        call=call_text.write("aten::mm", [left, right], {}),
    )


def _memory_bound(dtype: str, nbytes: int) -> Iterator[Work]:
    name, itemsize = NAMES[dtype], 4 if dtype == "fp32" else 2
    tensor = {"t": name, "s": [nbytes // itemsize // 1024, 1024]}
    for op, args, touched in (
        ("mul.Tensor", [tensor, tensor], 3),
        ("add.Tensor", [tensor, tensor], 3),
        ("silu", [tensor], 2),
        ("gelu", [tensor], 2),
        ("_softmax", [tensor, -1, False], 2),
        ("mean.dim", [tensor, [-1], True], 1),
    ):
        call = call_text.write(f"aten::{op}", args, {})
        yield Work(op=op.partition(".")[0], kind="pointwise", dtype=dtype, nbytes=touched * nbytes, call=call)


def _attention(dtype: str, length: int) -> Work:
    heads, width, tokens = 32, 128, 8192
    batch = tokens // length
    tensor = {"t": NAMES[dtype], "s": [batch, heads, length, width]}
    return Work(
        op="_scaled_dot_product_flash_attention",
        kind="attention",
        dtype=dtype,
        nbytes=4 * batch * heads * length * width * 2,
        flops=4 * batch * heads * length * length * width // 2,
        dims=(batch, heads, length, length, width),
        is_causal=True,
        call=call_text.write("aten::_scaled_dot_product_flash_attention", [tensor, tensor, tensor, 0.0, True], {}),
    )


def calls_of(step: dict[str, Any], machine: Machine) -> tuple[Work, ...]:
    """Return the operator calls of a training step on this machine's card, traced without running it."""
    target = targets.resolve_target(TargetOptions(), machine)
    assert target is not None
    task = PredictTask(
        source=sources.resolve(step["model"], pretrained=False, trust_remote_code=False),
        layers=step["layers"],
        overrides={},
        attn_implementation=None,
        lora=None,
        precision=step["precision"],
        optim="adamw_torch",
        target=target,
        cells=(),
        explain=False,
        exact=False,
    )
    plan = strategies.parse("per-layer").plan_for(step["layers"])
    traced = Session(task).predictor.step(plan, batch_size=step["batch"], seq_len=step["seq"])
    update = traced.update.works if traced.update else ()
    return (*(work for _, works in traced.works for work in works), *update)


def main() -> None:
    """Time what OUT.json lacks, and save after each group of calls."""
    path, budget_s = Path(sys.argv[1]), float(sys.argv[2] if len(sys.argv) > 2 else 45)
    if emulated_card() is not None:
        sys.exit("an emulated card computes nothing, so it has no rates; run this on a real one")
    end = time.monotonic() + budget_s
    device = backends.open_device(backends.choose("cuda"))
    machine = device.describe()
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = (
        decode(Calibration, stored["calibration"]) if stored else Calibration(machine=machine_key(machine), created="")
    )
    if known.machine != machine_key(machine):
        sys.exit(f"{path} holds the rates of another machine or other versions; take another file")
    groups: list[Any] = [lambda: tuple(grid()), *(lambda step=step: calls_of(step, machine) for step in STEPS)]
    timer = Timer(device)
    with generators_restored([device.name]):
        for number, group in enumerate(groups):
            if time.monotonic() > end:
                break
            works = group()
            there = {(point.call, point.cold) for point in known.points}
            lacking = [work for work in known.costliest(works) if (work.call, work.cold) not in there]
            share = (end - time.monotonic()) / (1 if number else 2)
            begun = time.monotonic()
            # A guess of a GPU's time, so that none is left out for want of time before anything was timed.
            points = timer.points(lacking, expected=lambda work: 1e-4, until=begun + share)
            known = known.merged(_of(known.machine, points))
            _save(path, known, machine)
            print(
                f"group {number}: {len(points)} of {len(lacking)} calls in {time.monotonic() - begun:.1f} s", flush=True
            )
            if number:
                print(f"  a step of {STEPS[number - 1]}: {1e3 * total(works, known):.1f} ms of kernels", flush=True)


def _of(machine: str, points: tuple[Point, ...]) -> Calibration:
    return Calibration(machine=machine, created=datetime.now(UTC).isoformat(timespec="seconds"), points=points)


def _save(path: Path, known: Calibration, machine: Machine) -> None:
    document = {
        "command": "python benchmarks/gpu_rates.py",
        "source": "measured",
        "machine": encode(machine),
        "calibration": encode(known),
    }
    write_text(path, json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
