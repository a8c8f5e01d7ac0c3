"""Predicts step times and overheads that others measured on real cards, and says how far off the predictions are.

    python benchmarks/published_times.py            every row that gcbench can express; no device needed
    python benchmarks/published_times.py powerlm    only those whose id contains this; stores nothing

published_times_rows.py says where rows come from and how they are expressed. Writes
results/reference/published-times.json.

Two constants of the time model come from gcbench's own H100 runs (`EAGER_BANDWIDTH_SHARE` and the cost of a policy in
`HOST_CALL_S`), so these rows are reported by themselves; all others come from measurements of single kernels, or are
judgements that no step was fitted to. The share of memory-efficient attention comes from published steps with a kernel
that no compared row uses. Bands were set when the errors were known.

Bars: step times within 25 % in the median over complete rows, published and own; the overhead of per-layer
checkpointing within 5 percentage points in the median of pairs and 12 in the worst, published and own; at least 80 % of
step times and of overheads within their bands. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from statistics import median
from typing import Any

from published_rows import conclude, rows
from published_times_rows import COMPLETE, OWN, PUBLISHED, REFERENCE, Step, device_file, express, found_since, own

from gcbench import strategies
from gcbench.core import step_time
from gcbench.core.records import Lora
from gcbench.core.step_time import StepTime
from gcbench.devices import target as targets
from gcbench.devices.target import TargetOptions
from gcbench.models import sources
from gcbench.predict.task import PredictTask
from gcbench.predict.worker import Session
from gcbench.simulate.step_times import step_seconds

STORED = REFERENCE / "published-times.json"
MEDIAN_BAR, OVERHEAD_MEDIAN_BAR, OVERHEAD_WORST_BAR, COVERAGE_BAR = 0.25, 0.05, 0.12, 0.8
PER_LAYER = "per-layer"


def steps() -> tuple[list[Step], Counter[str]]:
    """Return the steps that gcbench can express, and why it cannot express the other rows."""
    found, reasons = [], Counter[str]()
    for row in rows():
        expressed = express(row)
        if isinstance(expressed, str):
            reasons[expressed] += 1
        else:
            found.append(expressed)
    return [*found, *found_since(), *own()], reasons


@cache
def _session(key: str) -> Session:
    """The session for steps with the same model, precision and device; `key` is a step's `_key`."""
    model, device, precision, optim, attention, lora_r, lora_targets = json.loads(key)
    target = targets.resolve_target(TargetOptions(device=device, device_file=device_file(device)), None)
    assert target is not None
    lora = (
        None
        if lora_r is None
        else Lora(r=lora_r, target_modules=tuple(lora_targets.split(",")) if lora_targets else None)
    )
    return Session(
        PredictTask(
            source=sources.resolve(model, pretrained=False, trust_remote_code=False),
            layers=None,
            overrides={},
            attn_implementation=attention,
            lora=lora,
            precision=precision,
            optim=optim,
            target=target,
            cells=(),
            explain=False,
            exact=False,
        )
    )


def predicted(step: Step) -> StepTime | None:
    """Predict the time of a step as `gcbench predict` does; None where gcbench predicts none."""
    key = [step.model, step.device, step.precision, step.optim, step.attention, step.lora_r, step.lora_targets]
    session = _session(json.dumps(key))
    plan = strategies.parse(step.strategy).plan_for(len(session.predictor.fake_model.layers))
    traced = session.predictor.step(plan, batch_size=step.batch, seq_len=step.seq_len)
    found, _ = session.time(traced, plan)
    if found is None or not step.passes_only:
        return found
    assert session.figures is not None
    passes = step_seconds(traced.works, (), session.figures)
    return StepTime(seconds=passes.seconds, basis=found.basis, source=found.source, waiting_frac=passes.waiting_frac)


def answer(step: Step, found: StepTime) -> dict[str, Any]:
    """Return what is stored of a step."""
    return {
        "id": step.id,
        "origin": step.origin,
        "source": step.source,
        "url": step.url,
        "device": step.device,
        "strategy": step.strategy,
        "completeness": step.completeness,
        "pair": step.pair,
        "orientation": step.orientation,
        "notes": list(step.notes),
        "published_s": round(step.seconds, 6),
        "predicted_s": round(found.seconds, 6),
        "error": round(found.seconds / step.seconds - 1, 4),
        "low_s": round(found.low_s, 6),
        "high_s": round(found.high_s, 6),
        "waiting_frac": round(found.waiting_frac, 4),
        "in_band": found.low_s <= step.seconds <= found.high_s,
    }


