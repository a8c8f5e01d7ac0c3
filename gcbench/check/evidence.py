"""What the training steps of a check showed: gradients, layers that ran, and how far `off` is from itself."""

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
"""The second shows what the first step's update made of it."""
_DOUBTS = 2
"""Further runs of `off` before a difference from it is believed: what draws seldom may agree with itself once."""


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
        """Copies of what the model's parameters hold."""
        trained = [(name, param.grad) for name, param in model.named_parameters() if param.requires_grad]
        return cls(
            {name: grad.to("cpu", copy=True) for name, grad in trained if grad is not None},
            tuple(name for name, grad in trained if grad is None),
        )

    @property
    def is_finite(self) -> bool:
        return all(bool(grad.isfinite().all()) for grad in self.by_name.values())

    def difference(self, reference: Gradients) -> tuple[float, str | None]:
        """The L2 norm of the difference over that of `reference`, and the parameter with the largest part in it.

        0 is for gradients that are equal bit by bit; infinite where other parameters have one.
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
class Seen:
    """What two steps showed; `recomputed` and `backward` are of the first, as others may drop other layers."""

    gradients: list[Gradients] = field(default_factory=list)
    recomputed: int | None = None
    ran: checkpointing.LayersRun = field(default_factory=checkpointing.LayersRun)
    backward: frozenset[int] = frozenset()
    draws_outside_torch: bool = False
    warnings: list[str] = field(default_factory=list)
    steps_s: float = 0.0


@dataclass
class Reference:
    """`off` in one setting, and how far other runs of it are from the first in each step, at most."""

    model: torch.nn.Module
    seen: Seen
    noise: list[float] = field(default_factory=lambda: [0.0] * NUM_STEPS)
    doubts: int = _DOUBTS

    def compare(self, again: Seen) -> None:
        """Take another run of `off` into account."""
        found = [a.difference(b)[0] for a, b in zip(again.gradients, self.seen.gradients, strict=True)]
        self.noise = [max(pair) for pair in zip(self.noise, found, strict=True)]

    def repeats(self, precision: str, device: str) -> bool:
        """Whether what changes from run to run can be roundoff.

        Where the first step repeats bit by bit, the second must, too; else an optimizer that divides by the size of a
        gradient makes more of its roundoff.
        """
        first, second = self.noise
        return is_repeatable(first, precision, device) and (first > 0 or is_repeatable(second, precision, device))

    def how_it_differs(self) -> str:
        """How far runs are apart, in a clause."""
        largest = max(self.noise)
        what = f"its gradients differ by {largest:.2g}" if math.isfinite(largest) else "other parameters get gradients"
        return f"with the same weights, batch and seeds {what}"


@contextmanager
def noted_warnings(into: list[str]) -> Iterator[None]:
    """Warnings, Python's and those that libraries log, go into a list and nowhere else."""

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
