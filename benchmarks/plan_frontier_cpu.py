"""The part of `plan_frontier.py` that is measured: a small Llama on this machine's CPU, real training steps.

Every plan must give the gradients of off bit for bit. Peaks are the allocator's. Times are taken in interleaved rounds
in one process, and overheads are ratios within a round, of processor time (user) as in `gcbench run`: OpenMP's threads
sleep while they wait, and freed memory is kept. Wall times are stored beside them. Predictions rest on calls timed on
this machine first.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plan_ground import FULL, OFF, Ground

from gcbench import strategies
from gcbench.calibration.calibrate import calibrate_for
from gcbench.checkpointing import apply as checkpointing
from gcbench.devices.backends import cpu
from gcbench.devices.target import Target
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.plan.search.planner import Planner
from gcbench.plan.task import PlanTask
from gcbench.report.stats import Estimate, estimate
from gcbench.simulate.costs import CardFigures, Figures
from gcbench.strategies import Plan
from gcbench.training.step import TrainingStep, random_batch

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
}
BATCH, SEQ_LEN, PRECISION, OPTIM = 4, 512, "fp32", "adamw_torch"
WAYS = (0.25, 0.5, 0.75)
NAMED = ("off", "per-layer", "every:2", "first:3", "selective:matmul")
ROUNDS, STEPS = 10, 1
CALIBRATION_S = 90.0


def measured() -> dict[str, Any]:
    """Peaks, gradients and times of named strategies and found plans, beside what was predicted."""
    source = ModelSource(name="llama, 512 wide", origin="", config=CONFIG, location="")
    ground = _ground(source)
    points = {
        spec: ground.point(spec, [number] * len(ground.layers)) for spec, number in (("off", OFF), ("per-layer", FULL))
    }
    for spec in NAMED[2:]:
        plan = strategies.parse(spec).plan_for(len(ground.layers))
        if plan.policies:
            (number,) = ground.add([plan])
            choice = [number] * len(ground.layers)
        else:
            chosen = {layer for group in plan.groups for layer in group}
            choice = [FULL if layer in chosen else OFF for layer in ground.layers]
        points[spec] = ground.point(spec, choice)
    low, high = points["per-layer"], points["off"]
    for way in WAYS:
        budget = int(low.peak_bytes + way * (high.peak_bytes - low.peak_bytes))
        (found,) = ground.found([budget])
        assert found is not None
        points[f"found at {way}"] = found
    plans = {name: ground.plan_of(point.choice) for name, point in points.items()}
    real = _Real(source)
    same = real.gradients(plans)
    peaks = real.peaks(plans)
    load = os.getloadavg()[0]
    turns = real.turns(plans)
    times = {name: [turn.user_s for turn in each] for name, each in turns.items()}
    rows = []
    for name, point in points.items():
        ratios = [mine / off for mine, off in zip(times[name], times["off"], strict=True)]
        shares = [
            (mine - off) / (full - off)
            for mine, off, full in zip(times[name], times["off"], times["per-layer"], strict=True)
        ]
        rows.append(
            {
                "plan": name,
                "layers": len(plans[name].groups),
                "same_gradients": same[name],
                "predicted_bytes": point.peak_bytes,
                "peak_bytes": peaks[name],
                "predicted_overhead": point.seconds / low.seconds,
                "overhead": _interval(estimate(shares)),
                "ratio_to_off": _interval(estimate(ratios)),
                "step_times_s": [turn.wall_s for turn in turns[name]],
                "user_s": times[name],
                "system_s": [turn.system_s for turn in turns[name]],
            }
        )
    off_s = ground.planner.evaluator.scaling(ground.plans[OFF]).seconds(BATCH, ground.figures)
    return {
        "config": CONFIG,
        "batch_size": BATCH,
        "seq_len": SEQ_LEN,
        "precision": PRECISION,
        "optim": OPTIM,
        "threads": torch.get_num_threads(),
        "processor": cpu.CpuDevice().describe().device_name,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "rounds": ROUNDS,
        "steps_in_a_round": STEPS,
        "overheads_of": "processor time (user)",
        "times_from": ground.figures.source,
        "predicted_step_s": {"off": off_s, "per-layer": off_s + low.seconds},
        "rows": rows,
    }


def _interval(found: Estimate | None) -> dict[str, float | None]:
    assert found is not None
    return {"centre": found.centre, "low": found.low, "high": found.high}


def _ground(source: ModelSource) -> Ground:
    """With times of this machine for the calls that its steps make."""

    def planner(figures: Figures) -> Planner:
        task = PlanTask(
            source=source,
            layers=None,
            overrides={},
            attn_implementation=None,
            lora=None,
            precision=PRECISION,
            optim=OPTIM,
            target=Target(kind="cpu", name="cpu", memory_bytes=None),
            seq_len=SEQ_LEN,
            named=(),
            batch_sizes=(BATCH,),
            reserve_frac=0.0,
            layers_in_order=None,
            can_checkpoint=True,
            device_here=None,
        )
        return Planner(task, figures)

    rough = planner(CardFigures(None))
    works = [work for plan in rough.mixes.uniform for work in rough.evaluator.calls(plan, BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        figures = calibrate_for(works, device=cpu.CpuDevice(), budget_s=CALIBRATION_S, folder=Path(folder))
    return Ground(planner(figures.by_processor_time(works)), BATCH)


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Seconds of a step: of wall time, and of processor time in user and in system mode."""

    wall_s: float
    user_s: float
    system_s: float


