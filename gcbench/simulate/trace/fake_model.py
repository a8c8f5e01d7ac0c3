"""Traces a training step of a model on fake tensors, for any plan: in full, or with a few layers that represent all."""

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
from gcbench.simulate.trace.grad_scaler import scaler_for_fake_tensors
from gcbench.simulate.trace.model_blocks import blocks, kind
from gcbench.simulate.trace.recorder import KernelBuffers, Recorder, as_in_a_real_run, saved_on_host
from gcbench.simulate.trace.storage import materialize, on_accumulation, unchanged
from gcbench.strategies import Plan
from gcbench.training.step import TrainingStep

Section = tuple[str, int]
"""A part of the step: ("forward", layer) or ("backward", layer); with -1, "before" the layers, "head" after them
(norm, logits, loss), "loss" (the backward pass down to the last layer) and "rest" (after the first layer)."""

BEFORE, HEAD, LOSS, REST = ("before", -1), ("head", -1), ("loss", -1), ("rest", -1)


class NotComposable(Exception):
    """The model does not run its layers once each, one after the other, so that it has to be traced in full."""


class _Done(Exception):
    """Raised to end a step early, as when the gradients are complete."""


@dataclass(frozen=True, kw_only=True)
class LayeredTrace:
    """Forward and backward pass of one step, with the places where its sections begin.

    Attributes:
        trace: its blocks begin with those of the fake model's tensors and of the batch.
        batch: the blocks of the batch.
        sections: (number of events before it, section), in order.
        works: for each section, the work of its operators.
        gradients: id of a parameter -> the block of its gradient.
        layer_inputs: number of a layer -> the block of its input.
        called: numbers of the layers that ran, in the order in which they did.
        accumulated: id of a parameter -> number of events before its gradient was complete.
        update_at: number of events before the optimizer would step; what the loss alone held is freed after that. None
            for all.
    """

    trace: Trace
    batch: tuple[Block, ...]
    sections: tuple[tuple[int, Section], ...]
    gradients: Mapping[int, int]
    layer_inputs: Mapping[int, int]
    called: tuple[int, ...]
    works: tuple[tuple[Work, ...], ...] = ()
    accumulated: Mapping[int, int] = field(default_factory=dict)
    update_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class TraceMode:
    """How a step on fake CPU tensors is traced so that it allocates what the target device would.

    Attributes:
        patches: a context in which the step runs.
        kernel_buffers: the buffers that kernels allocate inside; None if they are not known.
        notes_random_state: whether checkpointing saves random states in the device's memory.
        result_order: operator -> the places of its results in the order in which the device allocates them.
    """

    patches: Callable[[], AbstractContextManager[object]] = scaler_for_fake_tensors
    kernel_buffers: KernelBuffers | None = None
    notes_random_state: bool = True
    result_order: Mapping[Any, tuple[int, ...]] = field(default_factory=dict)


CPU_TRACE = TraceMode(kernel_buffers=internal_buffers)