def pairs_of(found: list[tuple[Step, StepTime]]) -> list[dict[str, Any]]:
    """Return each strategy of a pair against `off`: published and predicted overhead, and the band."""
    offs = {step.pair: (step, time) for step, time in found if step.pair and step.strategy == "off"}
    pairs = []
    for step, time in found:
        if step.pair not in offs or step.strategy == "off":
            continue
        off, off_time = offs[step.pair]
        published, guess = step.seconds / off.seconds - 1, step_time.overhead(time, off_time)
        pairs.append(
            {
                "pair": step.pair,
                "strategy": step.strategy,
                "origin": step.origin,
                "orientation": step.orientation,
                "notes": list(step.notes),
                "published": round(published, 4),
                "predicted": round(guess.frac, 4),
                "low": round(guess.low_frac, 4),
                "high": round(guess.high_frac, 4),
                "error": round(guess.frac - published, 4),
                "in_band": guess.low_frac <= published <= guess.high_frac,
            }
        )
    return pairs


def figures(answers: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the pages say, of published and of own rows; rows for orientation do not count."""
    found: dict[str, Any] = {}
    for origin in (PUBLISHED, OWN):
        mine = [each for each in answers if each["origin"] == origin and each["orientation"] is None]
        errors = [abs(each["error"]) for each in mine if each["completeness"] >= COMPLETE]
        beside = [each for each in pairs if each["origin"] == origin and each["orientation"] is None]
        layers = [abs(each["error"]) for each in beside if each["strategy"] == PER_LAYER]
        found[origin] = {
            "steps": len(errors),
            "median": round(median(errors), 4) if errors else None,
            "worst": round(max(errors, default=0.0), 4),
            "in_band": _share([each for each in mine if each["completeness"] >= COMPLETE]),
            "per_layer_pairs": len(layers),
            "overhead_median": round(median(layers), 4) if layers else None,
            "overhead_worst": round(max(layers, default=0.0), 4),
            "pairs": len(beside),
            "overheads_in_band": _share(beside),
        }
    return found


def _share(found: list[dict[str, Any]]) -> float | None:
    """Return the share of those in their bands; None without any."""
    return round(sum(each["in_band"] for each in found) / len(found), 4) if found else None


def missed(seen: dict[str, Any]) -> list[str]:
    """Return the bars that are missed, each as a sentence."""
    sentences = []
    for origin, each in seen.items():
        for name, bar, what in (
            ("median", MEDIAN_BAR, "the median error of step times"),
            ("overhead_median", OVERHEAD_MEDIAN_BAR, "the median error of overheads of per-layer"),
            ("overhead_worst", OVERHEAD_WORST_BAR, "the worst error of overheads of per-layer"),
        ):
            if each[name] is not None and each[name] > bar:
                sentences.append(f"{origin}: {what} is {100 * each[name]:.1f} %, over {100 * bar:g} %")
        for name, what in (("in_band", "step times"), ("overheads_in_band", "overheads")):
            if each[name] is not None and each[name] < COVERAGE_BAR:
                sentences.append(f"{origin}: {100 * each[name]:.0f} % of {what} are in their bands, under 80 %")
    return sentences


def show(each: dict[str, Any]) -> None:
    """Print a step: predicted and published time, and the error."""
    times = f"{1e3 * each['predicted_s']:9.1f} / {1e3 * each['published_s']:9.1f} ms"
    band = "" if each["in_band"] else "  outside its band"
    print(f"{each['id']:48} {times} {100 * each['error']:+7.1f} %{band}", flush=True)


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    expressed, reasons = steps()
    found: list[tuple[Step, StepTime]] = []
    for step in expressed:
        if wanted in step.id:
            time = predicted(step)
            if time is None:
                reasons["gcbench predicts no time for it"] += 1
                continue
            found.append((step, time))
            show(answer(step, time))
    answers, pairs = [answer(*each) for each in found], pairs_of(found)
    print("\noverheads: predicted (band), published")
    for pair in pairs:
        band = f"({100 * pair['low']:.0f} to {100 * pair['high']:.0f} %)"
        aside = f"  does not count: {pair['orientation']}" if pair["orientation"] else ""
        inside = "" if pair["in_band"] else "  outside its band"
        print(
            f"{pair['pair']:28} {pair['strategy']:20} {100 * pair['predicted']:5.1f} % {band:16} "
            f"{100 * pair['published']:5.1f} %{inside}{aside}"
        )
    print(f"\n{reasons.total()} rows that are not compared:")
    for reason, count in reasons.most_common():
        print(f"{count:5} {reason}")
    seen = figures(answers, pairs)
    print(f"\n{json.dumps(seen, indent=1)}")
    sentences = missed(seen)
    compared = {
        "figures": seen,
        "not_compared": dict(reasons.most_common()),
        "missed": sentences,
        "pairs": pairs,
        "rows": answers,
    }
    conclude(None if wanted else STORED, compared)


if __name__ == "__main__":
    main()
