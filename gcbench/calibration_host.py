"""What a call of an operator takes in a training step beyond what it takes by itself, by what calls it.

Measured on a model so small that little else takes time: a step of it is traced, its calls are timed one by one, and
what the real step takes more or less than their sum is laid on its calls, alike on each. All that checkpointing adds,
which is hooks around every saved tensor and, with a policy, Python around every call, lies on the calls of a group's
first run, wherever in the step it is spent.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

from gcbench import checkpointing, models, sources, strategies
from gcbench.calibrated import Point
from gcbench.calibration import Timer, typical
from gcbench.costs import Caller, Work
from gcbench.records import PHASES, Phase
from gcbench.simulate.predictor import Predictor
from gcbench.training import TrainingStep, random_batch

_MODEL = "llama-3.2-1b"
_LAYERS = 2
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_BATCH_SIZE, _SEQ_LEN = 1, 64
"""The model's code is that of most current ones. Its calls take microseconds, and yet what they touch pushes code and
Python's objects out of a core's own cache, as that of any model worth training does."""
_STRATEGIES: dict[str, Caller] = {"off": "model", "per-layer": "checkpoint", "selective:matmul": "policy"}
"""With what calls the operators of a layer's first run."""
_PRECISION, _OPTIM = "fp32", "adamw_torch"
_MOST_STEPS = 30
_LEAST_STEPS = 4
LEAST_S = 3.0
"""By then calls and steps have been made some ten times each, on a slow machine."""


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """One strategy's step: its calls by phase, and the seconds of each phase."""

    works: dict[Phase, tuple[Work, ...]]
    seconds: dict[Phase, float]


def overheads(timer: Timer, *, until: float, least_s: float = LEAST_S) -> dict[str, float]:
    """Caller -> seconds for each call.

    Measured up to the moment `until` of the monotonic clock, and for `least_s` at least, beside a second of tracing.
    """
    source = sources.resolve(_MODEL, pretrained=False, trust_remote_code=False)
    config = models.build_config(source, layers=_LAYERS, overrides=_SIZES)
    predictor = Predictor(models.build_meta(config), precision=_PRECISION, optim=_OPTIM, exact=True)
    works: dict[str, tuple[Work, ...]] = {}
    for strategy in _STRATEGIES:
        plan = strategies.parse(strategy).plan_for(_LAYERS)
        step = predictor.step(plan, batch_size=_BATCH_SIZE, seq_len=_SEQ_LEN)
        works[strategy] = tuple(work for _, part in step.works for work in part)
    until = max(until, time.monotonic() + least_s)
    calls = [work for part in works.values() for work in part]
    alone = _alone(timer, calls, until=(time.monotonic() + until) / 2)
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
    seconds = _seconds(model, until=until)
    timed = {name: _Timed(works=_by_phase(part), seconds=seconds[name]) for name, part in works.items()}
    return _solved(timed, alone)


def _alone(timer: Timer, works: list[Work], *, until: float) -> dict[Work, float]:
    """What each call takes by itself."""
    counted = [work for work, _ in Counter(works).most_common() if work.call]
    points = timer.points(counted, expected=lambda work: 5e-6, until=until)
    by_call: dict[tuple[str, int], Point] = {(point.call, point.cold): point for point in points}
    nothing = typical([point.seconds for point in points]) if points else 0.0
    return {
        work: by_call[work.call, work.cold].seconds if (work.call, work.cold) in by_call else nothing for work in works
    }


def _seconds(model: torch.nn.Module, *, until: float) -> dict[str, dict[Phase, float]]:
    """Of the phases of each strategy's step; the strategies take turns."""
    samples: dict[str, dict[Phase, list[float]]] = {name: {phase: [] for phase in PHASES} for name in _STRATEGIES}
    batch = random_batch(model, batch_size=_BATCH_SIZE, seq_len=_SEQ_LEN, seed=0)
    step = TrainingStep(model, batch=batch, precision=_PRECISION, optim=_OPTIM, seed=0)
    for turn in range(_MOST_STEPS + 1):
        for strategy in _STRATEGIES:
            checkpointing.apply(model, strategies.parse(strategy).plan_for(_LAYERS))
            marks: list[float] = []
            step(partial(_mark, marks))
            marks.append(time.perf_counter())
            checkpointing.clear(model)
            if turn:
                for phase, begun, ended in zip(PHASES, marks, marks[1:], strict=False):
                    samples[strategy][phase].append(ended - begun)
        if turn >= _LEAST_STEPS and time.monotonic() > until:
            break
    return {
        strategy: {phase: typical(taken) for phase, taken in phases.items()} for strategy, phases in samples.items()
    }


def _mark(marks: list[float], phase: Phase) -> None:
    marks.append(time.perf_counter())


def _by_phase(works: tuple[Work, ...]) -> dict[Phase, tuple[Work, ...]]:
    """A step's calls: those of the backward pass lie between the first and the last that autograd makes."""
    backward = [place for place, work in enumerate(works) if work.caller in ("backward", "recompute")]
    first, last = backward[0], backward[-1] + 1
    return {"forward": works[:first], "backward": works[first:last], "optimizer": works[last:]}


def _solved(timed: dict[str, _Timed], alone: dict[Work, float]) -> dict[str, float]:
    """What is left of each phase after its calls, for each of the calls that cause it."""

    def left(strategy: str, phase: Phase, known: dict[str, float]) -> float:
        works = timed[strategy].works[phase]
        return timed[strategy].seconds[phase] - sum(alone[work] + known.get(work.caller, 0.0) for work in works)

    def count(strategy: str, phase: Phase, caller: Caller | None = None) -> int:
        return sum(caller in (None, work.caller) for work in timed[strategy].works[phase])

    # Python has a call made that does nothing in this time; a caller that is no Python saves no more than that.
    nothing = min((alone[work] for work in alone if work.kind == "view"), default=0.0)
    found = {
        "model": max(left("off", "forward", {}) / count("off", "forward"), 0.0),
        "backward": max(left("off", "backward", {}) / count("off", "backward"), -nothing),
        "optimizer": max(left("off", "optimizer", {}) / count("off", "optimizer"), -nothing),
    }
    found["recompute"] = found["model"]
    for strategy, caller in list(_STRATEGIES.items())[1:]:
        both = left(strategy, "forward", found) + left(strategy, "backward", found)
        found[caller] = max(both / count(strategy, "forward", caller), found["model"])
    return found
