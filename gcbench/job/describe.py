"""Describes the machine and the model, by a child process that imports torch. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from gcbench import strategies
from gcbench.core.model_changes import ChangedConfig
from gcbench.core.records import Json, Lora, Machine, ModelFacts
from gcbench.devices.target import Target
from gcbench.job.settings import Settings
from gcbench.models.sources import ModelSource
from gcbench.processes.children import Children
from gcbench.processes.messages import raise_refusal


@dataclass(frozen=True, kw_only=True)
class DescribeTask:
    """Describe the device and, with `source`, the model; measure nothing.

    Attributes:
        operators: operators that strategies name; unknown ones are refused.
        needs_order: whether a strategy numbers layers in the order in which they run.
        needs_changes: whether to report what `layers` and `overrides` change in the config.
        target: the device to predict for; None to measure on this machine, or only to describe it.
    """

    handler: ClassVar[str] = "gcbench.job.describe_worker:describe"

    device: str
    source: ModelSource | None = None
    layers: int | None = None
    overrides: dict[str, Json] = field(default_factory=dict)
    attn_implementation: str | None = None
    lora: Lora | None = None
    operators: tuple[str, ...] = ()
    needs_order: bool = False
    needs_changes: bool = False
    target: Target | None = None


_DESCRIBE_TIMEOUT_S = 600.0


def describe(
    settings: Settings,
    source: ModelSource,
    children: Children,
    *,
    needs_order: bool = False,
    target: Target | None = None,
) -> tuple[Machine, ModelFacts]:
    """Describe the machine and the model in a child process; raises the child's refusal as an error.

    Args:
        needs_order: find the order in which layers run even where no strategy numbers them so.
        target: the device to predict for; the model is described as it is traced for it.
    """
    answer = children.run(
        DescribeTask(
            device=settings.device,
            source=source,
            layers=settings.layers,
            overrides=settings.set or {},
            attn_implementation=settings.attn_implementation,
            lora=settings.lora,
            operators=operators(settings.strategies or ()),
            needs_order=needs_order or any(strategies.parse(spec).counts_run for spec in settings.strategies or ()),
            target=target,
        ),
        on_event=lambda event: None,
        timeout_s=_DESCRIBE_TIMEOUT_S,
    )
    raise_refusal(answer)
    assert answer.machine is not None and answer.facts is not None
    return answer.machine, answer.facts


def changed_config(settings: Settings, source: ModelSource, children: Children) -> ChangedConfig | None:
    """Find in a child process what `--layers` and `--set` change in the model's config; None without them."""
    if settings.layers is None and not settings.set:
        return None
    answer = children.run(
        DescribeTask(
            device="cpu", source=source, layers=settings.layers, overrides=settings.set or {}, needs_changes=True
        ),
        on_event=lambda event: None,
        timeout_s=_DESCRIBE_TIMEOUT_S,
    )
    raise_refusal(answer)
    return answer.changed


def operators(specs: Iterable[str]) -> tuple[str, ...]:
    """List the operators that strategies name."""
    parsed = [strategies.parse(spec) for spec in specs]
    return tuple(dict.fromkeys(name for strategy in parsed for name in strategy.operators))
