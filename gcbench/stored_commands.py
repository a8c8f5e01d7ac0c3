"""What `report` and `compare` do with a stored plan or check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gcbench import check_view, plan_view, screen, stored, streams
from gcbench import compare_plans as comparing
from gcbench import report as reports
from gcbench.check_stored import load_check
from gcbench.errors import ThresholdBroken, UsageError
from gcbench.files import write_text
from gcbench.plan_stored import load_plan
from gcbench.records import SCHEMA


def report(folder: Path, kind: str, *, format: str, out: Path | None) -> None:
    """Render a stored plan or check."""
    place = folder.parent if folder.suffix == ".json" else folder
    if kind == "plan":
        planned = load_plan(folder)
        if format == "png":
            from gcbench import plan_plot

            with writable(target := out or place / "plots"):
                print(plan_plot.draw(planned, target))
            return
        if format == "terminal" and out is None:
            plan_view.show_stored(planned)
            return
        text = plan_view.rendered(planned, format)
    else:
        check = load_check(folder)
        if format == "png":
            raise UsageError("--format png: a check has no plots; take terminal, markdown, csv or json")
        if format == "terminal" and out is None:
            check_view.show(check)
            return
        text = check_view.rendered(check, format)
    if out is None:
        if format == "json":
            streams.print_json(text)
        else:
            print(text, end="")
        return
    with writable(out):
        write_text(out, text)


def are_plans(a: Path, b: Path) -> bool:
    """Whether both are plans; raises UsageError for what cannot be set side by side."""
    kinds = [stored.kind_of(place) for place in (a, b)]
    if "check" in kinds:
        raise UsageError(f"{(a, b)[kinds.index('check')]} is a check, which has no figures to compare; give two runs")
    measured = [(place.parent if place.suffix == ".json" else place) / reports.REPORT_NAME for place in (a, b)]
    if kinds.count("plan") == 1 and not measured[kinds.index("plan")].exists():
        raise UsageError(
            f"{(a, b)[kinds.index('plan')]} is a plan, and the other is none; compare two plans, or two runs or "
            "predictions"
        )
    return kinds == ["plan", "plan"]


def compare_plans(a: Path, b: Path, thresholds: Mapping[str, float], *, force: bool, as_json: bool) -> None:
    """Set two plans side by side; raises ThresholdBroken when one of `thresholds` is."""
    plans = load_plan(a), load_plan(b)
    changes = comparing.compare(*plans, force=force)
    broken = comparing.broken(changes, thresholds)
    if as_json:
        document = {"schema": SCHEMA, "rows": comparing.to_rows(changes)}
        streams.print_json(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    else:
        screen.show(list(comparing.render(*plans, changes)))
    if broken:
        raise ThresholdBroken("; ".join(broken))


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """A block that writes to `--out`; raises UsageError where it cannot be written."""
    try:
        yield
    except OSError as err:
        raise UsageError(f"--out {place} cannot be written ({err.strerror}); take another --out") from None
