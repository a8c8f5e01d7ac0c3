"""What the parent asks of a child process, and what the child answers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Protocol

from gcbench.core import errors
from gcbench.core.errors import UnavailableError
from gcbench.core.gradient_fingerprint import Fingerprint
from gcbench.core.model_changes import ChangedConfig
from gcbench.core.records import Failure, Machine, ModelFacts, RoundResult

Tell = Callable[[object], None]
"""Passes an event on to the parent, which may have gone."""


class Task(Protocol):
    """What a child process is asked: a dataclass that can be pickled, and names what handles it there."""

    handler: ClassVar[str]
    """`package.module:function`, which takes the task and a `Tell`, and returns an `Answer`; never raises."""


def handler_of(task: Task) -> Callable[[Task, Tell], Answer]:
    """The function that a task names; raises ImportError where a library that it needs is missing."""
    module, _, name = task.handler.partition(":")
    handle: Callable[[Task, Tell], Answer] = getattr(import_module(module), name)
    return handle


@dataclass(frozen=True, kw_only=True)
class Event:
    """One training step done, for the progress display."""

    kind: str
    """`warm-up`, `memory` or `timed`."""
    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A user's mistake or a missing thing that only the child could find: an error to raise in the parent."""

    error: str
    """Name of the class in `errors`."""
    message: str

    @classmethod
    def of_broken_library(cls, why: object) -> Refusal:
        """When torch or transformers cannot be imported."""
        return cls(
            error="UnavailableError",
            message=f"a library is missing or broken ({why}); install gcbench again, torch and transformers with it",
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a child wrote before it ended; exactly one of the kinds of content."""

    machine: Machine | None = None
    facts: ModelFacts | None = None
    result: RoundResult | None = None
    fingerprint: Fingerprint | None = None
    failure: Failure | None = None
    refusal: Refusal | None = None
    changed: ChangedConfig | None = None
    """Beside `facts`."""
    notices: tuple[str, ...] = ()
    """What a check decided for the user, in sentences; beside the facts of its model."""


def raise_refusal(answer: Answer) -> None:
    """Raise the error that stands in an answer, if one does."""
    if answer.refusal is not None:
        raise getattr(errors, answer.refusal.error)(answer.refusal.message)
    if answer.failure is not None:
        reason, _, _ = answer.failure.message.partition("; ")  # what follows speaks of a report, and there is none
        raise UnavailableError(f"the model cannot be built here ({reason}); try another model or transformers version")
