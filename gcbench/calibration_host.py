"""What a call of an operator takes in a training step beyond what it takes by itself, by what calls it.

Measured on a model so small that little else takes time: a step of it is traced, its calls are timed one by one, and
what the real step takes more or less than their sum is laid on its calls, alike on each. All that checkpointing adds,
which is hooks around every saved tensor and, with a policy, Python around every call, lies on the calls of a group's
first run, wherever in the step it is spent.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch

from gcbench import checkpointing, models, sources, strategies
from gcbench.calibration import Timer, typical
from gcbench.costs import Caller, Work
from gcbench.records import PHASES, Phase
from gcbench.simulate.predictor import Predictor
from gcbench.training import TrainingStep, random_batch

_MODEL = "llama-3.2-1b"
_LAYERS = 2
_SIZES = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_BATCH_SIZE, _SEQ_LEN = 1, 96
"""The model's code is that of most current ones. Its calls take microseconds, and yet what they touch pushes code and
Python's objects out of a core's own cache, as that of any model worth training does."""
_STRATEGIES: dict[str, Caller] = {"off": "model", "per-layer": "checkpoint", "selective:matmul": "policy"}
"""With what calls the operators of a layer's first run."""
_PRECISION, _OPTIM = "fp32", "adamw_torch"
_ROUNDS = 4
_LEAST_STEPS, _MOST_STEPS = 2, 30
"""With each strategy, in one round."""
LEAST_S = 4.0
"""By then calls and steps have been made some ten times each, on a slow machine."""
_CALL_S = 10e-6
"""What one of the calls takes, more or less."""


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
        traced = predictor.step(plan, batch_size=_BATCH_SIZE, seq_len=_SEQ_LEN)
        works[strategy] = tuple(work for _, part in traced.works for work in part)
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
    with _one_thread():
        return _measured(timer, model, works, max(until, time.monotonic() + least_s))


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is looked for happens in one; several wait for each other, and for whatever else runs on their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measured(
    timer: Timer, model: torch.nn.Module, works: Mapping[str, tuple[Work, ...]], until: float
) -> dict[str, float]:
    step = _Step(model)
    counts = Counter(work for part in works.values() for work in part)
    calls = list({(work.call, work.cold): work for work, _ in counts.most_common() if work.call}.values())
    share = (until - time.monotonic()) / (2 * _ROUNDS)
    alone: dict[tuple[str, int], float] = {}
    seconds: dict[str, dict[Phase, float]] = {}
    for turn in range(_ROUNDS):  # calls and steps in turn, so that a slow moment does not meet the one alone
        if turn and time.monotonic() > until:
            break
        for point in timer.points(calls, expected=lambda work: _CALL_S, until=time.monotonic() + share):
            key = (point.call, point.cold)
            alone[key] = min(point.seconds, alone.get(key, point.seconds))
        for strategy, phases in step.seconds(until=time.monotonic() + share).items():
            before = seconds.get(strategy, phases)
            seconds[strategy] = {phase: min(took, before[phase]) for phase, took in phases.items()}
    other = median(alone.values()) if alone else _CALL_S
    took = {work: alone.get((work.call, work.cold), other) for part in works.values() for work in part}
    timed = {name: _Timed(works=_by_phase(part), seconds=seconds[name]) for name, part in works.items()}
    return _solved(timed, took)


class _Step:
    """The real step, with each strategy in turn."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        batch = random_batch(model, batch_size=_BATCH_SIZE, seq_len=_SEQ_LEN, seed=0)
        self.step = TrainingStep(model, batch=batch, precision=_PRECISION, optim=_OPTIM, seed=0)
        for strategy in _STRATEGIES:  # what is done once: the optimizer's states, the libraries' workspaces
            self._phases(strategy)

    def seconds(self, *, until: float) -> dict[str, dict[Phase, float]]:
        """Of the phases of each strategy's step."""
        samples: dict[str, list[list[float]]] = {strategy: [] for strategy in _STRATEGIES}
        for turn in range(_MOST_STEPS):
            for strategy, taken in samples.items():
                taken.append(self._phases(strategy))
            if turn + 1 >= _LEAST_STEPS and time.monotonic() > until:
                break
        return {
            strategy: dict(zip(PHASES, map(typical, zip(*taken, strict=True)), strict=True))
            for strategy, taken in samples.items()
        }

    def _phases(self, strategy: str) -> list[float]:
        checkpointing.apply(self.model, strategies.parse(strategy).plan_for(_LAYERS))
        marks: list[float] = []
        self.step(partial(_mark, marks))
        marks.append(time.perf_counter())
        checkpointing.clear(self.model)
        return [ended - begun for begun, ended in pairwise(marks)]


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

    # What a call that does nothing takes is Python's part in all that were timed: no caller saves more than that.
    nothing = min((took for work, took in alone.items() if work.kind == "view"), default=0.0)
    model = max(left("off", "forward", {}) / count("off", "forward"), 0.0)
    found: dict[str, float] = {"model": model, "recompute": model}
    phases: tuple[Phase, ...] = ("backward", "optimizer")
    for phase in phases:
        each = left("off", phase, {}) / count("off", phase)
        found[phase] = min(max(each, -nothing), model)  # nor does any add more than a model's own code
    for strategy, caller in list(_STRATEGIES.items())[1:]:
        both = left(strategy, "forward", found) + left(strategy, "backward", found)
        found[caller] = max(both / count(strategy, "forward", caller), found["model"])
    return found