class FakeModel:
    """One model, in one precision; its parameters are fake CPU tensors that every trace shares."""

    def __init__(self, model: torch.nn.Module, *, precision: str, trace_mode: TraceMode = CPU_TRACE) -> None:
        """`model` is on the meta device; the fake model owns and changes it."""
        model.train()
        model.config.use_cache = False  # type: ignore[union-attr]
        self.model = model
        self.precision = precision
        self.trace_mode = trace_mode
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.layers = checkpointing.layers_of(model)
        self.blocks = blocks(model)
        self.fallbacks: set[str] = set()
        """Packages whose kernels the model's own PyTorch code replaced, in all traces so far."""
        self._materialized: set[int] = set()
        self._absent: set[int] = set()
        """ids of the modules in layers that are still on the meta device."""
        self._replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def kinds(self) -> tuple[Hashable, ...]:
        """The kind of each layer: equal for layers that do the same."""
        return tuple(kind(layer) for layer in self.layers)

    @cached_property
    def owners(self) -> dict[int, tuple[int, str]]:
        """id of a layer's parameter -> (number of the layer, name within it); raises NotComposable if two share one."""
        found: dict[int, tuple[int, str]] = {}
        for number, layer in enumerate(self.layers):
            for name, param in layer.named_parameters():
                if id(param) in found:
                    raise NotComposable("layers share parameters")
                found[id(param)] = (number, name)
        return found

    @cached_property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """The model's parameters, each once; cached, as collecting them is slow in a deep model."""
        return tuple(self.model.parameters())

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.model.buffers())

    def _drop_gradients(self) -> None:
        for param in self.parameters:
            param.grad = None

    def _materialize(self, layers: Iterable[int]) -> None:
        """Make the tensors outside the layers and those of `layers` fake CPU tensors; the others stay on meta."""
        missing = set(layers) - self._materialized
        if self._materialized and not missing:
            return
        self._materialized |= missing
        on_meta = [layer for number, layer in enumerate(self.layers) if number not in self._materialized]
        self._absent = {id(module) for layer in on_meta for module in layer.modules()}
        materialize(self._modules_that_run(), self.fake, self._replaced)
        for name in ("owners", "parameters", "_buffers"):  # they name tensors that have been replaced
            self.__dict__.pop(name, None)

    def trace_in_full(
        self, plan: Plan, *, batch_size: int, seq_len: int, optim: str, steps_on_device: bool = True
    ) -> tuple[Trace, frozenset[int], tuple[Work, ...]]:
        """Trace two training steps; returns the trace, the blocks of the second step's gradients, and its work.

        The first step creates the optimizer's states. The trace begins with the model's blocks, parameters first, and
        the batch; they have no operator.

        If not `steps_on_device`, the optimizer's step counters are in host memory and do not count.
        """
        self._materialize(range(len(self.layers)))
        with self._recording(plan.treated(), own=plan.own) as recorder:
            num_model = len(recorder.trace.blocks)
            step = self._step(batch_size=batch_size, seq_len=seq_len, optim=optim)
            batch = [replace(block, op=None) for block in recorder.trace.blocks[num_model:]]
            recorder.trace.blocks[num_model:] = batch
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
        known = frozenset(number for number in gradients if number is not None)
        return recorder.trace, known, tuple(recorder.works)

    def trace_layers(
        self, groups: Groups, layers: Sequence[int], *, batch_size: int, seq_len: int, own: bool = False
    ) -> LayeredTrace:
        """Trace forward and backward pass in which only `layers` run; the others return their input.

        `groups` are those of `layers`; with `own` the model checkpoints them with its own code.

        Raises NotComposable if the layers do not run one after the other, each once.
        """
        self._materialize(layers)
        with self._recording(groups, own=own) as recorder:
            num_model = len(recorder.trace.blocks)
            step = self._step(batch_size=batch_size, seq_len=seq_len, optim="sgd")
            marker = _SectionMarker(recorder, self.layers, layers)
            num_before_step = len(recorder.trace.blocks)
            accumulated: dict[int, int] = {}

            def note_accumulated(param: torch.Tensor) -> None:
                accumulated[id(param)] = len(recorder.trace.events)

            try:
                with marker, on_accumulation(self.parameters, note_accumulated):
                    step(marker.on_phase)
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
            batch=tuple(recorder.trace.blocks[num_model:num_before_step]),
            sections=tuple(marker.sections),
            works=tuple(
                tuple(recorder.works[start:end])
                for start, end in zip(marker.works_before, [*marker.works_before[1:], len(recorder.works)], strict=True)
            ),
            gradients=gradients,
            update_at=marker.update_at,
            layer_inputs=marker.layer_inputs,
            called=tuple(marker.called),
            accumulated=accumulated,
        )

    @contextmanager
    def ready(self, *, own: bool = False) -> Iterator[None]:
        """Make the whole model fake for steps in the context; with `own` its own code checkpoints it, else nothing."""
        self._materialize(range(len(self.layers)))
        with self._recording((), own=own):
            yield

    def run_forward(self, layers: Sequence[int], *, batch_size: int, seq_len: int) -> None:
        """Run a forward pass of `layers` alone, in which the others return their input and nothing is checkpointed."""
        self._materialize(layers)
        with self._recording(()) as recorder, _SectionMarker(recorder, self.layers, layers) as marker, suppress(_Done):
            self._step(batch_size=batch_size, seq_len=seq_len, optim="sgd")(marker.on_forward)

    def _modules_that_run(self) -> list[torch.nn.Module]:
        """All modules but those inside layers that are still on the meta device."""
        return [module for module in self.model.modules() if id(module) not in self._absent]

    @contextmanager
    def _recording(self, groups: Groups, *, own: bool = False) -> Iterator[Recorder]:
        """Checkpoint the groups, or the model with its own code, and record what runs on fake tensors.

        The model's parameters and buffers are recorded first.

        Afterwards the model is as it was: tables that its code caches on a module, and grows or rebuilds as it runs,
        are part of the trace that created them.
        """
        mode = self.trace_mode
        recorder = Recorder(mode.kernel_buffers, mode.result_order, draws_on_host=not mode.notes_random_state)
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
            stack.enter_context(as_in_a_real_run(recorder, notes_random_state=self.trace_mode.notes_random_state))
            stack.enter_context(self.trace_mode.patches())
            stack.enter_context(self.fake)
            stack.enter_context(recorder)
            for tensor in (*self.parameters, *self._buffers):
                if tensor.device.type != "meta":
                    recorder.note(tensor, None)
            yield recorder

    def _step(self, *, batch_size: int, seq_len: int, optim: str) -> TrainingStep:
        batch = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        return TrainingStep(self.model, batch=batch, precision=self.precision, optim=optim, seed=0)


