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
from inspect import signature
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


class LayersNotSequential(NotImplementedError):
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
        contexts: Contexts,
        saving: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """`contexts` makes the contexts of the first run and of the recomputation, `saving` that of the inputs."""
        self.size = size
        self._contexts = contexts
        self._saving = saving
        self._calls: list[_Call] = []
        self._watch: Iterator[None] | None = None
        self._open: AbstractContextManager[Any] | None = None
        self._output: tuple[torch.Tensor, int] | None = None
        self._random: tuple[bytes, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether it has begun, and its last layer has not run yet."""
        return self._watch is not None

    def run(
        self,
        place: int,
        counted: Callable[[Callable[..., Any]], Callable[..., Any]],
        function: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """Run the layer at `place` of the group, as `checkpoint(function, *args)` would.

        Raises LayersNotSequential when the layer does not take the output of the one before it.
        """
        if not args or not isinstance(args[0], torch.Tensor):
            raise LayersNotSequential("a layer takes its hidden states by name, so layers cannot be recomputed as one")
        hidden, others = args[0], args[1:]
        call = _Call(counted(function), others)
        if place == 0:
            self._begin(hidden)
        else:
            self._check(place, hidden)
        self._calls.append(call)
        try:
            output = call(hidden)
        except BaseException:
            self.end()
            raise
        if place == self.size - 1:
            self.end()
        else:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            self._output = (hidden, hidden._version)
            self._random = _random_state(hidden)
        return output

    def end(self) -> None:
        """Stop watching, wherever in the group it is."""
        watch, self._watch, self._output, self._random = self._watch, None, None, ()
        self._calls = []  # from here on the recomputation alone holds them
        if watch is not None:
            with suppress(StopIteration):
                next(watch)
        saving, self._open = self._open, None
        if saving is not None:
            saving.__exit__(None, None, None)

    def _check(self, place: int, hidden: torch.Tensor) -> None:
        """Raise LayersNotSequential when this layer does not simply follow the one before it."""
        why = None
        if self._watch is None or place != len(self._calls) or self._output is None:
            why = "the layers of a group do not run one after the other"
        elif hidden is not self._output[0] or hidden._version != self._output[1]:
            why = "something is done to the hidden states between the layers of a group"
        elif self._random != _random_state(hidden):
            why = "random numbers are drawn between the layers of a group"
        if why is not None:
            self.end()
            raise LayersNotSequential(why)

    def _begin(self, hidden: torch.Tensor) -> None:
        self.end()  # of a pass that was cut short
        calls: list[_Call] = []
        self._calls = calls

        def again(hidden: torch.Tensor) -> None:
            for call in calls:
                output = call(hidden)
                hidden = output if isinstance(output, torch.Tensor) else output[0]

        self._watch = _checkpoint_without_reentrant_generator(again, *_settings(self._contexts), hidden)
        # Open to the end, beneath what watches: contexts of saved tensors are a stack, and leaving one takes the top.
        self._open = self._saving()
        self._open.__enter__()
        next(self._watch)


def _settings(contexts: Contexts) -> tuple[Any, ...]:
    """`checkpoint`'s defaults by position: random state kept, contexts, determinism check, no debugging, early stop."""
    early_stop = (True,) if "early_stop" in signature(_checkpoint_without_reentrant_generator).parameters else ()
    return (True, contexts, "default", False, *early_stop)


def _random_state(hidden: torch.Tensor) -> tuple[bytes, ...]:
    """What tells whether random numbers have been drawn, on the CPU and on the device; nothing while tracing."""
    if isinstance(hidden, FakeTensor):
        return ()
    states = [torch.default_generator.get_state()]
    if hidden.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(hidden.device))
    return tuple(state.numpy().tobytes() for state in states)
