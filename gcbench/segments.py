"""Recomputes several layers as one, though the model's own code calls them one by one.

Torch's non-reentrant checkpointing is a generator: up to its `yield` it saves the inputs and begins to watch, after it
it stops (`_checkpoint_without_reentrant_generator` in pytorch's torch/utils/checkpoint.py; torch's composable
`checkpoint` drives it from hooks in the same way). A segment starts it in the first of its layers and ends it in the
last. What it recomputes is the layers' calls as they were noted, each fed with the output of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator


class NotASegment(NotImplementedError):
    """The model does not run the layers of a group one after the other, each on the output of the one before."""


@dataclass(frozen=True)
class _Call:
    """One layer's call, but for the hidden states."""

    function: Callable[..., Any]
    others: tuple[Any, ...]

    def __call__(self, hidden: torch.Tensor) -> Any:
        return self.function(hidden, *self.others)


class Segment:
    """A group of layers; `run` stands in for each layer's checkpointing function."""

    def __init__(
        self,
        size: int,
        *,
        contexts: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]],
        saving: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """`contexts` makes the contexts of the first run and of the recomputation, `saving` that of the inputs."""
        self.size = size
        self._contexts = contexts
        self._saving = saving
        self._calls: list[_Call] = []
        self._watch: Iterator[None] | None = None
        self._output: torch.Tensor | None = None

    def run(
        self,
        place: int,
        counted: Callable[[Callable[..., Any]], Callable[..., Any]],
        function: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """Run the layer at `place` of the group, as `checkpoint(function, *args)` would.

        Raises NotASegment when the layer does not take the output of the one before it.
        """
        if not args or not isinstance(args[0], torch.Tensor):
            raise NotASegment("a layer takes its hidden states by name, so layers cannot be recomputed as one")
        hidden, others = args[0], args[1:]
        call = _Call(counted(function), others)
        if place == 0:
            self._begin(hidden)
        elif self._watch is None or place != len(self._calls):
            self._end()
            raise NotASegment("the layers of a group do not run one after the other")
        elif hidden is not self._output:
            self._end()
            raise NotASegment("something is done to the hidden states between the layers of a group")
        self._calls.append(call)
        try:
            output = call(hidden)
        except BaseException:
            self._end()
            raise
        self._output = output if isinstance(output, torch.Tensor) else output[0]
        if place == self.size - 1:
            self._end()
        return output

    def _begin(self, hidden: torch.Tensor) -> None:
        self._end()  # of a pass that was cut short
        calls: list[_Call] = []
        self._calls = calls

        def again(hidden: torch.Tensor) -> None:
            for call in calls:
                output = call(hidden)
                hidden = output if isinstance(output, torch.Tensor) else output[0]

        self._watch = _checkpoint_without_reentrant_generator(
            again, True, self._contexts, "default", False, True, hidden
        )
        with self._saving():
            next(self._watch)

    def _end(self) -> None:
        watch, self._watch, self._output = self._watch, None, None
        self._calls = []  # from here on the recomputation alone holds them
        if watch is not None:
            with suppress(StopIteration):
                next(watch)
