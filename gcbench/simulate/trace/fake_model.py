"""A model on fake tensors, and its training step traced for any plan: in full, or with a few layers for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import own_checkpointing
from gcbench.checkpointing.apply import Groups
from gcbench.core.records import Phase
from gcbench.simulate.costs import Work
from gcbench.simulate.events import Block, Trace
from gcbench.simulate.trace.cpu_buffers import internal_buffers
from gcbench.simulate.trace.fallbacks import marked
from gcbench.simulate.trace.grad_scaler import scaler_without_values
from gcbench.simulate.trace.model_blocks import blocks, kind
from gcbench.simulate.trace.recorder import Internals, Recorder, as_in_a_real_run, saved_on_host
from gcbench.simulate.trace.storage import give_storage, on_accumulation, unchanged
from gcbench.strategies import Plan
from gcbench.training.step import TrainingStep

Segment = tuple[str, int]
"""A stretch of the step: ("forward", layer) or ("backward", layer); with -1, "before" the layers, "head" after them
(norm, logits, loss), "loss" (the backward pass down to the last layer) and "rest" (after the first layer)."""

BEFORE, HEAD, LOSS, REST = ("before", -1), ("head", -1), ("loss", -1), ("rest", -1)


class NotComposable(Exception):
    """The model does not run its layers once each, one after the other: only a full trace tells."""


class _Done(Exception):
    """Gradients are there; the step need not go on."""


@dataclass(frozen=True, kw_only=True)
class LayeredTrace:
    """Forward and backward pass of one step, cut at the layers.

    Attributes:
        trace: its blocks begin with those of the fake model's tensors and of the batch.
        batch: the blocks of the batch.
        segments: (number of events before it, segment), in order.
        works: for each segment, what its operators have the device do.
        gradients: id of a parameter -> the block of its gradient.
        boundaries: number of a layer -> the block of its input.
        called: numbers of the layers that ran, in the order in which they did.
        accumulated: id of a parameter -> number of events before its gradient was complete.
    """

    trace: Trace
    batch: tuple[Block, ...]
    segments: tuple[tuple[int, Segment], ...]
    gradients: Mapping[int, int]
    boundaries: Mapping[int, int]
    called: tuple[int, ...]
    works: tuple[tuple[Work, ...], ...] = ()
    accumulated: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TraceMode:
    """How fake CPU tensors take the road of the target device.

    Attributes:
        patches: a context in which the step runs.
        internals: what kernels take for themselves; None where nothing is known of it.
        notes_random_state: whether checkpointing keeps random states in the device's memory.
        result_order: operator -> the places of its results in the order in which the device allocates them.
    """

    patches: Callable[[], AbstractContextManager[object]] = scaler_without_values
    internals: Internals | None = None
    notes_random_state: bool = True
    result_order: Mapping[Any, tuple[int, ...]] = field(default_factory=dict)


CPU_TRACE = TraceMode(internals=internal_buffers)


class FakeModel:
    """One model, in one precision; its parameters are fake CPU tensors that every trace shares."""

    def __init__(self, model: torch.nn.Module, *, precision: str, road: TraceMode = CPU_TRACE) -> None:
        """`model` is on the meta device; it is taken over."""
        model.train()
        model.config.use_cache = False  # type: ignore[union-attr]
        self.model = model
        self.precision = precision
        self.road = road
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.layers = checkpointing.layers_of(model)
        self.blocks = blocks(model)
        self.fallbacks: set[str] = set()
        """Packages whose kernels the model's own code stood in for, in all traces so far."""
        self._on_stage: set[int] = set()
        self._absent: set[int] = set()
        """Modules of the layers that are not on the stage."""
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def kinds(self) -> tuple[Hashable, ...]:
        """What each layer is: equal for layers that do the same."""
        return tuple(kind(layer) for layer in self.layers)

    @cached_property
    def owners(self) -> dict[int, tuple[int, str]]:
        """id of a layer's parameter -> (number of the layer, name within it); raises NotComposable where two share."""
        found: dict[int, tuple[int, str]] = {}
        for number, layer in enumerate(self.layers):
            for name, param in layer.named_parameters():
                if id(param) in found:
                    raise NotComposable("layers share parameters")
                found[id(param)] = (number, name)
        return found

    @cached_property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """The model's parameters, each once. Looking for them takes as long as the model is deep."""
        return tuple(self.model.parameters())

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.model.buffers())

    def _drop_gradients(self) -> None:
        for param in self.parameters:
            param.grad = None

    def _give_storage(self, layers: Iterable[int]) -> None:
        """Make the tensors outside the layers and those of `layers` fake CPU tensors; the others stay on meta."""
        wanted = set(layers) - self._on_stage
        if self._on_stage and not wanted:
            return
        self._on_stage |= wanted
        off_stage = [layer for number, layer in enumerate(self.layers) if number not in self._on_stage]
        self._absent = {id(module) for layer in off_stage for module in layer.modules()}
        give_storage(self._modules_that_run(), self.fake, self._made)
        for name in ("owners", "parameters", "_buffers"):  # they name tensors that have been replaced
            self.__dict__.pop(name, None)

    def trace_in_full(
        self, plan: Plan, *, batch_size: int, seq_len: int, optim: str, steps_on_device: bool = True
    ) -> tuple[Trace, frozenset[int], tuple[Work, ...]]:
        """The second training step, everything before it included, the blocks of its gradients, and its work.

        The first step makes the optimizer's states. The trace begins with the model's blocks, parameters first, and the
        batch; they have no operator.

        With `steps_on_device` False the optimizer's step counters lie in the host's memory and count nothing.
        """
        self._give_storage(range(len(self.layers)))
        with self._recording(plan.treated(), own=plan.own) as recorder:
            num_model = len(recorder.trace.blocks)
            step = self._step(batch_size=batch_size, seq_len=seq_len, optim=optim)
            standing = [replace(block, op=None) for block in recorder.trace.blocks[num_model:]]
            recorder.trace.blocks[num_model:] = standing
            step(recorder.note_backward)
            recorder.trace.settled_at.append(len(recorder.trace.events))
            if not steps_on_device:
                recorder.forget(state["step"] for state in step.optimizer.state.values() if "step" in state)
            gradients: set[int | None] = set()
            recorder.works.clear()

            def on_phase(phase: Phase) -> None:
                recorder.on_phase(phase)
                if phase == "optimizer":
                    gradients.update(recorder.number(p.grad) for p in self.parameters if p.grad is not None)

            step(on_phase)
            recorder.close()
        self._drop_gradients()
        found = frozenset(number for number in gradients if number is not None)
        return recorder.trace, found, tuple(recorder.works)

    def trace_layers(
        self, groups: Groups, kept: Sequence[int], *, batch_size: int, seq_len: int, own: bool = False
    ) -> LayeredTrace:
        """Forward and backward pass in which layers that are not `kept` hand their input on.

        `groups` are those of kept layers; with `own` the model checkpoints them in its own way.

        Raises NotComposable when the layers do not run one after the other, each once.
        """
        self._give_storage(kept)
        with self._recording(groups, own=own) as recorder:
            num_model = len(recorder.trace.blocks)
            step = self._step(batch_size=batch_size, seq_len=seq_len, optim="sgd")
            watch = _Watch(recorder, self.layers, kept)
            num_standing = len(recorder.trace.blocks)
            accumulated: dict[int, int] = {}

            def note_accumulated(param: torch.Tensor) -> None:
                accumulated[id(param)] = len(recorder.trace.events)

            try:
                with watch, on_accumulation(self.parameters, note_accumulated):
                    step(watch.on_phase)
            except _Done:
                pass
            recorder.close()
            gradients = {
                id(param): number
                for param in self.parameters
                if param.grad is not None and (number := recorder.number(param.grad)) is not None
            }
        self._drop_gradients()
        return LayeredTrace(
            trace=recorder.trace,
            batch=tuple(recorder.trace.blocks[num_model:num_standing]),
            segments=tuple(watch.segments),
            works=tuple(
                tuple(recorder.works[start:end])
                for start, end in zip(watch.works_before, [*watch.works_before[1:], len(recorder.works)], strict=True)
            ),
            gradients=gradients,
            boundaries=watch.boundaries,
            called=tuple(watch.called),
            accumulated=accumulated,
        )

    @contextmanager
    def ready(self, *, own: bool = False) -> Iterator[None]:
        """The whole model on the stage, steps in the context on fake tensors; checkpointed in its own way, or not."""
        self._give_storage(range(len(self.layers)))
        with self._recording((), own=own):
            yield

    def run_forward(self, kept: Sequence[int], *, batch_size: int, seq_len: int) -> None:
        """A forward pass in which the layers that are not `kept` hand their input on, and nothing is checkpointed."""
        self._give_storage(kept)
        with self._recording(()) as recorder, _Watch(recorder, self.layers, kept) as watch, suppress(_Done):
            self._step(batch_size=batch_size, seq_len=seq_len, optim="sgd")(watch.on_forward)

    def _modules_that_run(self) -> list[torch.nn.Module]:
        """All but what is inside of layers that are not on the stage."""
        return [module for module in self.model.modules() if id(module) not in self._absent]

    @contextmanager
    def _recording(self, groups: Groups, *, own: bool = False) -> Iterator[Recorder]:
        """The groups checkpointed, or the model in its own way, and fake tensors and the recorder in force.

        What stands before a step is noted.

        Afterwards the model is as it was: tables that its code keeps on a module, and grows or makes again as it goes,
        are part of the trace that made them.
        """
        recorder = Recorder(self.road.internals, self.road.result_order)
        with ExitStack() as stack:
            modules = self.model.modules() if own else [*self._modules_that_run(), *self.layers]
            stack.enter_context(unchanged(modules))
            stack.enter_context(marked(self.model.modules(), recorder))
            stack.callback(lambda: self.fallbacks.update(recorder.fallbacks))
            stack.enter_context(mock.patch.object(checkpointing, "save_on_host", partial(saved_on_host, recorder)))
            if own:
                stack.callback(checkpointing.Hooks(own_checkpointing.switch_on(self.model)).remove)
            else:
                checkpointing.apply_groups(self.model, self.layers, groups, checkpointing.RecomputeCounter())
            stack.callback(checkpointing.end_segments, self.model)
            stack.enter_context(as_in_a_real_run(recorder, notes_random_state=self.road.notes_random_state))
            stack.enter_context(self.road.patches())
            stack.enter_context(self.fake)
            stack.enter_context(recorder)
            for held in (*self.parameters, *self._buffers):
                if held.device.type != "meta":
                    recorder.note(held, None)
            yield recorder

    def _step(self, *, batch_size: int, seq_len: int, optim: str) -> TrainingStep:
        batch = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        return TrainingStep(self.model, batch=batch, precision=self.precision, optim=optim, seed=0)


