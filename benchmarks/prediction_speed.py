"""How fast predictions are, against the bars, and against torch's own memory tracker on the same fake step.

    python benchmarks/prediction_speed.py           all
    python benchmarks/prediction_speed.py tracker   one of tracker, large, depth

- tracker: Llama-3.1-8B, four strategies, in one process: `torch.distributed._tools.MemTracker` around the same model,
  plan and step on fake tensors, against gcbench. At least 20 times faster.
- large: Llama-3.1-405B, four strategies × four batch sizes, after imports: under 10 s, and under 2 GiB of memory.
- depth: 128 layers against 16: at most 1.3 times the time.

Each part's figures go into results/reference/prediction-speed.json as it is done. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.files import write_text
from gcbench.devices import target as targets
from gcbench.devices.target import Target, TargetOptions
from gcbench.job import settings as config
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.predict import session as forecast
from gcbench.predict.task import CellToPredict, PredictTask
from gcbench.predict.worker import Session
from gcbench.processes.children import ForkedChildren
from gcbench.simulate.trace.recorder import Recorder, as_in_a_real_run
from gcbench.simulate.trace.storage import materialize
from gcbench.training.step import TrainingStep

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
STRATEGIES = ("off", "per-layer", "every:2", "every:4")
LEAST_SPEEDUP, MOST_SECONDS, MOST_GIB, MOST_DEPTH_RATIO = 20.0, 10.0, 2.0, 1.3
ROUNDS = 3


def task(model: str, batches: tuple[int, ...], *, device: str, layers: int | None = None) -> PredictTask:
    """The cells of one model, in bf16 at 4096 tokens."""
    source = sources.resolve(model, pretrained=False, trust_remote_code=False)
    depth = layers or int(source.config["num_hidden_layers"])
    plans = [strategies.parse(spec).plan_for(depth) for spec in STRATEGIES]
    target = Target(kind=device, name=device, memory_bytes=None if device == "cpu" else 80 * 2**30)
    return PredictTask(
        source=source,
        layers=layers,
        overrides={},
        attn_implementation=None,
        lora=None,
        precision="bf16",
        optim="adamw_torch",
        target=target,
        cells=tuple(
            CellToPredict(number=number, batch_size=batch, seq_len=4096, plan=plan)
            for number, (batch, plan) in enumerate((b, p) for b in batches for p in plans)
        ),
        explain=False,
        exact=False,
    )


def predicted(asked: PredictTask) -> tuple[float, list[int]]:
    """Seconds that the whole prediction takes, model building included, and the peaks."""
    begin = time.perf_counter()
    session = Session(asked)
    peaks = [session.predict(cell).memory.allocated_bytes for cell in asked.cells]
    return time.perf_counter() - begin, peaks


def tracked(asked: PredictTask) -> tuple[float, list[int]]:
    """The same cells through torch's MemTracker, on fake CPU tensors: two steps each, as the optimizer needs."""
    from torch.distributed._tools.mem_tracker import MemTracker

    begin = time.perf_counter()
    peaks = []
    for cell in asked.cells:
        built = models.build_config(asked.source, layers=asked.layers, overrides={})
        model = models.build_meta(built, dtype=torch.bfloat16)
        model.train()
        model.config.use_cache = False
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        materialize(model.modules(), fake, {})
        checkpointing.apply(model, cell.plan)
        with as_in_a_real_run(Recorder(), notes_random_state=False), fake:
            batch = torch.zeros(cell.batch_size, cell.seq_len, dtype=torch.int64)
            step = TrainingStep(model, batch=batch, precision="bf16", optim="adamw_torch", seed=0)
            tracker = MemTracker()
            tracker.track_external(model, step.optimizer, batch)
            with tracker:
                step()
                tracker.reset_mod_stats()
                step()
            peaks.append(sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values()))
    return time.perf_counter() - begin, peaks


