"""How good the found plans are, by prediction, over all memory budgets, against layer counts and others' methods.

    python benchmarks/plan_frontier.py                          all workloads, then the measured one
    python benchmarks/plan_frontier.py --models llama-3.1-8b    workloads of these models
    python benchmarks/plan_frontier.py --measured               the measured one alone (minutes)

A workload is a model at up to 4096 tokens on one card's published rates, at the smallest batch (a power of two) at
which activations set the peak. A budget is told as a way: 0 is the peak with every layer recomputed, 1 with none.
Overhead is extra time against recomputing nothing, as a fraction of what recomputing everything takes extra. Curves:

- found: the mixes of its policies that the planner finds;
- layer_counts: the best of every:k, first:n and last:n for any number;
- sac_ilp, activation_memory_budget: others' methods on the same ground (`plan_frontier_others.py`), as the best of the
  plans they give that fit;
- bound: what nothing that keeps outputs of operators can beat, by linear programming.

What is stored in results/reference/plan-frontier.json is not done again. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import plan_frontier_others as others
import torch
from plan_bound import lower_bound
from plan_ground import FULL, OFF, CannotRun, Ground, Point
from quiet_threads import restart_with_sleeping_threads

from gcbench import __version__, strategies
from gcbench.core.files import write_text
from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.models import sources
from gcbench.plan.search.planner import Planner
from gcbench.plan.task import PlanTask
from gcbench.simulate.allocator.pools import MIN_BLOCK_BYTES
from gcbench.simulate.costs import CardFigures

STORED = Path(__file__).parent.parent / "results" / "reference" / "plan-frontier.json"
WAYS = tuple(round(0.05 * step, 2) for step in range(21))
TOLD = (0.25, 0.5, 0.75)
"""Ways that the table shows."""
TRACED = (0.25, 0.5)
"""Ways at which the found plan is traced as it is."""
NAMED = ("selective:matmul", "selective:attention")
MOST_OF_COUNTS = {0.5: 0.30, 0.25: 0.55}
"""The bars: way -> overhead of the found plan, as a fraction of the best layer count's."""
BARRED = "llama-3.1-8b"
_LONGEST = 4096
_MOST_TRIES = 5
_WELL_ABOVE = 1.5
"""Peak of off against per-layer, at least."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    model: str
    card: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.precision} {self.card}"


WORKLOADS = (
    Workload(model=BARRED, card="a100-80gb", precision="bf16-mixed"),
    Workload(model=BARRED, card="a100-80gb", precision="bf16"),
    Workload(model="gpt2-xl", card="a100-80gb", precision="bf16-mixed"),
    Workload(model="llama-3.2-1b", card="a100-80gb", precision="bf16-mixed"),
    Workload(model="mistral-7b-v0.3", card="h200", precision="bf16-mixed"),
    Workload(model="qwen3-8b", card="h200", precision="bf16-mixed"),
    Workload(model="gemma-2-9b", card="h200", precision="bf16-mixed"),
    Workload(model="phi-3-mini", card="a100-80gb", precision="bf16-mixed"),
    Workload(model="pythia-2.8b", card="a100-80gb", precision="bf16-mixed"),
    Workload(model="mixtral-8x7b", card="h200", precision="bf16-mixed"),
    Workload(model="llama-3.1-70b", card="h200", precision="bf16-mixed"),
    *(
        Workload(model=BARRED, card=card, precision=precision)
        for card in ("h100", "h200")
        for precision in ("bf16-mixed", "bf16")
    ),
)


def planner_for(workload: Workload) -> Planner:
    """The workload on its card without a bound on memory."""
    source = sources.resolve(workload.model)
    card = cards.find(workload.card)
    known = [source.config.get(name) for name in ("max_position_embeddings", "n_positions")]
    task = PlanTask(
        source=source,
        layers=None,
        overrides={},
        attn_implementation=None,
        lora=None,
        precision=workload.precision,
        optim="adamw_torch",
        target=Target(kind="cuda", name=workload.card, memory_bytes=None, card=card),
        seq_len=min([_LONGEST, *(length for length in known if length)]),
        named=(),
        batch_sizes=None,
        reserve_frac=0.0,
        layers_in_order=None,
        can_checkpoint=True,
        device_here=None,
    )
    return Planner(task, CardFigures(card))


def on_ground(planner: Planner) -> Ground:
    """At the smallest batch, a power of two, at which activations set the peak."""
    evaluator, (off, full) = planner.evaluator, planner.mixes.uniform[:2]
    for batch in (2**power for power in range(12)):
        lowest, highest = evaluator.candidate("per-layer", full, batch), evaluator.candidate("off", off, batch)
        if lowest.peak_phase != "optimizer" and highest.allocated_bytes > _WELL_ABOVE * lowest.allocated_bytes:
            return Ground(planner, batch)
    raise CannotRun("activations do not set its peak at any batch")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Peaks and seconds as ways and overheads."""

    off_bytes: int
    full_bytes: int
    full_s: float

    def budget(self, way: float) -> int:
        return int(self.full_bytes + way * (self.off_bytes - self.full_bytes))

    def way(self, nbytes: int) -> float:
        return (nbytes - self.full_bytes) / (self.off_bytes - self.full_bytes)

    def overhead(self, seconds: float | None) -> float | None:
        return None if seconds is None else seconds / self.full_s

    def told(self, point: Point) -> dict[str, Any]:
        way, overhead = self.way(point.peak_bytes), self.overhead(point.seconds)
        return {"name": point.name, "peak_bytes": point.peak_bytes, "way": way, "overhead": overhead}


