"""What a call of an operator takes in a training step beyond what it takes by itself, by what calls it.

Measured on a model so small that little else takes time: a step of it is traced, its calls are timed one by one, and
what the real step takes more or less than their sum is laid on its calls. All that checkpointing adds, which is hooks
around every saved tensor and, with a policy, Python around every call, lies on the calls of a group's first run,
wherever in the step it is spent. It grows with what the calls touch, as Python and torch find less of their code in the
core's own cache the more data has passed through it, and so is measured at two batch sizes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

import torch

from gcbench import strategies
from gcbench.calibration.op_times import Overhead, coldness
from gcbench.calibration.timer import Timer, typical
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
"""The model's code is that of most current ones. With one sequence its calls take microseconds and most of what they
touch stays in a core's own cache; with eight, most of that cache is swept by every call."""
_STRATEGIES: dict[str, Caller] = {"off": "model", "per-layer": "checkpoint", "selective:matmul": "policy"}
"""With what calls the operators of a layer's first run."""
_PRECISION, _OPTIM = "fp32", "adamw_torch"
_ROUNDS = 3
_LEAST_STEPS, _MOST_STEPS = 2, 30
"""With each strategy and batch size, in one round."""
LEAST_S = 6.0
"""By then calls and steps have been made some ten times each, on a slow machine."""
_SHARES = (0.3, 0.2, 0.5)
"""Of a round's time: for the calls by themselves, and for steps of either batch size."""
_CALL_S = 10e-6
"""What one of the calls takes, more or less."""

_PARTS = ("before", "layers", "after", "backward", "optimizer")
"""Of a step: before the first layer, in layers, behind the last, and the two phases that follow."""
_WATCHED = ("layers", "backward")
"""What checkpointing adds to."""
Works = Mapping[str, Sequence[tuple[Work, float]]]
"""Part of a step -> its calls, with how often each is made."""
Turn = Mapping[str, Mapping[str, float]]
"""One step with each strategy, one after the other: strategy -> part -> seconds."""


