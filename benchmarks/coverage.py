"""For how many causal-LM types of transformers there is a prediction, at their full default size.

    python benchmarks/coverage.py            all types; what is stored already is not done again
    python benchmarks/coverage.py llama      these types, and nothing is stored

A type counts when it builds from its default config, says that it supports checkpointing, and gets a prediction for
off, per-layer and every:2 (bf16, or fp32 where it refuses bf16). Writes results/reference/coverage.json. The bar: 155.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gcbench.core.errors import GcbenchError
from gcbench.core.files import write_text
from gcbench.devices.target import TargetOptions, resolve_target
from gcbench.job import settings as config
from gcbench.models.sources import ModelSource
from gcbench.predict import session as forecast
from gcbench.processes.children import ForkedChildren

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
STRATEGIES = ("off", "per-layer", "every:2")
BAR = 155
SEQ_LEN = 32
"""Enough for every type, and short for those that loop over it."""
TIMEOUT_S = 300.0


def types() -> dict[str, dict[str, Any]]:
    """Each type's default config, for those that have one."""
    import warnings

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = CONFIG_MAPPING[name]().to_dict() | {"model_type": name}
        except Exception:  # needs fields that have no default
            found[name] = {}
    return found


def cover(name: str, values: dict[str, Any], children: ForkedChildren) -> dict[str, Any]:
    """What became of one type: `refused`, `not built`, or the number of cells predicted and why others were not."""
    if not values:
        return {"type": name, "built": False, "why": "its config has no defaults"}
    source = ModelSource(name=name, origin="", config=json.loads(json.dumps(values, default=str)), location="")
    begin = time.perf_counter()
    result: dict[str, Any] = {"type": name}
    for precision in ("bf16", "fp32"):
        wanted = config.settings(
            {
                "model": name,
                "batch_size": 1,
                "seq_len": SEQ_LEN,
                "strategies": list(STRATEGIES),
                "precision": precision,
                "timeout": TIMEOUT_S,
            }
        )
        target_options = TargetOptions(device="cpu")
        try:
            report = forecast.forecast(
                wanted,
                target_options,
                resolve_target(target_options, None),
                source=source,
                children=[children],
                command="coverage",
            )
        except GcbenchError as err:
            return {"type": name, "built": False, "why": str(err)}
        refusal = report.model.checkpointing_refusal
        done = [outcome.cell.strategy for outcome in report.outcomes if outcome.prediction is not None]
        why = next((o.failure.message for o in report.outcomes if o.failure and not o.prediction), None)
        full = next((o.prediction.why_in_full for o in report.outcomes if o.prediction), None)
        result |= {
            "built": True,
            "refuses_checkpointing": refusal,
            "precision": precision,
            "predicted": done,
            "why": why,
            "traced_in_full": full,
            "seconds": round(time.perf_counter() - begin, 1),
        }
        if refusal is not None or len(done) == len(STRATEGIES):
            break
    return result


def main() -> None:
    path = REFERENCE / "coverage.json"
    chosen = sys.argv[1:]
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not chosen else {}
    results: dict[str, dict[str, Any]] = {entry["type"]: entry for entry in stored.get("types", [])}
    known = types()
    todo = [name for name in known if (name in chosen if chosen else name not in results)]
    import transformers

    def work(share: list[str], children: ForkedChildren) -> None:
        for name in share:
            results[name] = entry = cover(name, known[name], children)
            told = "predicted" if len(entry.get("predicted", ())) == len(STRATEGIES) else entry.get("why")
            print(f"{name:28} {entry.get('seconds', '–'):>7} s  {told}", flush=True)
            if not chosen:
                save(path, results, transformers.__version__)

    count = forecast.num_children()
    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        children = [stack.enter_context(ForkedChildren()) for _ in range(count)]
        shares = [pool.submit(work, todo[start::count], child) for start, child in enumerate(children)]
        for done in shares:
            done.result()
    able = [e for e in results.values() if e["built"] and not e["refuses_checkpointing"]]
    covered = [e for e in able if len(e["predicted"]) == len(STRATEGIES)]
    print(f"{len(covered)} of {len(able)} types that build from a default config and support checkpointing")
    if not chosen and len(covered) < BAR:
        sys.exit(f"the bar is {BAR}")


def save(path: Path, results: dict[str, dict[str, Any]], transformers_version: str) -> None:
    document = {
        "command": "python benchmarks/coverage.py",
        "transformers": transformers_version,
        "types": [results[name] for name in sorted(results)],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
