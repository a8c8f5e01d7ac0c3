"""Recomputes several layers as one, though the model's own code calls them one by one.

torch's non-reentrant checkpointing is a generator: before its `yield` it saves the inputs and installs its hooks on
saved tensors, after it it removes them (`_checkpoint_without_reentrant_generator` in pytorch's
torch/utils/checkpoint.py; torch's composable `checkpoint` drives it from hooks in the same way). A segment starts it in
the first of its layers and ends it in the last. It recomputes the layers' calls as they were made, each on the output
of the one before.
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

ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the contexts of a first run and of its recomputation: the `context_fn` of `checkpoint`."""


class LayersNotSequential(NotImplementedError):
    """The model does not run the layers of a group one after the other, each on the output of the one before."""


@dataclass(frozen=True)
class _Call:
    """One layer's call, without the hidden states."""

    function: Callable[..., Any]
    others: tuple[Any, ...]

    def __call__(self, hidden: torch.Tensor) -> Any:
        return self.function(hidden, *self.others)


class Segment:
    """A group of layers that is recomputed as one; `run` replaces each layer's checkpointing function."""

    def __init__(
        self,
        size: int,
        *,
        context_fn: ContextFn,
        saving: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """`saving` makes the context in which the inputs are saved."""
        self.size = size
        self._context_fn = context_fn
        self._saving = saving
        self._calls: list[_Call] = []
        self._generator: Iterator[None] | None = None
        self._open: AbstractContextManager[Any] | None = None
        self._output: tuple[torch.Tensor, int] | None = None
        self._random: tuple[bytes, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether its first layer has run, and its last has not."""
        return self._generator is not None

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
            raise LayersNotSequential(
                "a layer gets its hidden states as a keyword argument, so layers cannot be recomputed as one group"
            )
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
        """End torch's checkpointing of the group, after whichever of its layers."""
        generator, self._generator, self._output, self._random = self._generator, None, None, ()
        self._calls = []  # from here on only the recomputation refers to them
        if generator is not None:
            with suppress(StopIteration):
                next(generator)
        saving, self._open = self._open, None
        if saving is not None:
            saving.__exit__(None, None, None)

    def _check(self, place: int, hidden: torch.Tensor) -> None:
        """Raise LayersNotSequential when this layer does not run directly on the output of the one before it."""
        why = None
        if self._generator is None or place != len(self._calls) or self._output is None:
            why = "the layers of a group do not run one after the other"
        elif hidden is not self._output[0] or hidden._version != self._output[1]:
            why = "the model changes the hidden states between the layers of a group"
        elif self._random != _random_state(hidden):
            why = "the model draws random numbers between the layers of a group"
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

        self._generator = _checkpoint_without_reentrant_generator(again, *_settings(self._context_fn), hidden)
        # Entered before torch's own hooks and left after them: contexts of saved tensors are a stack.
        self._open = self._saving()
        self._open.__enter__()
        next(self._generator)


def _settings(context_fn: ContextFn) -> tuple[Any, ...]:
    """`checkpoint`'s arguments by position: preserve_rng_state, contexts, determinism check, debug, early stop."""
    early_stop = (True,) if "early_stop" in signature(_checkpoint_without_reentrant_generator).parameters else ()
    return (True, context_fn, "default", False, *early_stop)


def _random_state(hidden: torch.Tensor) -> tuple[bytes, ...]:
    """The state of the random generators of the CPU and of the device; nothing while tracing."""
    if isinstance(hidden, FakeTensor):
        return ()
    states = [torch.default_generator.get_state()]
    if hidden.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(hidden.device))
    return tuple(state.numpy().tobytes() for state in states)
