"""How a step on fake CPU tensors becomes that of a device, and what that device holds besides it."""

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
from gcbench.simulate.trace.fake_model import CPU_TRACE, TraceMode


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """All that a target changes.

    Attributes:
        standing: blocks that the device's libraries take through the allocator, and keep.
        outside_bytes: what the process takes of the device outside of the allocator.
        terms: both, by name and source.
        attention: which kernels attention chose, once something was traced; None where there is nothing to choose.
    """

    trace_mode: TraceMode
    resident: tuple[ResidentMemory, ...] = ()
    outside_bytes: int = 0
    terms: tuple[Term, ...] = ()
    attention: CudaAttention | None = None


def device_model_for(target: Target) -> DeviceModel:
    """The road to a target, its standing terms and what its attention chooses."""
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

    def internals(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[tuple[str, int]]:
        for inside in attention_buffers.internal_buffers(func, args, kwargs, target):
            yield inside.name, inside.nbytes
        for other in workspaces.internal_buffers(func, args, kwargs, result, target):
            yield other.name, other.nbytes

    known = workspaces.persistent_terms(target)
    return DeviceModel(
        trace_mode=TraceMode(patches=patches, internals=internals, notes_random_state=False, result_order=ON_CUDA),
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
