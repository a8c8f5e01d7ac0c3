"""Predicts what others measured on real cards and published, and says how far off the predictions are.

    python benchmarks/published.py            every row that gcbench can express; no device needed
    python benchmarks/published.py powerlm    only those whose id contains this; stores nothing

Rows come from published-truth.json (published_rows.py says how they are expressed). Writes
results/reference/published.json. Allocated is compared with allocated, reserved with reserved, and what nvidia-smi
shows with the predicted memory of the process; that a run did or did not run out of memory, with whether it is
predicted to fit.

A row measured with other versions may need more or less than these versions do: `explained` gives what
published_loop.py allocates on an emulated card with the row's version of transformers (published-evidence.json).

Bars, by error of the row's own figure, for full training steps of completeness 5: 0.5 % in the median of all, and 3 %
in the worst; a row over 3 % has to be explained by evidence that comes within 0.5 % of what was published. Every
published run that trained has to be predicted to fit, and every one that ran out, not to. Exits with 1 when a bar is
missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from published_rows import HERE, Expressed, conclude, express, rows, runs_out
from truth import REFERENCE

STORED = REFERENCE / "published.json"
MEDIAN_BAR, WORST_BAR = 0.005, 0.03
COMPLETE = 5
_COLUMNS = {
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
    "process": "peak_process_bytes",
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One published figure beside its prediction."""

    measure: str
    published_bytes: int
    predicted_bytes: int

    @property
    def error(self) -> float:
        """Relative to what was published; negative where the prediction is too low."""
        return self.predicted_bytes / self.published_bytes - 1

    def as_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "published_bytes": self.published_bytes,
            "predicted_bytes": self.predicted_bytes,
            "error": round(self.error, 6),
        }


def predicted(expressed: Expressed) -> dict[str, Any]:
    """Run `gcbench predict` for a row and return its one row."""
    command = [sys.executable, "-m", "gcbench", "predict", *expressed.arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"gcbench predict {' '.join(expressed.arguments)}: {done.stderr.strip()}")
    (row,) = json.loads(done.stdout)["rows"]
    found: dict[str, Any] = row
    return found


def compare(expressed: Expressed, row: dict[str, Any]) -> list[Compared]:
    """Compare each published figure that the prediction has.

    Held outputs are added to what is allocated; what they add to the other figures is not known.
    """
    compared = []
    for figure in expressed.figures:
        nbytes = row[_COLUMNS[figure.measure]]
        if expressed.holds_outputs:
            nbytes = nbytes + (row["kept_outputs_add_bytes"] or 0) if figure.measure == "allocated" else None
        if nbytes is not None:
            compared.append(Compared(measure=figure.measure, published_bytes=figure.nbytes, predicted_bytes=nbytes))
    return compared


def answer(row: dict[str, Any], expressed: Expressed, evidence: dict[str, Any]) -> dict[str, Any]:
    """Predict one row and return what is stored of it."""
    forecast = predicted(expressed)
    compared = compare(expressed, forecast)
    oom = runs_out(row)
    explained = evidence.get(row["id"])
    if explained is not None:
        error = explained["allocated_bytes"] / expressed.figures[0].nbytes - 1
        explained = {**explained, "error": round(error, 6), "settled": abs(error) <= MEDIAN_BAR}
    return {
        "id": row["id"],
        "source": row["source"],
        "kind": row["kind"],
        "completeness": row["completeness"],
        "versions": row["versions"],
        "arguments": [argument.removeprefix(f"{HERE.parent}/") for argument in expressed.arguments],
        "notes": list(expressed.notes),
        "holds_outputs": expressed.holds_outputs,
        "compared": [each.as_json() for each in compared],
        "fits": None if oom is None else {"published": not oom, "predicted": forecast["fits"] != "no"},
        "explained": explained,
    }


