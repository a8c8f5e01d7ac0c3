"""Measures the overhead of operator calls in a training step over the same calls by themselves, by their caller.

Measured on a model so small that the overhead dominates: a step of it is traced, its calls are timed one by one, and
the difference between the real step and their sum is attributed to its calls. All overhead of checkpointing (hooks
around every saved tensor and, with a policy, Python around every call) is attributed to the calls of a group's first
run, wherever in the step it is spent. It grows with the bytes that a call touches, which evict the code of Python and
torch from the core's own cache, so it is measured at two batch sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch.utils.hooks import RemovableHandle

from gcbench import strategies
from gcbench.calibration.call_overhead import Overhead, coldness
from gcbench.calibration.op_times import Calibration
from gcbench.calibration.timer import Timer, Took, clocks, typical
from gcbench.checkpointing import apply as checkpointing
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.simulate.costs import Caller, Work
from gcbench.simulate.predictor import Predictor, Step
from gcbench.training.step import TrainingStep, random_batch

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
_BATCH_SIZES, _SEQ_LEN = (1, 8), 96
"""The model's code is typical of current ones. With one sequence its calls take microseconds and their data stays in a
core's own cache; with eight, every call evicts most of that cache."""
_STRATEGIES: dict[str, Caller] = {"off": "model", "per-layer": "checkpoint", "selective:matmul": "policy"}
"""Each with the caller of the operators of a layer's first run."""
_PRECISION, _OPTIM = "fp32", "adamw_torch"
_ROUNDS = 3
_LEAST_STEPS, _MOST_STEPS = 2, 30
"""Steps of each strategy and batch size in one round."""
LEAST_S = 6.0
"""Enough for some ten repetitions of each call and step on a slow machine."""
_SHARES = (0.3, 0.2, 0.5)
"""Fractions of a round's time: for the calls by themselves, and for the steps of each batch size."""
_CALL_S = 10e-6
"""The approximate time of one of the calls."""

_PARTS = ("before", "layers", "after", "backward", "optimizer")
"""The parts of a step: before the first layer, in layers, after the last, and the two phases that follow."""
_CHECKPOINTED = ("layers", "backward")
"""The parts to which checkpointing adds time."""
Works = Mapping[str, Sequence[tuple[Work, float]]]
"""Part of a step -> its calls, each with how often it is made."""
Turn = Mapping[str, Mapping[str, float]]
"""One step with each strategy, one after the other: strategy -> part -> seconds."""
TurnTook = Mapping[str, Mapping[str, Took]]
"""The same with both clocks."""


Solved = tuple[tuple[Overhead, ...], float]
"""(The overhead of each caller per call, the seconds that a step takes besides, whatever its layers.)"""


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """The overheads in wall time, and in processor time of all threads of the process."""

    wall: Solved
    processor: Solved

    def of(self, machine: str, created: str) -> Calibration:
        """The calibration that consists of them."""
        return Calibration(
            machine=machine,
            created=created,
            overheads=self.wall[0],
            step_s=self.wall[1],
            processor_overheads=self.processor[0],
            processor_step_s=self.processor[1],
        )


def overheads(timer: Timer, *, until: float, least_s: float = LEAST_S) -> Overheads:
    """The overhead of each caller per call, and the seconds that a step takes besides, whatever its layers.

    Measured until `until` on the clock of the timer, but for at least `least_s`; tracing takes one more second.
    """
    source = sources.resolve(_MODEL, pretrained=False, trust_remote_code=False)
    config = models.build_config(source, layers=_LAYERS, overrides=_SIZES)
    predictor = Predictor(models.build_meta(config), precision=_PRECISION, optim=_OPTIM)
    works = {
        (strategy, batch): _by_part(
            predictor.step(strategies.parse(strategy).plan_for(_LAYERS), batch_size=batch, seq_len=_SEQ_LEN)
        )
        for strategy in _STRATEGIES
        for batch in _BATCH_SIZES
    }
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
    return _measured(timer, model, works, max(until, timer.now() + least_s))


