"""How much speed `gcbench plan` gives away: its choice against the best of everything measured, over many budgets.

    python benchmarks/regret.py              plan and measure what is not stored yet, then score (about half an hour)
    python benchmarks/regret.py --rounds 8   as many rounds of everything: what is stored is measured some more
    python benchmarks/regret.py --plan       plan again, and measure what is chosen now and was not measured
    python benchmarks/regret.py --shapes "gpt2;qwen3"  workloads of these shapes
    python benchmarks/regret.py --score [FILE]         score what is stored, in seconds

Twelve workloads on the CPU, each measured exhaustively: every named strategy at every batch size, and every plan that
was found for one of its budgets. Peaks come from the allocator's events, one setting after another; times from rounds
in which all settings of a workload take turns in one process, in a new order each round. As in `gcbench run`, OpenMP's
threads sleep while they wait, freed memory is kept, and settings are compared by processor time (user), which leaves
out what other processes take. System time and wall time are stored beside it. Kept in
results/reference/regret-DEVICE.json.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quiet_threads import restart_with_sleeping_threads
from regret_scores import ROUNDS, TIMED, report
from truth import REFERENCE, slug

from gcbench.core.files import write_text
from gcbench.devices import conditions
from gcbench.plan.decision import Candidate
from gcbench.strategies.plan_file import as_json, of_json

BUDGETS = 6
STRATEGIES = (
    "off", "per-layer", "every:2", "first:2", "last:2", "selective:attention", "selective:matmul"
)  # fmt: skip
_LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2000},
    "llama, many words": {
        **_LLAMA, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 8000
    },
    "llama, wide inside": {
        **_LLAMA, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 5, "vocab_size": 1000
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 3000,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 192, "n_layer": 4, "n_head": 6, "vocab_size": 2000, "n_positions": 512
    },
    "gpt-neox": {
        "model_type": "gpt_neox", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 3000,
    },
}  # fmt: skip
LENGTHS = {96: (1, 2, 4, 8), 256: (1, 2, 4)}
"""Tokens -> batch sizes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One strategy or found plan at one batch size."""

    strategy: str
    batch_size: int
    plan: str

    @property
    def key(self) -> str:
        return f"{self.batch_size} {self.strategy} {self.plan}"


def setting(candidate: Candidate) -> Setting:
    return Setting(
        strategy=candidate.strategy,
        batch_size=candidate.batch_size,
        plan=json.dumps(as_json(candidate.plan), separators=(",", ":")),
    )


def planned(shape: dict[str, Any], seq_len: int) -> tuple[list[Setting], list[dict[str, Any]]]:
    """The grid of a workload, and what is chosen for each budget with the candidates it was chosen from."""
    from gcbench.devices.target import Target
    from gcbench.models import sources
    from gcbench.plan.search.planner import Planner, figures_for
    from gcbench.plan.task import PlanTask
    from gcbench.strategies import parse

    num_layers = shape.get("num_hidden_layers") or shape["n_layer"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(shape), encoding="utf-8")
        source = sources.resolve(str(path), pretrained=False, trust_remote_code=False)
        task = PlanTask(
            source=source,
            layers=None,
            overrides={},
            attn_implementation=None,
            lora=None,
            precision="fp32",
            optim="adamw_torch",
            target=Target(kind="cpu", name="cpu", memory_bytes=2**40),
            seq_len=seq_len,
            named=tuple((spec, parse(spec).plan_for(num_layers)) for spec in STRATEGIES),
            batch_sizes=LENGTHS[seq_len],
            reserve_frac=0.0,
            layers_in_order=None,
            can_checkpoint=True,
            device_here="cpu",
        )
        planner = Planner(task, figures_for(task))
        grid = [
            planner.evaluator.candidate(spec, plan, batch) for spec, plan in task.named for batch in LENGTHS[seq_len]
        ]
        peaks = [candidate.peak_bytes for candidate in grid]
        low, high = min(peaks), max(peaks)
        cases = []
        for number in range(BUDGETS):
            budget = round(low * (1.01 * high / low) ** ((number + 0.5) / BUDGETS))
            decision = planner.limited(budget).decide()
            assert decision.choice is not None
            cases.append(
                {
                    "budget_bytes": budget,
                    "choice": setting(decision.choice).key,
                    "candidates": [
                        {
                            "key": setting(candidate).key,
                            "strategy": candidate.strategy,
                            "batch_size": candidate.batch_size,
                            "peak_bytes": candidate.peak_bytes,
                            "tokens_per_s": candidate.tokens_per_s,
                        }
                        for candidate in decision.candidates
                        if candidate.fits
                    ],
                    "found": [asdict(setting(candidate)) for candidate in decision.candidates if candidate.fits],
                }
            )
    found = [Setting(**each) for case in cases for each in case["found"]]
    return list(dict.fromkeys([*map(setting, grid), *found])), cases


def measured(
    shape: dict[str, Any], seq_len: int, settings: list[Setting], known: dict[str, dict[str, Any]], num_rounds: int
) -> dict[str, dict[str, Any]]:
    """Peak and times of every setting; of those in `known` the rounds that are lacking."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gcbench.checkpointing import apply as checkpointing
    from gcbench.devices import backends
    from gcbench.training.step import TrainingStep, random_batch

    torch.manual_seed(0)
    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config).train()
    device = backends.open_device("cpu")
    device.keep_memory()
    device.limit_memory(None)
    plans = {each.key: of_json(json.loads(each.plan)) for each in settings}

    def step_of(batch_size: int) -> TrainingStep:
        batch = random_batch(model, batch_size=batch_size, seq_len=seq_len, seed=0)
        return TrainingStep(model, batch=batch, precision="fp32", optim="adamw_torch", seed=0)

    result = dict(known)
    for each in settings:
        if each.key in known:
            continue
        checkpointing.apply(model, plans[each.key])
        step = step_of(each.batch_size)
        gc.collect()
        with device.probe_memory() as probe:
            step()
            device.settle()
            step(probe.on_phase)
        result[each.key] = {**asdict(each), "peak_bytes": probe.peaks().allocated_bytes, "turns": []}
        checkpointing.clear(model)
        del step
    steps = {batch: step_of(batch) for batch in dict.fromkeys(each.batch_size for each in settings)}
    order = list(settings)
    for number in range(num_rounds):
        random.Random(number).shuffle(order)
        for each in order:
            if len(result[each.key]["turns"]) > number:
                continue
            checkpointing.apply(model, plans[each.key])
            step = steps[each.batch_size]
            step()
            before = conditions.read()
            wall_s = [device.time(step) for _ in range(TIMED)]
            after = conditions.read()
            result[each.key]["turns"].append(
                {"wall_s": wall_s, "user_s": after.user_s - before.user_s, "system_s": after.system_s - before.system_s}
            )
            checkpointing.clear(model)
    return result


