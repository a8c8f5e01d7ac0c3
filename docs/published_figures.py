"""The tables of published figures, computed from results/reference; `write_pages.py` puts them on the pages."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"


def accuracy(_: str) -> str:
    """Return how far off predictions, plans and proofs are."""
    grids = stored("accuracy")["truths"]
    card = grids["truth-nvidia-h100-80gb-hbm3"]
    cpus = [grid["figures"] for name, grid in grids.items() if "-cpu-" in name]
    seen = card["figures"]
    here = f"H100, torch {card['machine']['versions']['torch'].partition('+')[0]}"
    workloads = len({each["case"] for each in card["errors"]})
    cells = f"{seen['cells']} cells, {workloads} workloads"
    if missing := seen["without a prediction"]:
        cells = f"{seen['cells'] - missing} of {cells}"
    scores = choices()
    speeds = [score.speed_frac for score in scores]
    trained, types = families()
    on_cpu = sum(each["cells"] for each in cpus)
    return markdown_table(
        ["figure", "compared with", "cases", "error", "not validated"],
        [
            [
                "peak, CUDA",
                here,
                cells,
                f"allocated: median {_percent(seen['median'], 4)}, worst {_percent(seen['worst'], 3)}; reserved: "
                f"median {_percent(seen['reserved, median'], 3)}, worst {_percent(seen['reserved, worst'], 1)}; "
                f"right phase in {_percent(seen['phases'])}",
                "other real cards",
            ],
            *(
                _emulated(what, found, release)
                for what, prefix in (("emulated cards", "truth-emulated-"), ("plain loops there", "truth-loops-"))
                for release in ("2.13", "2.11")
                if (found := _emulated_grids(grids, prefix, release))
            ),
            [
                "peak, CPU",
                "two processors",
                f"{on_cpu} cells",
                f"worst {_percent(max(each['worst'] for each in cpus), 4)}; "
                f"right phase in {_percent(min(each['phases'] for each in cpus))}",
                "other processors",
            ],
            [
                "the choice of `plan`",
                "all settings measured, CPU",
                f"{len(scores)} budgets",
                f"fits in {sum(score.fits for score in scores)}; speed over the best: "
                f"median {_percent(statistics.median(speeds), 1)}, worst {_percent(min(speeds), 1)}",
                "choices on a card",
            ],
            _times(),
            [
                "gradients",
                "`off`, CPU, scaled down",
                f"{types} model types",
                f"{trained} train with those of `off` under every strategy but `reentrant`; the others cannot be tried",
                "full size",
            ],
        ],
    )


def _times() -> list[str]:
    """Return how far off predicted step times and overheads of cards are."""
    found = stored("published-times")["figures"]
    published, own = found["published"], found["own"]

    def both(name: str, places: int) -> str:
        return f"{_percent(published[name], places)} and {_percent(own[name], places)}"

    def points(name: str) -> str:
        return f"{100 * published[name]:.1f} and {100 * own[name]:.1f}"

    return [
        "step time, cards",
        "published steps, 5 cards; own, H100",
        f"{published['steps']} and {own['steps']} steps",
        f"median {both('median', 1)}; in the band {both('in_band', 0)}; overhead of `per-layer`: median "
        f"{points('overhead_median')} points, worst {points('overhead_worst')}",
        "AMD cards; Windows; full fp32",
    ]


def _emulated_grids(grids: dict[str, Any], prefix: str, release: str) -> list[dict[str, Any]]:
    """The figures of each emulated card under a release of torch, of the grids whose names begin so."""
    return [
        grid["figures"] for name, grid in grids.items() if name.startswith(prefix) and name.endswith(f"-torch{release}")
    ]


def _emulated(what: str, found: list[dict[str, Any]], release: str) -> list[str]:
    cells = sum(each["cells"] for each in found)
    ran = [each["cells"] - each["ran out"] for each in found]

    worst, worst_reserved = (max(each[name] for each in found) for name in ("worst", "reserved, worst"))

    def share(name: str) -> str:
        return _percent(sum(each[name] * count for each, count in zip(found, ran, strict=True)) / sum(ran), 1)

    return [
        f"peak, {what}",
        f"{len(found)} {'card' if len(found) == 1 else 'cards'}, torch {release}",
        f"{cells:,} cells",
        f"allocated: to the byte in {share('allocated equal')}, worst {_percent(worst, 3)}; "
        f"reserved: to the byte in {share('reserved equal')}, worst {_percent(worst_reserved, 2)}",
        "what is outside PyTorch's allocator",
    ]


def _percent(fraction: float, places: int = 0) -> str:
    return f"{100 * fraction:.{places}f} %"


def frontier(_: str) -> str:
    """Return the predicted extra time of plans for Llama-3.1-8B, as a share of per-layer's, at two memory budgets."""
    curves = stored("plan-frontier")
    methods = {
        "found": "searched plan",
        "bound": "linear program's bound",
        "layer_counts": "best subset of layers",
        "activation_memory_budget": "torch's `activation_memory_budget`",
        "sac_ilp": "torch's SAC ILP",
    }
    lines = []
    for workload in curves["workloads"]:
        model, precision, card = workload["workload"].split(" ")
        if model == "llama-3.1-8b":
            for way in (0.25, 0.5):
                place = curves["ways"].index(way)
                shares = [_percent(workload["curves"][name][place]) for name in methods]
                lines.append([card, precision, _percent(way), *shares])
    return markdown_table(["card", "precision", "memory", *methods.values()], lines)


def frontier_measured(_: str) -> str:
    """Return the extra time of plans for a small Llama, measured on a CPU."""
    rows = stored("plan-frontier")["measured"]["rows"]
    peaks = {row["plan"]: row["peak_bytes"] for row in rows}
    low, high = peaks["per-layer"], peaks["off"]
    lines = []
    for row in sorted(rows, key=lambda row: row["peak_bytes"]):
        seen = row["overhead"]
        name = "searched plan" if row["plan"].startswith("found") else f"`{row['plan']}`"
        interval = f"{_percent(seen['centre'])} ({100 * seen['low']:.0f} to {_percent(seen['high'])})"
        same = "bit for bit" if row["same_gradients"] else "no"
        memory = _percent((row["peak_bytes"] - low) / (high - low))
        lines.append([memory, name, interval, _percent(row["predicted_overhead"]), same])
    header = ["memory", "plan", "extra time (95 %)", "predicted", "gradients of `off`"]
    return markdown_table(header, lines)


def choices() -> list[Any]:
    """Return the scores of all choices of the planner, from `benchmarks/regret.py`."""
    sys.path.append(str(ROOT / "benchmarks"))
    try:
        import regret_scores
    finally:
        sys.path.pop()
    workloads = stored("regret-cpu-intel-xeon")["workloads"].values()
    return [score for workload in workloads for score in regret_scores.scores(workload)]


def families() -> tuple[int, int]:
    """Count the types of causal LMs that train with the gradients of `off` under every strategy that they support but
    `reentrant`, and all types."""
    types = stored("families")["types"]
    same = {"identical", "within noise"}
    good = 0
    for each in types:
        verdicts = [row["verdict"] for row in each.get("rows", ()) if row["strategy"] != "reentrant"]
        tried = {verdict for verdict in verdicts if verdict != "unsupported"}
        good += bool(tried) and tried <= same
    return good, len(types)


def stored(name: str) -> dict[str, Any]:
    """Read results/reference/NAME.json."""
    found: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table; vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
