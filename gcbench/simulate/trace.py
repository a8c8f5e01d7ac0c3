"""The training step on fake tensors: every block of memory it takes and gives back, in order, computing nothing.

The model and the step are those of a measurement (`models.py`, `training.py`); only the tensors are fake: they have
shapes, dtypes and strides and no storage. What a kernel allocates for itself while it runs cannot be seen here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, masking_utils

from gcbench import checkpointing, models
from gcbench.records import PHASES, MemoryPeaks, Phase
from gcbench.strategies import Plan
from gcbench.training import TrainingStep, parameter_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One allocation: its size in bytes, and the operator that made it (None for what was there before the step)."""

    nbytes: int
    op: str | None


@dataclass(kw_only=True)
class Trace:
    """Blocks taken and given back, from the building of the model to the end of the measured step.

    Attributes:
        blocks: every allocation, in order.
        events: `n` for the allocation of `blocks[n]`, `~n` for its release.
        marks: (number of events before it, phase), for each phase of the measured step.
    """

    blocks: list[Block] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, Phase]] = field(default_factory=list)

    def peaks(self) -> MemoryPeaks:
        """The most bytes alive at one time in each phase of the measured step."""
        live = 0
        phase: Phase | None = None
        highest = dict.fromkeys(PHASES, 0)
        marks = iter([*self.marks, (len(self.events) + 1, None)])
        due, following = next(marks)
        for place, event in enumerate(self.events):
            while place >= due:
                phase = following
                if phase is not None:
                    highest[phase] = live
                due, following = next(marks)
            live += self.blocks[event].nbytes if event >= 0 else -self.blocks[~event].nbytes
            if phase is not None and live > highest[phase]:
                highest[phase] = live
        return MemoryPeaks(
            allocated_bytes=max(highest.values()),
            reserved_bytes=None,
            process_bytes=None,
            forward_bytes=highest["forward"],
            backward_bytes=highest["backward"],
            optimizer_bytes=highest["optimizer"],
        )


def trace_step(
    config: PreTrainedConfig,
    *,
    plan: Plan,
    batch_size: int,
    seq_len: int,
    precision: str,
    optim: str,
    attn_implementation: str | None = None,
) -> Trace:
    """The second training step of the model that `config` describes: the first one makes the optimizer's states.

    Raises what the model's own code raises on tensors without values, for a model whose shapes depend on them.
    """
    kwargs: dict[str, Any] = {"dtype": parameter_dtype(precision)}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    model = models.build_meta(config, **kwargs)
    model.train()
    model.config.use_cache = False  # type: ignore[union-attr]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _give_storage(model, fake)
    checkpointing.apply(model, plan)
    recorder = _Recorder()
    with _as_in_a_real_run(recorder), fake, recorder:
        for held in (*model.parameters(), *model.buffers()):
            recorder.note(held, None)
        batch = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        step = TrainingStep(model, batch=batch, precision=precision, optim=optim, seed=0)
        step()
        step(recorder.on_phase)
        recorder.close()
    return recorder.trace


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each storage when an operator first returns it, and again when the last reference to it goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._open = True

    def note(self, tensor: torch.Tensor, op: str | None) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        number = len(self.trace.blocks)
        self.trace.blocks.append(Block(nbytes=storage.nbytes(), op=op))
        self.trace.events.append(number)

        def released(reference: object) -> None:
            self._alive.pop(key, None)
            if self._open:
                self.trace.events.append(~number)

        self._alive[key] = weakref.ref(storage, released)

    def on_phase(self, phase: Phase) -> None:
        self.trace.marks.append((len(self.trace.events), phase))

    def close(self) -> None:
        """What is released from here on belongs to taking the trace down, not to the step."""
        self._open = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _without_kernel(func, args) if func in _REFUSED_BY_FAKE_TENSORS else func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.note(value, func.__name__)
        return result


_REFUSED_BY_FAKE_TENSORS = {torch.ops.aten._grouped_mm.default}
"""Operators whose shape function demands bf16 although the real CPU kernel takes fp32 too."""


def _without_kernel(func: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output of a grouped matrix product of (tokens, in) and (groups, in, out), or of two 2-d factors."""
    left, right, offsets = args[0], args[1], args[2]
    if left.dim() == 2 and right.dim() == 2:
        return left.new_empty(len(offsets), left.shape[0], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[-1])


@contextmanager
def _as_in_a_real_run(recorder: _Recorder) -> Iterator[None]:
    """Undo what differs only because tensors are fake, and show what real runs do out of an operator's sight."""
    real_state = torch.get_rng_state

    def noted_state() -> torch.Tensor:
        state = real_state()
        recorder.note(state, "get_rng_state")
        return state

    with ExitStack() as stack:
        # transformers takes fake tensors for tracing by a compiler, and would build an explicit mask.
        if hasattr(masking_utils, "find_packed_sequence_indices"):
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *a, **k: None))
        # Checkpointing keeps the random state of each layer: 5 KB, made without an operator.
        stack.enter_context(mock.patch.object(torch, "get_rng_state", noted_state))
        stack.enter_context(mock.patch.object(torch.random, "get_rng_state", noted_state))
        yield


def _give_storage(model: torch.nn.Module, fake: FakeTensorMode) -> None:
    """Replace meta parameters and buffers by fake CPU tensors, each once: tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}

    def replacement(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with fake:
                empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]  # held, or an id could be given to another tensor
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, tensor in named.items():
                if tensor is not None:
                    named[name] = replacement(tensor)  # type: ignore[assignment]
    del originals
