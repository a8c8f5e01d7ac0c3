"""Records every block of memory that operators on fake tensors allocate and free, computing nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from gcbench.core.records import Phase
from gcbench.simulate.costs import Work
from gcbench.simulate.events import Block, KernelBuffer, Trace
from gcbench.simulate.op_work import CacheAges, of_call
from gcbench.simulate.trace.known_values import KnownValues
from gcbench.simulate.trace.live_storages import LiveStorages

KernelBuffers = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Iterable[KernelBuffer]]
"""(operator, arguments, keyword arguments, result) -> the buffers inside its kernel, in order of allocation."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each storage when an operator first returns it, and again when the last reference to it goes.

    A dispatch mode sees an operator's results only; the buffers inside its kernel on the target device come from
    `kernel_buffers`. With `draws_on_host` a single random number is not in the device's memory.
    """

    def __init__(
        self,
        kernel_buffers: KernelBuffers | None = None,
        result_order: Mapping[Any, tuple[int, ...]] = {},
        *,
        draws_on_host: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._kernel_buffers = kernel_buffers
        self._result_order = result_order
        self._draws_on_host = draws_on_host
        self._alive = LiveStorages(self._on_free)
        self._open = True
        self._in_backward = False
        self._held_once = _counts_when_held_once()
        self._ages = CacheAges()
        self.known = KnownValues()
        self.fallbacks: set[str] = set()
        """Packages whose kernels a reference implementation replaced."""
        self._fallback_depth = 0
        self.works: list[Work] = []
        """The work of each call, in order."""

    def note(self, tensor: torch.Tensor, op: str | None) -> None:
        """Record the allocation of a tensor's storage if it is new."""
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return  # what a recomputation skips is on meta
        storage = tensor.untyped_storage()
        if self._alive.get(storage) is None:
            self._alive.add(storage, self._allocate(storage.nbytes(), op, tensor.shape))

    def number(self, tensor: torch.Tensor) -> int | None:
        """The block that holds the tensor; None if it was never recorded."""
        return self._alive.get(tensor.untyped_storage())

    def forget(self, tensors: Iterable[object]) -> None:
        """Make the blocks of tensors that are not in the device's memory empty."""
        for tensor in tensors:
            number = self.number(tensor) if isinstance(tensor, torch.Tensor) else None
            if number is not None:
                self.trace.blocks[number] = Block(0, None)

    def _hide(self, values: Iterable[object]) -> None:
        """Record results that are not in the device's memory, as empty blocks."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self.note(value, None)
                self.forget([value])

    @contextmanager
    def in_fallback(self, package: str) -> Iterator[None]:
        """Mark what is allocated inside as that of a reference for a kernel of `package`."""
        self.fallbacks.add(package)
        self._fallback_depth += 1
        try:
            yield
        finally:
            self._fallback_depth -= 1

    def note_backward(self, phase: Phase) -> None:
        """Note whether the backward pass runs, in a step that is not the measured one."""
        self._in_backward = phase == "backward"
        if phase == "forward" and self.trace.forward_at is None:
            self.trace.forward_at = len(self.trace.events)
        if phase == "backward" and self.trace.backward_at is None:
            self.trace.backward_at = len(self.trace.events)

    def on_phase(self, phase: Phase) -> None:
        """Mark a phase of the measured step."""
        self.note_backward(phase)
        self.trace.marks.append((len(self.trace.events), phase))

    def cool(self) -> None:
        """Treat all memory touched so far as out of the caches."""
        self._ages = CacheAges()

    def close(self) -> None:
        """Stop recording frees: from here on they belong to the teardown, not to the step."""
        self._open = False

    def _allocate(self, nbytes: int, op: str | None, shape: Iterable[int] = ()) -> int:
        number = len(self.trace.blocks)
        # Only a recomputation builds a graph in the backward pass.
        again = self._in_backward and torch.is_grad_enabled()
        self.trace.blocks.append(Block(nbytes, op, tuple(shape), again, self._fallback_depth > 0))
        self.trace.events.append(number)
        return number

    def _on_free(self, number: int) -> None:
        if self._open:
            self.trace.events.append(~number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _without_kernel(func, args) if func in _REFUSED_BY_FAKE_TENSORS else func(*args, **kwargs)
        result = self.known.answer(func, args, result)
        if func.namespace != "prim" and not _is_skipped(result):  # queries, like prim::device, are no work
            self.works.append(self._ages.aged(of_call(func, args, kwargs, result), args, kwargs, result))
        if (func is _ADD and self._adds_in_place(args, kwargs)) or (func is _INDEX_PUT and self._is_of_a_derivative()):
            self._hand_over(args[0], result)
            return result
        name = func.__name__
        buffers = () if self._kernel_buffers is None else tuple(self._kernel_buffers(func, args, kwargs, result))
        inside = _Inside(self, name)
        for count, tensor in enumerate(self._results(func, result)):
            inside.allocate(buffer for buffer in buffers if buffer.after_results == count)
            self.note(tensor, name)
        inside.allocate(buffer for buffer in buffers if buffer.after_results is None)
        inside.free_all()
        if self._draws_on_host and self.known.is_of_a_draw(result):
            self.forget([result])
        return result

    def _results(self, func: Any, result: Any) -> Iterator[torch.Tensor]:
        """The tensors that an operator returns, in the order in which the device allocates them."""
        if isinstance(result, torch.Tensor):
            yield result
        elif isinstance(result, (tuple, list)):
            order = self._result_order.get(func)
            if order is not None:
                self._hide(value for place, value in enumerate(result) if place not in order)
            for value in result if order is None else [result[place] for place in order]:
                if isinstance(value, torch.Tensor):
                    yield value
                elif isinstance(value, (tuple, list)):
                    yield from value

    def _adds_in_place(self, args: Any, kwargs: Any) -> bool:
        """Whether the autograd engine is adding two gradients into a buffer that nothing else references.

        For real tensors it then adds in place (`accumulate` and `can_accumulate_inplace` in pytorch's
        torch/csrc/autograd/input_buffer.cpp), for tensor subclasses, which fake tensors are, it never does.
        """
        if not self._in_backward or torch.is_grad_enabled() or kwargs or len(args) != 2 or self._held_once is None:
            return False
        old, new = args
        if not isinstance(new, torch.Tensor) or old.shape != new.shape or old.dtype != new.dtype:
            return False
        counts = (old._use_count(), torch._C._storage_Use_Count(old.untyped_storage()._cdata))
        return counts == self._held_once and _is_dense(old)

    def _is_of_a_derivative(self) -> bool:
        """Whether the backward pass itself calls this, not a recomputation.

        `index_backward` in pytorch's torch/csrc/autograd/FunctionsManual.cpp puts gradients into its zeros in place for
        real tensors, out of place for tensor subclasses.
        """
        return self._in_backward and not torch.is_grad_enabled()

    def _hand_over(self, old: torch.Tensor, result: torch.Tensor) -> None:
        """Reuse the block of `old` for `result`."""
        number = self._alive.forget(old.untyped_storage())
        if number is None:
            self.note(result, "handed over")
        else:
            self._alive.add(result.untyped_storage(), number)


class _Inside:
    """Allocates and frees the buffers inside one call of an operator."""

    def __init__(self, recorder: Recorder, op: str) -> None:
        self._recorder = recorder
        self._op = op
        self._alive: list[tuple[int, int | None]] = []
        """(block, how many more buffers it outlives, None for all), in order of allocation."""

    def allocate(self, buffers: Iterable[KernelBuffer]) -> None:
        for buffer in buffers:
            if not buffer.nbytes:
                continue
            self._alive = [(block, None if left is None else left - 1) for block, left in self._alive]
            number = self._recorder._allocate(buffer.nbytes, f"{self._op}: {buffer.name}")
            self._alive.append((number, buffer.outlives))
            self._free(lambda left: left == 0)

    def free_all(self) -> None:
        self._free(lambda left: True)

    def _free(self, is_due: Callable[[int | None], bool]) -> None:
        due = [block for block, left in self._alive if is_due(left)]
        self._recorder.trace.events.extend(~block for block in reversed(due))  # as C++ destroys locals
        self._alive = [(block, left) for block, left in self._alive if block not in due]


_ADD = torch.ops.aten.add.Tensor
_INDEX_PUT = torch.ops.aten.index_put.default
_REFUSED_BY_FAKE_TENSORS = {torch.ops.aten._grouped_mm.default}
"""Operators whose shape function demands bf16 although the real CPU kernel accepts fp32 too."""


def _is_skipped(result: Any) -> bool:
    """Whether nothing was computed: what a recomputation skips is on the meta device."""
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return isinstance(first, torch.Tensor) and first.device.type == "meta"


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a block without gaps or overlaps."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def _without_kernel(func: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output of a grouped matrix product of (tokens, in) and (groups, in, out), or of two 2-d factors."""
    left, right, offsets = args[0], args[1], args[2]
    if left.dim() == 2 and right.dim() == 2:
        return left.new_empty(len(offsets), left.shape[0], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[-1])


