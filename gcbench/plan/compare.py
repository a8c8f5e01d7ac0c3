"""Compares two stored plans: their choices, and every candidate of either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gcbench.core.errors import UsageError
from gcbench.core.text_table import UNKNOWN, Column, Table
from gcbench.core.units import format_bytes, format_percent
from gcbench.plan.decision import Candidate

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gcbench.plan.planned import PlanResult


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """One strategy at one batch size; fractions are of A's value. None where a plan did not evaluate it.

    Attributes:
        fits_a, fits_b: whether the peak is within the usable memory.
        peak_is_lower_bound: whether one of the peaks is a lower bound.
    """

    strategy: str
    batch_size: int
    fits_a: bool | None
    fits_b: bool | None
    is_choice_a: bool
    is_choice_b: bool
    peak_a_bytes: int | None
    peak_b_bytes: int | None
    memory_change_frac: float | None
    tokens_per_s_a: float | None
    tokens_per_s_b: float | None
    tokens_per_s_change_frac: float | None
    peak_is_lower_bound: bool


def compare(a: PlanResult, b: PlanResult, *, force: bool) -> tuple[PlanChange, ...]:
    """The candidates of both plans, the choices first.

    Raises UsageError where the models differ or no candidate is common, unless `force`.
    """
    if a.name != b.name and not force:
        raise UsageError(f"the plans are for different models (A: {a.name}, B: {b.name}); add --force to compare them")
    of_a, of_b = _settings(a), _settings(b)
    if not of_a.keys() & of_b.keys() and not force:
        raise UsageError("the plans have no setting in common; plan with the same --batch and --strategies")
    keys = sorted(dict.fromkeys((*of_a, *of_b)), key=lambda key: not _is_choice(key, a) and not _is_choice(key, b))
    return tuple(_change(key, of_a.get(key), of_b.get(key), a, b) for key in keys)


def _settings(planned: PlanResult) -> dict[tuple[str, int], Candidate]:
    return {(each.strategy, each.batch_size): each for each in reversed(planned.decision.candidates)}


def _is_choice(key: tuple[str, int], planned: PlanResult) -> bool:
    choice = planned.decision.choice
    return choice is not None and key == (choice.strategy, choice.batch_size)


def _change(
    key: tuple[str, int], a: Candidate | None, b: Candidate | None, plan_a: PlanResult, plan_b: PlanResult
) -> PlanChange:
    both = a is not None and b is not None
    bound = any(each is not None and each.is_lower_bound for each in (a, b))
    return PlanChange(
        strategy=key[0],
        batch_size=key[1],
        fits_a=a.fits if a else None,
        fits_b=b.fits if b else None,
        is_choice_a=_is_choice(key, plan_a),
        is_choice_b=_is_choice(key, plan_b),
        peak_a_bytes=a.peak_bytes if a else None,
        peak_b_bytes=b.peak_bytes if b else None,
        memory_change_frac=b.peak_bytes / a.peak_bytes - 1 if both and not bound else None,  # type: ignore[union-attr]
        tokens_per_s_a=a.tokens_per_s if a else None,
        tokens_per_s_b=b.tokens_per_s if b else None,
        tokens_per_s_change_frac=b.tokens_per_s / a.tokens_per_s - 1 if both else None,  # type: ignore[union-attr]
        peak_is_lower_bound=bound,
    )


def broken(changes: tuple[PlanChange, ...], thresholds: Mapping[str, float]) -> list[str]:
    """The memory thresholds that B exceeds, a sentence per candidate; raises UsageError for a threshold of time."""
    if "time" in thresholds:
        raise UsageError("--fail-on time: a plan's times are estimates; leave it out, or compare runs")
    limit = thresholds.get("memory")
    if limit is None:
        return []
    return [
        f"{each.strategy} at batch {each.batch_size}: the peak grew by {format_percent(each.memory_change_frac)}, and "
        f"{100 * limit:g} % is allowed"
        for each in changes
        if each.memory_change_frac is not None and each.memory_change_frac > limit
    ]


def to_rows(changes: tuple[PlanChange, ...]) -> list[dict[str, object]]:
    """The rows of --json."""
    return [asdict(each) for each in changes]


def render(a: PlanResult, b: PlanResult, changes: tuple[PlanChange, ...]) -> list[RenderableType]:
    """For the terminal: workload and choice of each plan, and a table of the candidates."""
    from rich.text import Text

    return [*(Text(f"{name}: {_headline(each)}") for name, each in (("A", a), ("B", b))), Text(""), _table(changes)]


def _headline(planned: PlanResult) -> str:
    settings, choice = planned.settings, planned.decision.choice
    what = f"{planned.name} · {planned.seq_len} tokens · {settings.precision} · {settings.optim} on {planned.where}"
    if choice is None:
        return f"{what}: nothing fits into {format_bytes(planned.decision.usable_bytes)}"
    return f"{what}: {choice.strategy} at batch {choice.batch_size}, peak {choice.peak_text}"


def _table(changes: tuple[PlanChange, ...]) -> Table:
    def peak(nbytes: int | None, fits: bool | None) -> str:
        return UNKNOWN if nbytes is None else f"{format_bytes(nbytes)}{'' if fits else ' (does not fit)'}"

    def percent(frac: float | None) -> str:
        return UNKNOWN if frac is None else format_percent(frac, sign=True)

    def chosen(each: PlanChange) -> str:
        names = [name for name, is_it in (("A", each.is_choice_a), ("B", each.is_choice_b)) if is_it]
        return " and ".join(names)

    return Table(
        title="Settings of both plans",
        columns=(
            Column(header="strategy", cells=tuple(each.strategy for each in changes), right=False),
            Column(header="batch", cells=tuple(str(each.batch_size) for each in changes)),
            Column(header="peak A", cells=tuple(peak(each.peak_a_bytes, each.fits_a) for each in changes), drop=1),
            Column(header="peak B", cells=tuple(peak(each.peak_b_bytes, each.fits_b) for each in changes), drop=1),
            Column(header="Δ memory", cells=tuple(percent(each.memory_change_frac) for each in changes)),
            Column(header="Δ tokens/s", cells=tuple(percent(each.tokens_per_s_change_frac) for each in changes)),
            Column(header="chosen by", cells=tuple(map(chosen, changes)), right=False),
        ),
    )