def high_water_gib() -> float:
    """The most resident memory this process has held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def against_tracker() -> dict[str, Any]:
    asked = task("llama-3.1-8b", (1,), device="cpu")
    ours = median(predicted(asked)[0] for _ in range(ROUNDS))
    theirs, their_peaks = tracked(asked)
    our_peaks = predicted(asked)[1]
    print(f"llama-3.1-8b, four strategies: MemTracker {theirs:.1f} s, gcbench {ours:.2f} s: {theirs / ours:.0f} times")
    for spec, mine, other in zip(STRATEGIES, our_peaks, their_peaks, strict=True):
        print(f"  {spec:10} gcbench {mine / 2**30:8.3f} GiB, MemTracker {other / 2**30:8.3f} GiB")
    return {
        "seconds": ours,
        "tracker_seconds": theirs,
        "speedup": theirs / ours,
        "missed": theirs / ours < LEAST_SPEEDUP,
    }


def large() -> dict[str, Any]:
    """As the command does it, once its processes have imported torch: the model described, the cells shared out."""

    def seconds(model: str, batches: tuple[int, ...]) -> tuple[float, int]:
        begin = time.perf_counter()
        wanted = config.settings({"model": model, "batch_size": list(batches), "seq_len": 4096, "precision": "bf16"})
        target_options = TargetOptions(device="h100")
        source = sources.resolve(model, pretrained=False, trust_remote_code=False)
        target = targets.resolve_target(target_options, None)
        report = forecast.forecast(
            wanted, target_options, target, source=source, children=children, command="benchmark"
        )
        return time.perf_counter() - begin, sum(outcome.prediction is not None for outcome in report.outcomes)

    with ExitStack() as stack:
        children = [stack.enter_context(ForkedChildren()) for _ in range(forecast.num_children())]
        seconds("llama-3.2-1b", (1,))
        taken, cells = seconds("llama-3.1-405b", (1, 2, 4, 8))
    alone, _ = predicted(task("llama-3.1-405b", (1, 2, 4, 8), device="cuda"))
    memory = high_water_gib()
    print(f"llama-3.1-405b, {cells} cells behind CUDA's allocator: {taken:.2f} s in {len(children)} processes")
    print(f"  in one process {alone:.2f} s, {memory:.2f} GiB")
    missed = taken > MOST_SECONDS or memory > MOST_GIB
    return {
        "seconds": taken,
        "processes": len(children),
        "cells": cells,
        "seconds_in_one_process": alone,
        "memory_gib": memory,
        "missed": missed,
    }


def depth() -> dict[str, Any]:
    def seconds(layers: int) -> float:
        return predicted(task("llama-3.1-8b", (1,), device="cuda", layers=layers))[0]

    seconds(16)  # what only the first pays for
    pairs = [(seconds(16), seconds(128)) for _ in range(2 * ROUNDS + 1)]
    ratio = median(deep / shallow for shallow, deep in pairs)
    print(f"128 layers against 16: {ratio:.2f} times the time ({median(p[1] for p in pairs):.2f} s)")
    return {"ratio": ratio, "seconds": [list(pair) for pair in pairs], "missed": ratio > MOST_DEPTH_RATIO}


PARTS = {"large": large, "depth": depth, "tracker": against_tracker}


def save(name: str, result: dict[str, Any]) -> None:
    """Keep one part's figures, beside those of the other parts."""
    path = REFERENCE / "prediction-speed.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document = stored | {
        "command": "make bench-predict",
        "machine": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "bars": {
            "speedup": LEAST_SPEEDUP,
            "seconds": MOST_SECONDS,
            "memory_gib": MOST_GIB,
            "depth_ratio": MOST_DEPTH_RATIO,
        },
        name: result,
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    gc.freeze()  # as a child process does: what was imported is never garbage
    results = {}
    for name in wanted:
        results[name] = PARTS[name]()
        save(name, results[name])
    bad = [name for name, result in results.items() if result["missed"]]
    if bad:
        sys.exit(f"bars missed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