def overheads(timer: Timer, *, until: float, least_s: float = LEAST_S) -> tuple[tuple[Overhead, ...], float]:
    """What each caller adds to a call, and the seconds that a step takes beside, whatever its layers.

    Measured up to the moment `until` of the monotonic clock, and for `least_s` at least, beside a second of tracing.
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
    return _measured(timer, model, works, max(until, time.monotonic() + least_s))


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


def _measured(
    timer: Timer, model: torch.nn.Module, works: Mapping[tuple[str, int], Works], until: float
) -> tuple[tuple[Overhead, ...], float]:
    steps = {batch: _Step(model, batch) for batch in _BATCH_SIZES}
    counts = Counter(work for parts in works.values() for part in parts.values() for work, _ in part)
    calls = list({(work.call, work.cold): work for work, _ in counts.most_common() if work.call}.values())
    share = (until - time.monotonic()) / _ROUNDS
    alone: dict[tuple[str, int], float] = {}
    turns: dict[int, list[Turn]] = {batch: [] for batch in steps}
    for number in range(_ROUNDS):  # calls and steps in turn, so that a slow moment does not meet the one alone
        if number and time.monotonic() > until:
            break
        wanted = [work for work in calls if (work.call, work.cold) not in alone] or calls
        for point in timer.points(wanted, expected=lambda work: _CALL_S, until=time.monotonic() + share * _SHARES[0]):
            key = (point.call, point.cold)
            alone[key] = min(point.seconds, alone.get(key, point.seconds))
        for (batch, step), part in zip(steps.items(), _SHARES[1:], strict=True):
            turns[batch] += step.turns(until=time.monotonic() + share * part)
    other = median(alone.values()) if alone else _CALL_S
    return _solved(works, turns, {work: alone.get((work.call, work.cold), other) for work in counts})


class _Step:
    """The real step of one batch size, with each strategy in turn."""

    def __init__(self, model: torch.nn.Module, batch_size: int) -> None:
        self.model = model
        self.layers = checkpointing.checkpointable_layers(model)
        batch = random_batch(model, batch_size=batch_size, seq_len=_SEQ_LEN, seed=0)
        self.step = TrainingStep(model, batch=batch, precision=_PRECISION, optim=_OPTIM, seed=0)
        for strategy in _STRATEGIES:  # what is done once: the optimizer's states, the libraries' workspaces
            self._parts(strategy)

    def turns(self, *, until: float) -> Iterator[Turn]:
        """One after the other, up to the moment `until`; one more comes first and does not count.

        In that one, the caches hold other things, and memory may have to be asked for.
        """
        for number in range(_MOST_STEPS):
            turn = {strategy: self._parts(strategy) for strategy in _STRATEGIES}
            if number:
                yield turn
            if number >= _LEAST_STEPS and time.monotonic() > until:
                break

    def _parts(self, strategy: str) -> dict[str, float]:
        marks: list[float] = []

        def mark(*call: object) -> None:
            marks.append(time.perf_counter())

        hooks = [self.layers[0].register_forward_pre_hook(mark), self.layers[-1].register_forward_hook(mark)]
        checkpointing.apply(self.model, strategies.parse(strategy).plan_for(_LAYERS))
        try:
            self.step(mark)
        finally:
            checkpointing.clear(self.model)
            for hook in hooks:
                hook.remove()
        mark()
        # Layers that are run again call their hooks again, in the backward pass.
        spans = pairwise([*marks[:4], *marks[-2:]])
        return {part: after - before for part, (before, after) in zip(_PARTS, spans, strict=True)}


def _solved(
    works: Mapping[tuple[str, int], Works], turns: Mapping[int, Sequence[Turn]], alone: Mapping[Work, float]
) -> tuple[tuple[Overhead, ...], float]:
    """What is left of each part after its calls, for each of the calls that cause it."""
    small = _BATCH_SIZES[0]
    off = {part: typical([turn["off"][part] for turn in turns[small]]) for part in _PARTS}

    def count(calls: Iterable[tuple[Work, float]]) -> float:
        return sum(times for _, times in calls)

    def by_themselves(calls: Iterable[tuple[Work, float]]) -> float:
        return sum(times * alone[work] for work, times in calls)

    def left(part: str) -> float:
        """Seconds of a small step in which nothing is recomputed, beyond its calls."""
        return off[part] - by_themselves(works["off", small][part])

    # What a call that does nothing takes is Python's part in all that were timed: no caller saves more than that.
    nothing = min((took for work, took in alone.items() if work.kind == "view"), default=0.0)
    model = max(left("layers") / count(works["off", small]["layers"]), 0.0)
    found: dict[Caller, Overhead] = {"recompute": Overhead(caller="recompute", call_s=model)}
    found["model"] = Overhead(caller="model", call_s=model)
    callers: tuple[Caller, ...] = ("backward", "optimizer")
    for caller in callers:
        each = left(caller) / count(works["off", small][caller])
        # Nor does any add more than a model's own code.
        found[caller] = Overhead(caller=caller, call_s=min(max(each, -nothing), model))

    def with_callers(calls: Iterable[tuple[Work, float]]) -> float:
        return sum(times * (alone[work] + found[work.caller].seconds(work)) for work, times in calls)

    outside = count(pair for part in ("before", "after") for pair in works["off", small][part])
    step_s = max(left("before") + left("after") - model * outside, 0.0)

    def extra(strategy: str, batch: int) -> float:
        """Seconds that a strategy adds to a step, beyond the calls that it makes again."""
        spans = [sum(turn[strategy][part] - turn["off"][part] for part in _WATCHED) for turn in turns[batch]]
        was, now = (works[each, batch]["backward"] for each in ("off", strategy))
        return median(spans) - (with_callers(now) - with_callers(was))

    for strategy, caller in list(_STRATEGIES.items())[1:]:
        rows = []
        for batch in _BATCH_SIZES:
            calls = [pair for pair in works[strategy, batch]["layers"] if pair[0].caller == caller]
            cold = sum(times * coldness(work) for work, times in calls)
            rows.append((cold / count(calls), extra(strategy, batch) / count(calls)))
        found[caller] = _fit(caller, rows, least=model)
    return tuple(found.values()), step_s


def _fit(caller: Caller, rows: Sequence[tuple[float, float]], *, least: float) -> Overhead:
    """From (coldness, seconds beyond what a model's own code adds) of a call at two batch sizes."""
    (c1, s1), (c2, s2) = rows
    cold = max((s2 - s1) / (c2 - c1), 0.0)
    return Overhead(caller=caller, call_s=least + max(s1 - cold * c1, 0.0), cold_s=cold)