def _by_part(step: Step) -> dict[str, list[tuple[Work, float]]]:
    found: dict[str, list[tuple[Work, float]]] = {part: [] for part in _PARTS}
    is_behind = False
    for segment, works in step.works:
        is_layer = segment is not None and segment[0] == "forward"
        is_behind |= is_layer
        for work in works:
            if is_layer:
                part = "layers"
            elif work.caller in ("backward", "recompute"):
                part = "backward"
            else:
                part = "after" if is_behind else "before"
            found[part].append((work, 1.0))
    assert step.update is not None
    found["optimizer"] += zip(step.update.works, step.update.times, strict=True)
    return found


def _measured(timer: Timer, model: torch.nn.Module, works: Mapping[tuple[str, int], Works], until: float) -> Overheads:
    steps = {batch: _Step(model, batch, timer.now) for batch in _BATCH_SIZES}
    counts = Counter(work for parts in works.values() for part in parts.values() for work, _ in part)
    calls = list({(work.call, work.cold): work for work, _ in counts.most_common() if work.call}.values())
    share = (until - timer.now()) / _ROUNDS
    alone: dict[tuple[str, int], Took] = {}
    turns: dict[int, list[TurnTook]] = {batch: [] for batch in steps}
    for number in range(_ROUNDS):  # calls and steps alternate, so that a slow moment affects both
        if number and timer.now() > until:
            break
        untimed = [work for work in calls if (work.call, work.cold) not in alone] or calls
        for point in timer.points(untimed, expected=lambda work: _CALL_S, until=timer.now() + share * _SHARES[0]):
            key = (point.call, point.cold)
            took = Took(wall_s=point.seconds, processor_s=point.processor_s)
            alone[key] = took if key not in alone else _least(took, alone[key])
        for (batch, step), part in zip(steps.items(), _SHARES[1:], strict=True):
            turns[batch] += step.turns(until=timer.now() + share * part)

    def solved(of: Callable[[Took], float]) -> Solved:
        other = median(map(of, alone.values())) if alone else _CALL_S
        found = {key: of(took) for key, took in alone.items()}
        seconds = {
            batch: [
                {strategy: {part: of(took) for part, took in parts.items()} for strategy, parts in turn.items()}
                for turn in each
            ]
            for batch, each in turns.items()
        }
        return _solved(works, seconds, {work: found.get((work.call, work.cold), other) for work in counts})

    return Overheads(wall=solved(lambda took: took.wall_s), processor=solved(lambda took: took.processor_s or 0.0))


def _least(one: Took, other: Took) -> Took:
    """The lesser of each of both times."""
    processor_s = min(one.processor_s or 0.0, other.processor_s or 0.0)
    return Took(wall_s=min(one.wall_s, other.wall_s), processor_s=processor_s)


class _Step:
    """Runs the real step of one batch size with each strategy in turn."""

    def __init__(self, model: torch.nn.Module, batch_size: int, now: Callable[[], float]) -> None:
        self.model, self.now = model, now
        self.layers = checkpointing.checkpointable_layers(model)
        batch = random_batch(model, batch_size=batch_size, seq_len=_SEQ_LEN, seed=0)
        self.step = TrainingStep(model, batch=batch, precision=_PRECISION, optim=_OPTIM, seed=0)
        for strategy in _STRATEGIES:  # allocates once: the optimizer's states, the libraries' workspaces
            self._parts(strategy)

    def turns(self, *, until: float) -> Iterator[TurnTook]:
        """Steps with each strategy, one after the other, until `until`; a first warm-up turn is not counted."""
        for number in range(_MOST_STEPS):
            turn = {strategy: self._parts(strategy) for strategy in _STRATEGIES}
            if number:
                yield turn
            if number >= _LEAST_STEPS and self.now() > until:
                break

    def _parts(self, strategy: str) -> dict[str, Took]:
        marks: list[Took] = []

        def mark(*call: object) -> None:
            marks.append(clocks())

        hooks: list[RemovableHandle] = []
        checkpointing.apply(self.model, strategies.parse(strategy).plan_for(_LAYERS))
        try:
            self.step(lambda *call: None)  # as in training, a step follows one with the same strategy: its code is hot
            hooks = [self.layers[0].register_forward_pre_hook(mark), self.layers[-1].register_forward_hook(mark)]
            self.step(mark)
        finally:
            checkpointing.clear(self.model)
            for hook in hooks:
                hook.remove()
        mark()
        # Layers that are run again call their hooks again, in the backward pass.
        spans = pairwise([*marks[:4], *marks[-2:]])
        return {part: after.minus(before) for part, (before, after) in zip(_PARTS, spans, strict=True)}


