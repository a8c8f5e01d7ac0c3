"""The evidence of a check's training steps: gradients, layers that ran, and how much runs of `off` differ."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.utils import logging as transformers_logging

from gcbench.checkpointing import apply as checkpointing
from gcbench.report.rows import is_repeatable

NUM_STEPS = 2
"""The second step shows the effect of the first one's update."""
_EXTRA_RUNS = 2
"""Further runs of `off` before a verdict of WRONG: code that rarely draws random numbers may repeat itself once."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step, on the CPU.

    Attributes:
        by_name: parameter -> its gradient.
        missing: trained parameters without one.
    """

    by_name: dict[str, torch.Tensor]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Gradients:
        """Copy the gradients of a model's parameters."""
        trained = [(name, param.grad) for name, param in model.named_parameters() if param.requires_grad]
        return cls(
            {name: grad.to("cpu", copy=True) for name, grad in trained if grad is not None},
            tuple(name for name, grad in trained if grad is None),
        )

    @classmethod
    def without_values(cls, model: torch.nn.Module) -> Gradients:
        """Note which parameters have no gradient, on an emulated card, where gradients have no values."""
        return cls({}, tuple(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None))

    @property
    def is_finite(self) -> bool:
        return all(bool(grad.isfinite().all()) for grad in self.by_name.values())

    def difference(self, reference: Gradients) -> tuple[float, str | None]:
        """Return the L2 norm of the difference, relative to that of `reference`, and the parameter that differs most.

        0 for bit-identical gradients; infinite where other parameters have one.
        """
        if self.by_name.keys() != reference.by_name.keys():
            return math.inf, min(self.by_name.keys() ^ reference.by_name.keys())
        squared = {
            name: float((grad.double() - reference.by_name[name].double()).square().sum())
            for name, grad in self.by_name.items()
            if not torch.equal(grad, reference.by_name[name])
        }
        if not squared:
            return 0.0, None
        norm = sum(float(grad.double().square().sum()) for grad in reference.by_name.values())
        return math.sqrt(sum(squared.values()) / norm) if norm else math.inf, max(squared, key=squared.__getitem__)


@dataclass
class Evidence:
    """The evidence of two steps; `recomputed` and `backward` are of the first, as later steps may drop other layers."""

    gradients: list[Gradients] = field(default_factory=list)
    recomputed: int | None = None
    ran: checkpointing.LayersRun = field(default_factory=checkpointing.LayersRun)
    backward: frozenset[int] = frozenset()
    draws_outside_torch: bool = False
    warnings: list[str] = field(default_factory=list)
    steps_s: float = 0.0


@dataclass
class Reference:
    """The run of `off` in one setting.

    Attributes:
        noise: for each step, the largest difference between the first run and the others.
        extra_runs: how many more runs may be made to find out whether `off` repeats itself.
    """

    model: torch.nn.Module
    seen: Evidence
    noise: list[float] = field(default_factory=lambda: [0.0] * NUM_STEPS)
    extra_runs: int = _EXTRA_RUNS

    def compare(self, again: Evidence) -> None:
        """Update the noise by another run of `off`."""
        differences = [a.difference(b)[0] for a, b in zip(again.gradients, self.seen.gradients, strict=True)]
        self.noise = [max(pair) for pair in zip(self.noise, differences, strict=True)]

    def repeats(self, precision: str, device: str) -> bool:
        """Whether the differences between runs can be roundoff.

        Where the first step is bit-identical, the second must be, too; otherwise only the first counts, as an optimizer
        that divides by the size of a gradient amplifies its roundoff.
        """
        first, second = self.noise
        return is_repeatable(first, precision, device) and (first > 0 or is_repeatable(second, precision, device))

    def how_it_differs(self) -> str:
        """Say how much runs differ, in a clause."""
        largest = max(self.noise)
        what = f"its gradients differ by {largest:.2g}" if math.isfinite(largest) else "other parameters get gradients"
        return f"with the same weights, batch and seeds {what}"


@contextmanager
def noted_warnings(into: list[str]) -> Iterator[None]:
    """Collect warnings, Python's and those that libraries log, in a list instead of showing them."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    handler = Handler(level=logging.WARNING)
    transformers_logging.warning_once.cache_clear()
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        into.extend(str(warning.message) for warning in caught)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