def best_within(points: Sequence[Point | None], budget: int) -> Point | None:
    return min(
        (point for point in points if point is not None and point.peak_bytes <= budget),
        key=lambda point: point.seconds,
        default=None,
    )


def examined(workload: Workload) -> dict[str, Any]:
    """All curves of one workload."""
    begin = time.perf_counter()
    ground = on_ground(planner_for(workload))
    alike = [ground.point("", [number] * len(ground.layers)) for number in (OFF, FULL)]
    scale = Scale(off_bytes=alike[0].peak_bytes, full_bytes=alike[1].peak_bytes, full_s=alike[1].seconds)
    budgets = [scale.budget(way) for way in WAYS]
    found, counts = ground.found(budgets), ground.layer_counts()
    bound = lower_bound(ground)
    named = _named(ground)
    ours = {"found": found, "layer_counts": [best_within(counts, b) for b in budgets]}
    curves = {name: [scale.overhead(p and p.seconds) for p in points] for name, points in ours.items()}
    curves["bound"] = [scale.overhead(bound(budget)) for budget in budgets]
    methods: dict[str, Any] = {}
    for name, ask in _methods(ground, budgets):
        try:
            points, facts = ask()
        except Exception as err:  # others' code, and a model's
            methods[name] = {"why_not": f"{type(err).__name__}: {err}"}
            continue
        known = [point for point in points if point is not None]
        methods[name] = {"plans": [scale.told(point) for point in known], **facts}
        curves[name] = [scale.overhead(p and p.seconds) for p in (best_within(known, b) for b in budgets)]
    off_s = ground.planner.evaluator.scaling(ground.plans[OFF]).seconds(ground.batch, ground.figures)
    return {
        "workload": workload.name,
        "batch_size": ground.batch,
        "seq_len": ground.seq_len,
        "num_layers": len(ground.layers),
        "times_from": ground.figures.source,
        "off": {"peak_bytes": scale.off_bytes, "step_s": off_s},
        "per_layer": {"peak_bytes": scale.full_bytes, "step_s": off_s + scale.full_s},
        "curves": curves,
        "layer_counts": [best and best.name for best in ours["layer_counts"]],
        "named": [
            scale.told(point) | {"found": scale.overhead(p and p.seconds)}
            for point, p in zip(named, ground.found([point.peak_bytes for point in named]), strict=True)
        ],
        "methods": methods,
        "traced": [_traced(ground, scale, way) for way in TRACED],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _named(ground: Ground) -> list[Point]:
    count = len(ground.fake_model.layers)
    plans = [strategies.parse(spec).plan_for(count) for spec in NAMED]
    numbers = ground.add(plans)
    return [ground.point(spec, [n] * len(ground.layers)) for spec, n in zip(NAMED, numbers, strict=True)]


def _methods(
    ground: Ground, budgets: Sequence[int]
) -> Iterator[tuple[str, Callable[[], tuple[Sequence[Point | None], dict[str, Any]]]]]:
    yield "activation_memory_budget", lambda: others.memory_budget(ground)
    every_second = [budget for way, budget in zip(WAYS, budgets, strict=True) if way in TOLD or not round(20 * way) % 2]
    yield "sac_ilp", lambda: others.sac_ilp(ground, every_second)


def _traced(ground: Ground, scale: Scale, way: float) -> dict[str, Any]:
    """The found plan as a trace of it sees it; one that turns out too large is looked for in a smaller budget."""
    evaluator, budget = ground.planner.evaluator, scale.budget(way)
    off = evaluator.candidate("off", ground.plans[OFF], ground.batch)
    asked, told = budget, {"way": way, "budget_bytes": budget, "peak_bytes": None, "fits": False}
    for tries in range(_MOST_TRIES):
        (point,) = ground.found([asked])
        if point is None:
            break
        seen = evaluator.candidate("found", ground.plan_of(point.choice), ground.batch, traced=True)
        told |= {
            "composed_bytes": point.peak_bytes,
            "peak_bytes": seen.allocated_bytes,
            "overhead": scale.overhead(seen.step_time_s - off.step_time_s),
            "fits": seen.allocated_bytes <= budget,
            "tries": tries + 1,
        }
        if told["fits"]:
            break
        asked = min(asked, point.peak_bytes) - max(seen.allocated_bytes - budget, MIN_BLOCK_BYTES)
    return told


# What is told.


def _figure(value: float | None) -> str:
    return "    –" if value is None else f"{value:5.3f}"


def show(done: dict[str, Any]) -> None:
    """The table of one workload."""
    lowest, highest = done["per_layer"], done["off"]
    print(
        f"\n{done['workload']}: {done['num_layers']} layers, batch {done['batch_size']} x {done['seq_len']} tokens, "
        f"{lowest['peak_bytes'] / 2**30:.1f} GiB per-layer, {highest['peak_bytes'] / 2**30:.1f} GiB off, "
        f"per-layer takes {lowest['step_s'] / highest['step_s'] - 1:+.1%}"
    )
    names = ("found", "layer_counts", "sac_ilp", "activation_memory_budget", "bound")
    curves = done["curves"]
    print(f"  {'way':>4}  " + "  ".join(f"{name[:12]:>12}" for name in names))
    for place, way in enumerate(WAYS):
        if way in TOLD or not round(20 * way) % 2:
            row = (_figure(curves[name][place]) if name in curves else "    –" for name in names)
            print(f"  {way:4.2f}  " + "  ".join(f"{text:>12}" for text in row))
    for point in done["named"]:
        print(f"  {point['name']}: way {point['way']:.3f}, {point['overhead']:.3f}; found {_figure(point['found'])}")
    for traced in done["traced"]:
        if traced["peak_bytes"] is not None:
            room = (traced["budget_bytes"] - traced["peak_bytes"]) / 2**20
            tries = "" if traced.get("tries", 1) == 1 else f", found at try {traced['tries']}"
            print(f"  traced at way {traced['way']}: {traced['overhead']:.3f}, {room:.0f} MiB under the budget{tries}")
    for name, method in done["methods"].items():
        if "why_not" in method:
            print(f"  {name}: {method['why_not']}")


@dataclass(frozen=True, kw_only=True)
class Bar:
    text: str
    is_met: bool


def bars(done: dict[str, Any]) -> Iterator[Bar]:
    """Whether one workload of the model with bars meets them, and that no found plan is worse than a simpler one."""
    curves = done["curves"]
    found, counts, bound = curves["found"], curves["layer_counts"], curves["bound"]
    if done["workload"].startswith(f"{BARRED} "):
        traced = {told["way"]: told["overhead"] for told in done["traced"]}
        for way, most in MOST_OF_COUNTS.items():
            place = WAYS.index(way)
            share = traced[way] / counts[place]
            least = "" if bound[place] is None else f"; nothing can beat {bound[place] / counts[place]:.3f}"
            text = f"at way {way}: {share:.3f} of the best layer count's overhead, at most {most}{least}"
            yield Bar(text=text, is_met=share <= most)
    worse = [way for way, f, c in zip(WAYS, found, counts, strict=True) if f is None or f > c + 1e-9]
    yield Bar(text=f"worse than a layer count at ways {worse or 'none'}", is_met=not worse)
    beaten = [p["name"] for p in done["named"] if p["found"] is None or p["found"] > p["overhead"] + 1e-9]
    # A strategy above the peak of off or below that of per-layer is beaten by one of them.
    yield Bar(text=f"worse than a named strategy: {', '.join(beaten) or 'none'}", is_met=not beaten)
    late = [traced["way"] for traced in done["traced"] if not traced.get("fits")]
    yield Bar(text=f"traced peaks beyond the budget: {late or 'none'}", is_met=not late)


def load() -> dict[str, Any]:
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}  # type: ignore[no-any-return]