class _SectionMarker:
    """Marks where layers begin and end in both passes, and lets the layers that are not traced return their input."""

    def __init__(self, recorder: Recorder, layers: Sequence[torch.nn.Module], traced: Sequence[int]) -> None:
        self.recorder = recorder
        self.layers = layers
        self.traced = frozenset(traced)
        self.sections: list[tuple[int, Section]] = []
        self.works_before: list[int] = []
        """For each section, the calls of operators before it."""
        self.called: list[int] = []
        self.layer_inputs: dict[int, int] = {}
        self._phase: Phase | None = None
        self._first, self._last = min(traced, default=-1), max(traced, default=-1)
        self._output: Any = None
        """What the last traced layer returned, up to the next traced one: those between return the very same object, so
        that the caller holds it as long as in a model without them."""
        self.update_at: int | None = None
        self._hooks: list[Any] = []
        self._own_switches: list[tuple[torch.nn.Module, Any]] = []
        self._skipped: list[torch.nn.Module] = []

    def __enter__(self) -> _SectionMarker:
        for number, layer in enumerate(self.layers):
            if number in self.traced:
                self._hooks.append(layer.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True))
                self._hooks.append(layer.register_forward_hook(partial(self._leave, number)))
            else:
                if hasattr(layer, "gradient_checkpointing"):
                    self._own_switches.append((layer, layer.gradient_checkpointing))
                    layer.gradient_checkpointing = False  # type: ignore[assignment]
                self._skipped.append(layer)
                layer.forward = partial(self._skip, number)
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer, switch in self._own_switches:
            layer.gradient_checkpointing = switch
        for layer in self._skipped:
            del layer.forward

    def on_forward(self, phase: Phase) -> None:
        """Mark the forward pass, and end the step after it."""
        if phase != "forward":
            raise _Done
        self.on_phase(phase)

    def on_phase(self, phase: Phase) -> None:
        """Mark a phase, and end the step before its update."""
        self._phase = phase
        self.recorder.on_phase(phase)
        if phase == "optimizer":
            self.update_at = len(self.recorder.trace.events)
            raise _Done
        self._mark(BEFORE if phase == "forward" else LOSS)

    def _mark(self, section: Section) -> None:
        self.sections.append((len(self.recorder.trace.events), section))
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
            self.layer_inputs[number] = block
        if number == self._first and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._mark(REST))  # type: ignore[no-untyped-call]

    def _leave(self, number: int, layer: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._phase != "forward":
            return
        hidden = output
        if not isinstance(output, torch.Tensor):
            if not isinstance(output, tuple) or not isinstance(output[0], torch.Tensor):
                raise NotComposable("layers return something other than hidden states")
            hidden = output[0]
        if not hidden.requires_grad:
            raise NotComposable("the first layers take no part in the backward pass")
        hidden.register_hook(lambda gradient: self._mark(("backward", number)))
        if number == self._last:
            self._mark(HEAD)
        else:
            self._output = output

    def _skip(self, number: int, *args: Any, **kwargs: Any) -> Any:
        self.called.append(number)
        if self._output is None or _hidden(args, kwargs) is not self._hidden_of(self._output):
            raise NotComposable("the hidden states change between layers")
        return self._output

    @staticmethod
    def _hidden_of(output: Any) -> Any:
        return output if isinstance(output, torch.Tensor) else output[0]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise NotComposable("layers get something other than hidden states")
    return hidden
