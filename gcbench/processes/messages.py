"""The messages between the parent and a child process: tasks, events and answers. No torch."""

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

Send = Callable[[object], None]
"""Sends an event to the parent, which may have ended."""


class Line(Protocol):
    """A child's line to its parent: a `Send` on which it can also wait."""

    def __call__(self, event: object) -> None:
        """Send an event."""

    def pause(self, event: object) -> object:
        """Send a last event, wait until the parent has this child go on, and return what it says."""


@dataclass(frozen=True, kw_only=True)
class Paused:
    """A child waits to be told to go on.

    Attributes:
        event: what it sent last.
    """

    event: object


class Task(Protocol):
    """A task for a child process: a dataclass that can be pickled and names its handler."""

    handler: ClassVar[str]
    """`package.module:function`, which takes the task and a `Line`, and returns an `Answer`; never raises."""


def handler_of(task: Task) -> Callable[[Task, Line], Answer]:
    """Import the handler of a task; raises ImportError where a library that it needs is missing."""
    module, _, name = task.handler.partition(":")
    handle: Callable[[Task, Line], Answer] = getattr(import_module(module), name)
    return handle


@dataclass(frozen=True, kw_only=True)
class Event:
    """A training step is done, for the progress display."""

    kind: str
    """`warm-up`, `memory` or `timed`."""
    step: int
    seconds: float | None
    """None on an emulated card, which takes no time."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A user's mistake, or a missing file or library, that only the child finds: an error to raise in the parent."""

    error: str
    """Name of the class in `errors`."""
    message: str

    @classmethod
    def of_broken_library(cls, why: object) -> Refusal:
        """Make the refusal for a library that cannot be imported."""
        return cls(
            error="UnavailableError",
            message=f"a library is missing or broken ({why}); install gcbench again, torch and transformers with it",
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a child process: the result of its task, a failure or a refusal.

    Attributes:
        changed: what `--layers` and `--set` change in the config, with `facts`.
        notices: what a check decided for the user, in sentences, with `facts`.
    """

    machine: Machine | None = None
    facts: ModelFacts | None = None
    result: RoundResult | None = None
    fingerprint: Fingerprint | None = None
    failure: Failure | None = None
    refusal: Refusal | None = None
    changed: ChangedConfig | None = None
    notices: tuple[str, ...] = ()


def raise_refusal(answer: Answer) -> None:
    """Raise the error of an answer with a refusal or a failure."""
    if answer.refusal is not None:
        raise getattr(errors, answer.refusal.error)(answer.refusal.message)
    if answer.failure is not None:
        reason, _, _ = answer.failure.message.partition("; ")  # without the remedy, which refers to a report
        raise UnavailableError(f"the model cannot be built here ({reason}); try another model or transformers version")