def save(**parts: Any) -> dict[str, Any]:
    """Keep these parts beside what is stored."""
    before = load()
    document = before | {
        "command": "make bench-plan",
        "machine": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform()},
        "versions": {
            "gcbench": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            **_solvers(before),
        },
        "ways": list(WAYS),
    }
    write_text(STORED, json.dumps(document | parts, indent=1) + "\n")
    return document | parts


def _solvers(stored: dict[str, Any]) -> dict[str, str]:
    """Versions of what sac_ilp needs: those here, else those that the stored curves were made with."""
    try:
        return {name: metadata.version(name) for name in ("pulp", "pwlf")}
    except metadata.PackageNotFoundError:
        return {name: version for name, version in stored.get("versions", {}).items() if name in ("pulp", "pwlf")}


def main() -> None:
    restart_with_sleeping_threads()
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="", help="names, joined by commas")
    parser.add_argument("--measured", action="store_true", help="only what is measured on this machine")
    parser.add_argument("--again", action="store_true", help="also what is stored")
    asked = parser.parse_args()
    wanted = [name for name in asked.models.split(",") if name]
    chosen = [each for each in WORKLOADS if not wanted or each.model in wanted]
    stored = {done["workload"]: done for done in load().get("workloads", [])}
    if not asked.measured:
        for workload in chosen:
            if workload.name not in stored or asked.again:
                stored[workload.name] = examined(workload)
                save(workloads=[stored[each.name] for each in WORKLOADS if each.name in stored])
            show(stored[workload.name])
            sys.stdout.flush()
    if asked.measured or not wanted:
        from plan_frontier_cpu import measured, show_measured

        kept = load().get("measured")
        if kept is None or asked.again or asked.measured:
            kept = measured()
            save(measured=kept)
        show_measured(kept)
    from plan_frontier_plot import draw

    draw(load(), STORED.with_suffix(".png"))
    missed = 0
    for workload in chosen:
        if workload.name in stored:
            print(f"\n{workload.name}", flush=True)
            for bar in bars(stored[workload.name]):
                print(f"  {'PASS' if bar.is_met else 'MISS'}  {bar.text}")
                missed += not bar.is_met
    if missed:
        sys.exit(f"{missed} bars missed")


if __name__ == "__main__":
    main()
