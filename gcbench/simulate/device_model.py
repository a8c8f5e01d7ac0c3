"""Describes a target device: how a step for it is traced on fake CPU tensors, and what it holds besides the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from gcbench.core.prediction import Term
from gcbench.devices.target import Target
from gcbench.simulate.compose.block_kinds import Kind
from gcbench.simulate.compose.resident import ResidentMemory
from gcbench.simulate.cuda.attention import CudaAttention
from gcbench.simulate.cuda.kernels import as_on_cuda
from gcbench.simulate.cuda.result_order import ON_CUDA
from gcbench.simulate.events import KernelBuffer
from gcbench.simulate.trace.fake_model import CPU_TRACE, TraceMode


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """All that a target changes.

    Attributes:
        resident: blocks that the device's libraries allocate through the allocator and never free.
        outside_bytes: memory of the process on the device outside of the allocator.
        terms: both, by name and source.
        attention: which kernels attention chose, once something was traced; None if there is no choice.
    """

    trace_mode: TraceMode
    resident: tuple[ResidentMemory, ...] = ()
    outside_bytes: int = 0
    terms: tuple[Term, ...] = ()
    attention: CudaAttention | None = None


def device_model_for(target: Target) -> DeviceModel:
    """The trace mode of a target, its persistent memory and its choice of attention kernels."""
    if target.kind == "cpu":
        return DeviceModel(trace_mode=CPU_TRACE)
    from gcbench.simulate.cuda import attention_buffers, workspaces

    attention = CudaAttention(target)

    @contextmanager
    def patches() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(as_on_cuda(target))
            stack.enter_context(attention)
            yield

    def kernel_buffers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[KernelBuffer]:
        yield from attention_buffers.internal_buffers(func, args, kwargs, target)
        yield from workspaces.internal_buffers(func, args, kwargs, result, target)

    known = workspaces.persistent_terms(target)
    return DeviceModel(
        trace_mode=TraceMode(
            patches=patches, kernel_buffers=kernel_buffers, notes_random_state=False, result_order=ON_CUDA
        ),
        resident=tuple(
            ResidentMemory(
                name=term.name,
                nbytes=term.nbytes,
                kind=Kind.RESIDENT,
                requested_at=term.requested_at,
                requested_by=term.requested_by,
            )
            for term in known
            if term.in_allocator
        ),
        outside_bytes=sum(term.nbytes for term in known if not term.in_allocator),
        terms=tuple(
            Term(name=term.name, nbytes=term.nbytes, in_allocator=term.in_allocator, source=term.source)
            for term in known
        ),
        attention=attention,
    )