@cache
def _counts_when_held_once() -> tuple[int, int] | None:
    """References to a tensor and to its storage, as seen by a dispatch mode, when only the engine's buffer holds it.

    Read from a case in which that is known: the sum of two gradients with no other use. None if this torch does not
    expose them.
    """
    if not hasattr(torch.Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    seen: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is _ADD and not torch.is_grad_enabled():
                old = args[0]
                storage = old.untyped_storage()
                seen.append((old._use_count(), torch._C._storage_Use_Count(storage._cdata)))
            return result

    with FakeTensorMode(), torch.enable_grad():
        leaf = torch.zeros(2, requires_grad=True)
        with Watch():  # type: ignore[no-untyped-call]
            twice = leaf * 1.0
            (twice.sin() + twice.cos()).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0] if len(seen) == 1 else None


@contextmanager
def as_in_a_real_run(recorder: Recorder, *, notes_random_state: bool) -> Iterator[None]:
    """Undo what differs only because tensors are fake, and record what real runs allocate outside of operators.

    `notes_random_state` is set if the random state that checkpointing saves is in the device's memory: on the CPU.
    CUDA's is saved as a CPU tensor.
    """
    real_state = torch.get_rng_state

    def noted_state() -> torch.Tensor:
        state = real_state()
        if notes_random_state:
            recorder.note(state, "get_rng_state")
        return state

    with ExitStack() as stack:
        # transformers mistakes fake tensors for tracing by a compiler, and would build an explicit mask.
        if hasattr(masking_utils, "find_packed_sequence_indices"):
            find = partial(_nothing_is_packed, masking_utils.find_packed_sequence_indices)
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", find))
        if hasattr(masking_utils, "is_tracing"):
            real_tracing = masking_utils.is_tracing

            def is_tracing(tensor: Any = None) -> bool:
                return not recorder.known.are_ones(tensor) and bool(real_tracing(tensor))

            stack.enter_context(mock.patch.object(masking_utils, "is_tracing", is_tracing))
        # Checkpointing saves the random state of each layer: 5 KB, allocated without an operator.
        stack.enter_context(mock.patch.object(torch, "get_rng_state", noted_state))
        stack.enter_context(mock.patch.object(torch.random, "get_rng_state", noted_state))
        yield


def _nothing_is_packed(find: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Let transformers search for packed sequences, for what that allocates, and find none, as in a batch of full ones.

    It calls `.all()` to see whether every position follows the one before, which fake tensors cannot answer.
    """
    real_all = torch.Tensor.all

    def yes(tensor: torch.Tensor, *rest: Any, **more: Any) -> _Yes:
        return _Yes(real_all(tensor, *rest, **more))

    with (
        mock.patch.object(masking_utils, "is_tracing", lambda *a, **k: False),
        mock.patch.object(torch.Tensor, "all", yes),
        suppress(Exception),  # another version may search in another way; none is found either way
    ):
        find(*args, **kwargs)


class _Yes:
    """A tensor that is true: it outlives the tensor that it was made of, as one that is asked for its value does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __bool__(self) -> bool:
        return True


def saved_on_host(recorder: Recorder) -> AbstractContextManager[Any]:
    """Save what is saved for the backward pass in host memory, and copy it back when it is unpacked.

    Does as torch's `save_on_cpu`: a copy to the host for each pack, a copy back for each unpack.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        on_host = torch.empty_like(tensor)
        recorder.forget([on_host])
        return on_host

    def unpack(on_host: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(on_host)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
