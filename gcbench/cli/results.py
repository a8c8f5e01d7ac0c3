"""Runs `gcbench report` and `gcbench compare` on stored runs, predictions, plans and checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gcbench.check import view as check_view
from gcbench.check.stored import load_check
from gcbench.core import streams
from gcbench.core import text_table as screen
from gcbench.core.errors import ThresholdBroken, UsageError
from gcbench.core.files import write_text
from gcbench.dry_run import view as dry_run_view
from gcbench.dry_run.stored import load_dry_run
from gcbench.plan import compare as comparing_plans
from gcbench.plan import view as plan_view
from gcbench.plan.stored import load_plan
from gcbench.report import formats, stored_kind
from gcbench.report import report_file as reports
from gcbench.report.formats.json_rows import print_rows


def compare(a: Path, b: Path, *, fail_on: Sequence[str], force: bool, as_json: bool) -> None:
    """Print what changed between two runs, predictions or plans; raises ThresholdBroken when B exceeds a --fail-on."""
    from gcbench.report import compare as comparing

    mistakes: list[str] = []
    thresholds: dict[str, float] = {}
    for text in (part for item in fail_on for part in item.split(",")):
        try:
            name, share = comparing.parse_threshold(text)
            thresholds[name] = share
        except ValueError as err:
            mistakes.append(f"--fail-on: {err}")
    if mistakes:
        raise UsageError.of(mistakes)
    if _are_plans(a, b):
        _compare_plans(a, b, thresholds, force=force, as_json=as_json)
        return
    both = reports.load(a), reports.load(b)
    untimed = [place for place, each in zip((a, b), both, strict=True) if each.source != "measured"]
    if "time" in thresholds and untimed:
        raise UsageError(
            f"--fail-on time: {untimed[0]} has no times, as nothing was timed there; leave it out, or compare runs"
        )
    comparison = comparing.compare(*both, force=force)
    if as_json:
        print_rows(comparing.to_rows(comparison))
    else:
        screen.show(comparing.render(comparison))
    broken = comparing.broken(comparison, thresholds)
    if broken:
        raise ThresholdBroken("; ".join(broken))


def report(folder: Path, *, format: str, out: Path | None) -> None:
    """Render a stored run, prediction, plan, check or dry run to standard output or `out`."""
    legal = (*formats.names(), "png")
    if format not in legal:
        raise UsageError(f"--format {format!r} is unknown; legal are {', '.join(legal)}")
    kind = stored_kind.kind_of(folder)
    if kind != "run":
        _report_stored(folder, kind, format=format, out=out)
        return
    report = reports.load(folder)
    if format == "png":
        from gcbench.report.plots.run_plots import draw, remove_stale

        target = out or reports.report_path(folder).parent / "plots"
        with _writable(target):
            for path in draw(report, target):
                print(path)
            if out is None:
                remove_stale(report, target)
        return
    if out is not None:
        with _writable(out):
            write_text(out, formats.get(format).render(report))
        return
    if format == "terminal":
        from gcbench.report.formats import terminal

        terminal.show(report)
        return
    text = formats.get(format).render(report)
    if format == "json":
        streams.print_json(text)
    else:
        print(text, end="")


def _report_stored(folder: Path, kind: str, *, format: str, out: Path | None) -> None:
    """Render a stored plan, check or dry run."""
    place = folder.parent if folder.suffix == ".json" else folder
    if kind == "plan":
        planned = load_plan(folder)
        if format == "png":
            from gcbench.plan import plot

            with _writable(target := out or place / "plots"):
                print(plot.draw(planned, target))
            return
        if format == "terminal" and out is None:
            plan_view.show_stored(planned)
            return
        text = plan_view.rendered(planned, format)
    elif kind == "dry-run":
        seen = load_dry_run(folder)
        if format not in ("terminal", "json"):
            raise UsageError(f"--format {format}: a dry run is shown as terminal or json")
        if format == "terminal" and out is None:
            dry_run_view.show(seen)
            return
        text = dry_run_view.document(seen) if format == "json" else dry_run_view.text(seen, width=100)
    else:
        check = load_check(folder)
        if format == "png":
            raise UsageError("--format png: a check has no plots; use terminal, markdown, csv or json")
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
    with _writable(out):
        write_text(out, text)


_NOT_COMPARED = {
    "check": "a check, which has no figures",
    "dry-run": "a dry run of one script, which has no cells",
}


def _are_plans(a: Path, b: Path) -> bool:
    """Return whether both are plans; raises UsageError for results that cannot be compared."""
    kinds = [stored_kind.kind_of(place) for place in (a, b)]
    for kind, what in _NOT_COMPARED.items():
        if kind in kinds:
            raise UsageError(f"{(a, b)[kinds.index(kind)]} is {what} to compare; pass two runs")
    measured = [(place.parent if place.suffix == ".json" else place) / reports.REPORT_NAME for place in (a, b)]
    if kinds.count("plan") == 1 and not measured[kinds.index("plan")].exists():
        raise UsageError(
            f"{(a, b)[kinds.index('plan')]} is a plan and the other is not; compare two plans, or two runs or "
            "predictions"
        )
    return kinds == ["plan", "plan"]


def _compare_plans(a: Path, b: Path, thresholds: Mapping[str, float], *, force: bool, as_json: bool) -> None:
    """Print what changed between two plans; raises ThresholdBroken when B exceeds one of `thresholds`."""
    plans = load_plan(a), load_plan(b)
    changes = comparing_plans.compare(*plans, force=force)
    broken = comparing_plans.broken(changes, thresholds)
    if as_json:
        print_rows(comparing_plans.to_rows(changes))
    else:
        screen.show(list(comparing_plans.render(*plans, changes)))
    if broken:
        raise ThresholdBroken("; ".join(broken))


@contextmanager
def _writable(place: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `--out`, into a UsageError."""
    try:
        yield
    except OSError as err:
        raise UsageError(f"--out {place} cannot be written ({err.strerror}); choose another --out") from None