def main() -> None:
    restart_with_sleeping_threads()
    from gcbench.devices.backends import open_device

    machine = open_device("cpu").describe()
    path = REFERENCE / f"regret-{slug(machine)}.json"
    if "--score" in sys.argv:
        report(Path(argument) if (argument := _argument("--score")) else path)
        return
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"workloads": {}}
    stored |= {
        "command": "python benchmarks/regret.py",
        "machine": machine.device_name,
        "versions": machine.versions,
        "settings": machine.settings,
    }
    num_rounds = int(_argument("--rounds") or ROUNDS)
    wanted = (_argument("--shapes") or ";".join(SHAPES)).split(";")
    for name, shape in ((name, shape) for name, shape in SHAPES.items() if name in wanted):
        for seq_len in LENGTHS:
            key = f"{name} × {seq_len}"
            known = stored["workloads"].get(key)
            plans_again = "--plan" in sys.argv
            if known and not plans_again and all(len(cell["turns"]) >= num_rounds for cell in known["cells"].values()):
                continue
            begin = time.perf_counter()
            cells = known["cells"] if known else {}
            settings = [
                Setting(**{name: cell[name] for name in ("strategy", "batch_size", "plan")}) for cell in cells.values()
            ]
            if known and not plans_again:
                cases = known["cases"]
            else:
                chosen, cases = planned(shape, seq_len)
                settings = list(dict.fromkeys([*settings, *chosen]))
            done_planning = time.perf_counter()
            cells = measured(shape, seq_len, settings, cells, num_rounds)
            stored["workloads"][key] = {
                "name": key, "shape": shape, "seq_len": seq_len, "cases": cases, "cells": cells,
            }  # fmt: skip
            write_text(path, json.dumps(stored, indent=1) + "\n")
            print(
                f"{key}: {len(settings)} settings; planned in {done_planning - begin:.0f} s, measured in "
                f"{time.perf_counter() - done_planning:.0f} s",
                flush=True,
            )
    report(path)


def _argument(flag: str) -> str | None:
    """What follows a flag; None without it."""
    place = sys.argv.index(flag) + 1 if flag in sys.argv else len(sys.argv)
    return sys.argv[place] if place < len(sys.argv) and not sys.argv[place].startswith("--") else None


if __name__ == "__main__":
    main()
