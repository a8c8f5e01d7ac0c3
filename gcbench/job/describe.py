"""What the machine and the model are, asked of a child process. No torch."""

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
    """Say what `device` is and, when `source` is given, what the model is; measure nothing."""

    handler: ClassVar[str] = "gcbench.job.describe_worker:describe"

    device: str
    source: ModelSource | None = None
    layers: int | None = None
    overrides: dict[str, Json] = field(default_factory=dict)
    attn_implementation: str | None = None
    lora: Lora | None = None
    operators: tuple[str, ...] = ()
    """Operators that strategies name, to be checked."""
    needs_order: bool = False
    """Whether a strategy counts layers in the order in which they run."""
    needs_changes: bool = False
    """Whether what `layers` and `overrides` come to in the config is to be told."""
    target: Target | None = None
    """What is predicted for; None where something runs here, and where only a look at the machine can tell."""


_DESCRIBE_TIMEOUT_S = 600.0


def describe(
    wanted: Settings,
    source: ModelSource,
    children: Children,
    *,
    needs_order: bool = False,
    target: Target | None = None,
) -> tuple[Machine, ModelFacts]:
    """The machine and the model, asked of a child; raises what the child would have raised.

    With `target`, the model as it is traced for it. With `needs_order` the order in which layers run is looked for even
    where no strategy counts them so.
    """
    answer = children.run(
        DescribeTask(
            device=wanted.device,
            source=source,
            layers=wanted.layers,
            overrides=wanted.set or {},
            attn_implementation=wanted.attn_implementation,
            lora=wanted.lora,
            operators=operators(wanted.strategies or ()),
            needs_order=needs_order or any(strategies.parse(spec).counts_run for spec in wanted.strategies or ()),
            target=target,
        ),
        on_event=lambda event: None,
        timeout_s=_DESCRIBE_TIMEOUT_S,
    )
    raise_refusal(answer)
    assert answer.machine is not None and answer.facts is not None
    return answer.machine, answer.facts


def changed_config(wanted: Settings, source: ModelSource, children: Children) -> ChangedConfig | None:
    """What `--layers` and `--set` come to in the model's config, asked of a child; None without them."""
    if wanted.layers is None and not wanted.set:
        return None
    answer = children.run(
        DescribeTask(device="cpu", source=source, layers=wanted.layers, overrides=wanted.set or {}, needs_changes=True),
        on_event=lambda event: None,
        timeout_s=_DESCRIBE_TIMEOUT_S,
    )
    raise_refusal(answer)
    return answer.changed


def operators(specs: Iterable[str]) -> tuple[str, ...]:
    """The operators that strategies name."""
    parsed = [strategies.parse(spec) for spec in specs]
    return tuple(dict.fromkeys(name for strategy in parsed for name in strategy.operators))
