"""Does checkpointing work for every type of causal LM that transformers has? `gcbench check`, scaled down, on each.

    python benchmarks/families.py            all types; what is stored already is not done again
    python benchmarks/families.py llama      these types, and nothing is stored

A type has a verdict when its check ended with one for every combination, without a crash: that checkpointing works,
that it is wrong, that `off` does not repeat itself, or that the model or this machine cannot do it, with the reason.
Writes families.json and families.md into results/reference. The bar: 150 types.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from coverage import types

from gcbench.check import session as check_session
from gcbench.check.cases import FAILED, IDENTICAL, NOT_REPEATABLE, UNSUPPORTED, WITHIN_NOISE, WRONG, rows
from gcbench.core.errors import GcbenchError
from gcbench.core.files import write_text
from gcbench.models.sources import ModelSource
from gcbench.processes.children import ForkedChildren

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
STRATEGIES = ("per-layer", "every:2", "segment:2", "first:1", "selective:attention", "selective:matmul", "reentrant")
BAR = 150
TIMEOUT_S = 180.0
MARKS = {
    IDENTICAL: "=",
    WITHIN_NOISE: "≈",
    WRONG: "**WRONG**",
    FAILED: "failed",
    NOT_REPEATABLE: "?",
    UNSUPPORTED: "–",
}
CRASHES = ("process", "still running")
"""How a message begins whose child did not end by itself."""


def examine(name: str, values: dict[str, Any], children: ForkedChildren) -> dict[str, Any]:
    """What became of one type."""
    if not values:
        return {"type": name, "built": False, "why": "its config has no defaults"}
    source = ModelSource(name=name, origin="", config=json.loads(json.dumps(values, default=str)), location="")
    wanted = check_session.CheckOptions(
        model=name, strategies=STRATEGIES, precisions=("fp32", "bf16"), device="cpu", seq_len=16, timeout_s=TIMEOUT_S
    )
    begin = time.perf_counter()
    try:
        check = check_session.run(wanted, source=source, children=children, command="families")
    except GcbenchError as err:
        return {"type": name, "built": False, "why": str(err)}
    return {
        "type": name,
        "built": True,
        "num_params": check.num_params,
        "num_layers": check.num_layers,
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": [
            {
                key: getattr(row, key)
                for key in (
                    "strategy",
                    "precision",
                    "verdict",
                    "grad_rel_diff",
                    "worst_param",
                    "layers_expected",
                    "layers_recomputed",
                    "message",
                    "cause",
                )
            }
            for row in rows(check)
        ],
    }


def crashed(entry: dict[str, Any]) -> bool:
    """Whether a child was lost."""
    return any(
        row["verdict"] == FAILED and any(word in (row["message"] or "") for word in CRASHES)
        for row in entry.get("rows", [])
    )


def markdown(entries: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The table, and beneath it what is not equal."""
    lines = [
        "# Does checkpointing work for every type of causal LM?",
        "",
        f"`python benchmarks/families.py`, transformers {versions['transformers']}, torch {versions['torch']}, on a "
        "CPU. Each type is scaled down; gradients are compared with those of `off`, in fp32 / bf16: = bit-identical, ≈ "
        "within the noise of the kernels, ? `off` does not repeat itself, – not possible.",
        "",
        "| type | layers | " + " | ".join(f"`{name}`" for name in STRATEGIES) + " |",
        "| --- | ---: |" + " :-: |" * len(STRATEGIES),
    ]
    notes: list[str] = []
    for entry in entries:
        if not entry["built"]:
            notes.append(f"- {entry['type']}: {entry['why']}")
            continue
        cells = []
        for strategy in STRATEGIES:
            here = [row for row in entry["rows"] if row["strategy"] == strategy]
            marks = [MARKS[row["verdict"]] for row in here]
            cells.append(marks[0] if len(set(marks)) == 1 else " / ".join(marks))
        lines.append(f"| {entry['type']} | {entry['num_layers']} | " + " | ".join(cells) + " |")
        said: dict[str, list[str]] = {}
        for row in entry["rows"]:
            if row["message"]:
                told = row["message"] + (f". {row['cause']}" if row["cause"] else "")
                said.setdefault(told, []).append(f"{row['strategy']} {row['precision']}")
        notes += [f"- {entry['type']}: {_where(where)}: {message}" for message, where in said.items()]
    return "\n".join([*lines, "", "## What is not equal, and why", "", *notes]) + "\n"


def _where(where: list[str]) -> str:
    return "all" if len(where) == 2 * len(STRATEGIES) else ", ".join(where)


def main() -> None:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    path = REFERENCE / "families.json"
    chosen = sys.argv[1:]
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not chosen else {}
    results: dict[str, dict[str, Any]] = {entry["type"]: entry for entry in stored.get("types", [])}
    known = types()
    todo = [name for name in known if (name in chosen if chosen else name not in results)]
    with ForkedChildren() as children:
        for name in todo:
            results[name] = entry = examine(name, known[name], children)
            counts: dict[str, int] = {}
            for row in entry.get("rows", []):
                counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
            told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or entry.get("why")
            print(f"{name:28} {entry.get('seconds', '–'):>6} s  {told}", flush=True)
            if chosen:
                for row in entry.get("rows", []):
                    if row["message"]:
                        print(f"    {row['strategy']} {row['precision']}: {row['message']}")
            else:
                ordered = [results[name] for name in sorted(results)]
                document = {"command": "python benchmarks/families.py", "versions": versions, "types": ordered}
                write_text(path, json.dumps(document, indent=1) + "\n")
                write_text(path.with_suffix(".md"), markdown(ordered, versions))
    entries = list(results.values())
    done = [entry for entry in entries if entry["built"] and not crashed(entry)]
    wrong = [entry["type"] for entry in done if any(row["verdict"] == WRONG for row in entry["rows"])]
    open_ = [entry["type"] for entry in done if any(row["verdict"] == NOT_REPEATABLE for row in entry["rows"])]
    if open_:
        print(f"{len(open_)} do not repeat themselves: {', '.join(open_)}")
    print(
        f"{len(done)} of {len(entries)} types have a verdict; {len(wrong)} have one that is WRONG: {', '.join(wrong)}"
    )
    if not chosen and len(done) < BAR:
        sys.exit(f"the bar is {BAR}")


if __name__ == "__main__":
    main()