class _Real:
    """The model with real weights, and its training step."""

    def __init__(self, source: ModelSource) -> None:
        config = models.build_config(source, layers=None, overrides={})
        self.device = cpu.CpuDevice()
        self.device.keep_memory()
        self.model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
        batch = random_batch(self.model, batch_size=BATCH, seq_len=SEQ_LEN, seed=0)
        self.step = TrainingStep(self.model, batch=batch, precision=PRECISION, optim=OPTIM, seed=0)

    @contextmanager
    def _with(self, plan: Plan) -> Iterator[None]:
        checkpointing.apply(self.model, plan)
        try:
            yield
        finally:
            checkpointing.clear(self.model)

    def gradients(self, plans: Mapping[str, Plan]) -> dict[str, bool]:
        """Whether each plan's gradients are those of off, bit for bit."""
        expected: list[torch.Tensor] = []
        same = {}
        for name, plan in plans.items():
            with self._with(plan):
                torch.manual_seed(0)
                self.model(**self.step.inputs).loss.backward()
            found = [param.grad for param in self.model.parameters() if param.grad is not None]
            expected = expected or [gradient.clone() for gradient in found]
            same[name] = len(found) == len(expected) and all(map(torch.equal, found, expected))
            self.model.zero_grad(set_to_none=True)
        return same

    def peaks(self, plans: Mapping[str, Plan]) -> dict[str, int]:
        self.step()
        found = {}
        for name, plan in plans.items():
            with self._with(plan):
                with self.device.probe_memory() as probe:
                    self.step()
                    self.step(probe.on_phase)
                found[name] = probe.peaks().allocated_bytes
        return found

    def turns(self, plans: Mapping[str, Plan]) -> dict[str, list[_Turn]]:
        """What a step takes, a turn per round, after a step that does not count."""
        found: dict[str, list[_Turn]] = {name: [] for name in plans}
        names = list(plans)
        for number in range(ROUNDS):
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned:
                with self._with(plans[name]):
                    self.step()
                    self.device.begin_turn()
                    wall_s = [self.device.time(self.step) for _ in range(STEPS)]
                    observed = self.device.end_turn()
                found[name].append(
                    _Turn(wall_s=min(wall_s), user_s=observed.user_s / STEPS, system_s=observed.system_s / STEPS)
                )
        return found


def show_measured(done: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\nmeasured: Llama, 6 layers, 512 wide, batch {done['batch_size']} x {done['seq_len']}, {done['precision']}, "
        f"on {done['processor']}, {done['threads']} threads; load {done['load_before']:.2f} before, "
        f"{done['load_after']:.2f} after; "
        f"{done['times_from']}"
    )
    print(f"  {'plan':18} {'peak MiB':>9} {'predicted':>10} {'overhead':>9} {'95 % interval':>16} {'predicted':>10}")
    for row in done["rows"]:
        over = row["overhead"]
        print(
            f"  {row['plan']:18} {row['peak_bytes'] / 2**20:9.1f} {row['predicted_bytes'] / 2**20:10.1f} "
            f"{over['centre']:9.3f} {over['low']:7.3f} to {over['high']:5.3f} {row['predicted_overhead']:10.3f}"
            f"{'' if row['same_gradients'] else '  GRADIENTS DIFFER'}"
        )