def missed(answers: list[dict[str, Any]]) -> list[str]:
    """Return the bars that are missed, each as a sentence."""
    errors = complete(answers)
    sentences = []
    if errors and median(errors.values()) > MEDIAN_BAR:
        sentences.append(f"the median error is {100 * median(errors.values()):.3f} %, over {100 * MEDIAN_BAR} %")
    explained = {each["id"] for each in answers if each["explained"] is not None and each["explained"]["settled"]}
    for name, error in errors.items():
        if error > WORST_BAR and name not in explained:
            sentences.append(f"{name} is off by {100 * error:.2f} %, and nothing explains it")
    for each in answers:
        if each["fits"] is not None and each["fits"]["published"] != each["fits"]["predicted"]:
            sentences.append(f"{each['id']} is wrong about whether it fits")
    return sentences


def complete(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Return the absolute error of each full training step of which everything that decides memory is published."""
    return {
        each["id"]: abs(each["compared"][0]["error"])
        for each in answers
        if each["kind"] == "full_step" and each["completeness"] == COMPLETE and each["compared"]
    }


def figures(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the pages say of the complete rows; `worst_alike` leaves out those explained by other versions."""
    errors = complete(answers)
    explained = [each["id"] for each in answers if each["id"] in errors and each["explained"] is not None]
    alike = [error for name, error in errors.items() if name not in explained]
    by_version = [abs(each["explained"]["error"]) for each in answers if each["id"] in explained]
    return {
        "rows": len(errors),
        "median": median(errors.values()) if errors else None,
        "worst": max(errors.values(), default=None),
        "explained": len(explained),
        "worst_alike": max(alike, default=None),
        "worst_explained": max(by_version, default=None),
    }


def by_source(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return rows, median and worst error of each source, by the rows' own figures."""
    sources: dict[str, list[float]] = {}
    for each in answers:
        if each["compared"]:
            sources.setdefault(each["source"], []).append(abs(each["compared"][0]["error"]))
    return {
        source: {"rows": len(errors), "median": round(median(errors), 6), "worst": round(max(errors), 6)}
        for source, errors in sources.items()
    }


def show(each: dict[str, Any]) -> None:
    """Print a row: each figure as predicted / published and the error, and what explains it."""
    for figure in each["compared"]:
        gib = f"{figure['predicted_bytes'] / 2**30:8.3f} / {figure['published_bytes'] / 2**30:8.3f} GiB"
        print(f"{each['id']:44} {figure['measure']:9} {gib} {100 * figure['error']:+8.3f} %", flush=True)
    if each["explained"] is not None:
        seen = each["explained"]
        word = "explained" if seen["settled"] else "in part explained"
        print(
            f"{'':44} {word}: {100 * seen['error']:+.3f} % on an emulated card with "
            f"transformers {seen['transformers']}: {seen['because']}"
        )


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    evidence = json.loads((HERE / "published-evidence.json").read_text(encoding="utf-8"))
    answers, reasons = [], Counter[str]()
    for row in rows():
        expressed = express(row)
        if isinstance(expressed, str):
            reasons[expressed] += 1
        elif wanted in row["id"]:
            answers.append(answer(row, expressed, evidence))
            show(answers[-1])
    print()
    for source, found in by_source(answers).items():
        print(
            f"{source}: {found['rows']} rows, median {100 * found['median']:.3f} %, worst {100 * found['worst']:.3f} %"
        )
    print(f"\n{reasons.total()} rows that gcbench cannot express:")
    for reason, count in reasons.most_common():
        print(f"{count:5} {reason}")
    sentences = missed(answers)
    seen = figures(answers)
    if seen["rows"]:
        print(
            f"\nfull steps of completeness {COMPLETE}: {seen['rows']} rows, median {100 * seen['median']:.3f} %, "
            f"worst {100 * seen['worst']:.3f} %; {seen['explained']} of them are explained by their versions"
        )
    found = {
        "figures": seen,
        "by_source": by_source(answers),
        "not_expressible": dict(reasons.most_common()),
        "missed": sentences,
        "rows": answers,
    }
    conclude(None if wanted else STORED, found)


if __name__ == "__main__":
    main()
