"""Asks `gcbench predict` how long a step of the script's training would take on the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gcbench.dry_run import would_fit
from gcbench.dry_run.records import Observed, PredictedTime
from gcbench.strategies import OFF

_PER_LAYER, _REENTRANT = "per-layer", "per-layer+reentrant"


def predict(
    observed: Observed, device: Sequence[str], emulated: Mapping[str, str], *, num_cards: int
) -> PredictedTime | None:
    """Predict the time of a step of one micro-batch; None where the script trained nothing.

    Nothing is computed on the emulated card, so a time cannot be observed: it is that of the same model, batch and
    checkpointing in gcbench's own training step.

    Args:
        device: the flags that name the card.
        emulated: environment in which torch can be imported where it otherwise cannot.
    """
    if observed.num_steps == 0:
        return None
    strategy = strategy_of(observed)
    reason = would_fit.why_not_expressible(observed.workload) or _unlike(observed, strategy, num_cards)
    if reason is not None or strategy is None:
        return PredictedTime(why_not=reason)
    arguments = _arguments(observed, strategy, device)
    document = would_fit.run_gcbench(arguments, would_fit.importable(emulated))
    if isinstance(document, str):
        return PredictedTime(why_not=document)
    rows = document.get("rows")
    row = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    if row.get("step_time_s") is None:
        return PredictedTime(strategy=strategy, why_not="gcbench predict gives no time for this card")
    return PredictedTime(
        strategy=strategy,
        seconds=row["step_time_s"],
        low_s=row["step_time_low_s"],
        high_s=row["step_time_high_s"],
        tokens_per_s=row["tokens_per_s"],
        source=row["time_source"],
    )


def strategy_of(observed: Observed) -> str | None:
    """Return the strategy that does what was seen; None where gcbench has no name for it."""
    step = observed.busiest
    if step is None or not step.checkpointed:
        return OFF
    layers = observed.workload.num_layers
    if not layers or step.layers_checkpointed != layers:
        return None
    return _REENTRANT if observed.checkpoint_reentrant else _PER_LAYER


def _unlike(observed: Observed, strategy: str | None, num_cards: int) -> str | None:
    """Return what of the script has no counterpart in a prediction."""
    if num_cards > 1 or len(observed.by_card) > 1:
        return "several cards share the training, and their communication is not predicted"
    if strategy is None:
        return "only some of its layers, or other parts of it, are checkpointed"
    return None


def _arguments(observed: Observed, strategy: str, device: Sequence[str]) -> list[str]:
    workload = observed.workload
    assert workload.config is not None and workload.batch_size is not None
    settings = would_fit.settings(workload, Path(workload.config), [workload.batch_size])
    return ["predict", *settings, "--strategies", strategy, *device]