class _Watch:
    """Marks where layers begin and end in both passes, and lets the layers that are not kept hand their input on."""

    def __init__(self, recorder: Recorder, layers: Sequence[torch.nn.Module], kept: Sequence[int]) -> None:
        self.recorder = recorder
        self.layers = layers
        self.kept = frozenset(kept)
        self.segments: list[tuple[int, Segment]] = []
        self.works_before: list[int] = []
        """For each segment, the calls of operators before it."""
        self.called: list[int] = []
        self.boundaries: dict[int, int] = {}
        self._phase: Phase | None = None
        self._first, self._last = min(kept, default=-1), max(kept, default=-1)
        self._output: Any = None
        """What the last kept layer returned, up to the next kept one: those between hand on the very same object, so
        that what the caller holds of it is held as long as in a model without them."""
        self._hooks: list[Any] = []
        self._treatments: list[tuple[torch.nn.Module, Any]] = []
        self._passing: list[torch.nn.Module] = []

    def __enter__(self) -> _Watch:
        for number, layer in enumerate(self.layers):
            if number in self.kept:
                self._hooks.append(layer.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True))
                self._hooks.append(layer.register_forward_hook(partial(self._leave, number)))
            else:
                if hasattr(layer, "gradient_checkpointing"):
                    self._treatments.append((layer, layer.gradient_checkpointing))
                    layer.gradient_checkpointing = False  # type: ignore[assignment]
                self._passing.append(layer)
                layer.forward = partial(self._pass_on, number)
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer, treatment in self._treatments:
            layer.gradient_checkpointing = treatment
        for layer in self._passing:
            del layer.forward

    def on_forward(self, phase: Phase) -> None:
        """For a step of which the forward pass alone is wanted."""
        if phase != "forward":
            raise _Done
        self.on_phase(phase)

    def on_phase(self, phase: Phase) -> None:
        self._phase = phase
        self.recorder.on_phase(phase)
        if phase == "optimizer":
            raise _Done
        self._mark(BEFORE if phase == "forward" else LOSS)

    def _mark(self, segment: Segment) -> None:
        self.segments.append((len(self.recorder.trace.events), segment))
        self.works_before.append(len(self.recorder.works))

    def _enter(self, number: int, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._phase != "forward":
            return  # a recomputation
        self._output = None
        self.called.append(number)
        self._mark(("forward", number))
        hidden = _hidden(args, kwargs)
        block = self.recorder.number(hidden)
        if block is not None:
            self.boundaries[number] = block
        if number == self._first and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._mark(REST))  # type: ignore[no-untyped-call]

    def _leave(self, number: int, layer: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._phase != "forward":
            return
        hidden = output
        if not isinstance(output, torch.Tensor):
            if not isinstance(output, tuple) or not isinstance(output[0], torch.Tensor):
                raise NotComposable("layers return something else than hidden states")
            hidden = output[0]
        if not hidden.requires_grad:
            raise NotComposable("the first layers take no part in the backward pass")
        hidden.register_hook(lambda gradient: self._mark(("backward", number)))
        if number == self._last:
            self._mark(HEAD)
        else:
            self._output = output

    def _pass_on(self, number: int, *args: Any, **kwargs: Any) -> Any:
        self.called.append(number)
        if self._output is None or _hidden(args, kwargs) is not self._hidden_of(self._output):
            raise NotComposable("something is done to the hidden states between layers")
        return self._output

    @staticmethod
    def _hidden_of(output: Any) -> Any:
        return output if isinstance(output, torch.Tensor) else output[0]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise NotComposable("layers take something else than hidden states")
    return hidden