def _solved(
    works: Mapping[tuple[str, int], Works], turns: Mapping[int, Sequence[Turn]], alone: Mapping[Work, float]
) -> Solved:
    """Attribute the time of steps beyond their calls to the callers: (overhead of each caller, seconds per step).

    `works` has the calls of each (strategy, batch size), `turns` the times of each batch size, `alone` the seconds of
    each call by itself.
    """
    small = _BATCH_SIZES[0]
    calls = works["off", small]
    took = {part: typical([turn["off"][part] for turn in turns[small]]) for part in _PARTS}
    beyond = {part: took[part] - _sum(calls[part], alone.__getitem__) for part in _PARTS}
    model_s = max(beyond["layers"] / _count(calls["layers"]), 0.0)
    # A view does nothing, so it takes as long as Python needs for a call: no caller saves more than that.
    python_s = min((seconds for work, seconds in alone.items() if work.kind == "view"), default=0.0)
    found: dict[Caller, Overhead] = {"recompute": Overhead(caller="recompute", call_s=model_s)}
    found["model"] = Overhead(caller="model", call_s=model_s)
    callers: tuple[Caller, ...] = ("backward", "optimizer")
    for caller in callers:
        call_s = beyond[caller] / _count(calls[caller])
        # Nor does any add more than a model's own code.
        found[caller] = Overhead(caller=caller, call_s=min(max(call_s, -python_s), model_s))
    outside = _count(calls["before"]) + _count(calls["after"])
    step_s = max(beyond["before"] + beyond["after"] - model_s * outside, 0.0)

    def in_step(work: Work) -> float:
        return alone[work] + found[work.caller].seconds(work)

    for strategy, caller in list(_STRATEGIES.items())[1:]:
        rows = [_first_run(strategy, caller, batch, works, turns[batch], in_step) for batch in _BATCH_SIZES]
        found[caller] = _fit(caller, rows, least=model_s)
    return tuple(found.values()), step_s


def _first_run(
    strategy: str,
    caller: Caller,
    batch: int,
    works: Mapping[tuple[str, int], Works],
    turns: Sequence[Turn],
    in_step: Callable[[Work], float],
) -> tuple[float, float]:
    """(coldness, seconds) of the average call of a group's first run: what the strategy adds to the step beyond `off`.

    The calls that it runs again, each of `in_step` seconds, are subtracted.
    """
    first = [pair for pair in works[strategy, batch]["layers"] if pair[0].caller == caller]
    off_s, now_s = (
        typical([sum(turn[each][part] for part in _CHECKPOINTED) for turn in turns]) for each in ("off", strategy)
    )
    off, now = (_sum(works[each, batch]["backward"], in_step) for each in ("off", strategy))
    return _sum(first, coldness) / _count(first), (now_s - off_s - (now - off)) / _count(first)


def _count(calls: Iterable[tuple[Work, float]]) -> float:
    """How many calls are made."""
    return sum(times for _, times in calls)


def _sum(calls: Iterable[tuple[Work, float]], of: Callable[[Work], float]) -> float:
    """The sum of `of` over all calls."""
    return sum(times * of(work) for work, times in calls)


def _fit(caller: Caller, rows: Sequence[tuple[float, float]], *, least: float) -> Overhead:
    """The overhead of a caller from (coldness, seconds beyond those of a model's own code) at two batch sizes."""
    (c1, s1), (c2, s2) = rows
    cold = max((s2 - s1) / (c2 - c1), 0.0)
    return Overhead(caller=caller, call_s=least + max(s1 - cold * c1, 0.0), cold_s=cold)
