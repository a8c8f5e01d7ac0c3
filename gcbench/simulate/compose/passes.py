"""Composes the passes of a whole model from the traces of a few representative layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from gcbench.simulate.compose.layer_traces import LayerTraces, Ref, SectionTrace, sections_in_order
from gcbench.simulate.trace.fake_model import LOSS, REST, NotComposable, Section

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward and backward pass of a whole model.

    Attributes:
        instances: (section, its trace, number of its first block), in order of time.
        events: `n` for the allocation of block n, `~n` for its release.
        num_blocks: blocks are numbered from 0 on.
        bases: section -> number of the first block allocated in it.
        backward_at: number of events before the backward pass.
        starts: number of events before each instance.
        layer_inputs: for each layer in order, the block of its input; -1 if the step does not allocate it.
        update_at: number of events before the optimizer steps: those after it free what the loss holds.
        events_after: for sections outside the layers, how many events there are after each event of their trace.
    """

    instances: tuple[tuple[Section, SectionTrace, int], ...]
    events: Ints
    num_blocks: int
    bases: Mapping[Section, int]
    backward_at: int
    starts: Ints
    layer_inputs: tuple[int, ...]
    update_at: int
    events_after: Mapping[Section, Ints] = field(default_factory=dict)

    def moment(self, section: Section, offset: int) -> int:
        """Number of events up to and with the first `offset` of a section's trace."""
        place = next(place for place, (other, _, _) in enumerate(self.instances) if other == section)
        within = self.events_after.get(section)
        return int(self.starts[place]) + (offset if within is None or offset == 0 else int(within[offset - 1]))

    def first(self, ops: Collection[str], *, backward: bool) -> int | None:
        """Number of events up to and with the first result of one of `ops` in a pass; None if none runs in it."""
        for start, (_, trace, base) in zip(self.starts.tolist(), self.instances, strict=True):
            if (start >= self.backward_at) == backward:
                for number, block in enumerate(trace.blocks):
                    if block.op in ops:
                        return int(start) + int(np.argmax(self.events[start:] == base + number)) + 1
        return None

    def nbytes(self) -> Ints:
        """The size of each block."""
        sizes = {id(trace): np.array([b.nbytes for b in trace.blocks], np.int64) for _, trace, _ in self.instances}
        return np.concatenate([np.zeros(0, np.int64), *(sizes[id(trace)] for _, trace, _ in self.instances)])


def compose_passes(traces: LayerTraces, layers: Sequence[int], represented_by: Sequence[int]) -> Passes:
    """The passes of a model whose layers `layers` (in order) behave as the traced layers `represented_by` do.

    Raises NotComposable when the traces do not fit: a block freed twice, or before it was allocated.
    """
    traced_as = dict(zip(layers, represented_by, strict=True))
    instances = _instances(traces, layers, traced_as)
    bases = {section: base for section, _, base in instances}
    num_blocks = sum(len(trace.blocks) for _, trace, _ in instances)
    sections, events_after = _section_events(instances, bases, layers, traced_as)
    events = np.concatenate(sections) if sections else np.zeros(0, np.int64)
    starts = np.cumsum([0, *(len(section) for section in sections)])[:-1]
    _check(events, num_blocks)
    loss = next(number for number, (section, _, _) in enumerate(instances) if section == LOSS)
    inputs = [traces.layer_inputs.get(traced_as[layer]) for layer in layers]
    layer_inputs = [
        -1 if home is None else bases[_resolve(home[0], here, layers)] + home[1] for here, home in enumerate(inputs)
    ]
    passes = Passes(
        instances=instances,
        events=events,
        num_blocks=num_blocks,
        bases=bases,
        backward_at=int(starts[loss]),
        starts=starts,
        layer_inputs=tuple(layer_inputs),
        update_at=len(events),
        events_after=events_after,
    )
    if traces.update_at is None:
        return passes
    return replace(passes, update_at=passes.moment(instances[-1][0], traces.update_at[1]))


def _instances(
    traces: LayerTraces, layers: Sequence[int], traced_as: Mapping[int, int]
) -> tuple[tuple[Section, SectionTrace, int], ...]:
    """Every section with its trace and the number of its first block."""
    instances: list[tuple[Section, SectionTrace, int]] = []
    num_blocks = 0
    for section in sections_in_order(layers):
        name = (section[0], traced_as[section[1]]) if section[1] >= 0 else section
        trace = traces.by_section.get(name)
        if trace is None and section == REST:
            continue
        if trace is None:
            raise NotComposable("a layer has no backward pass")
        instances.append((section, trace, num_blocks))
        num_blocks += len(trace.blocks)
    return tuple(instances)


def _section_events(
    instances: Sequence[tuple[Section, SectionTrace, int]],
    bases: Mapping[Section, int],
    layers: Sequence[int],
    traced_as: Mapping[int, int],
) -> tuple[list[Ints], dict[Section, Ints]]:
    """The events of every section, and for those outside the layers the numbers that `Passes.events_after` has."""
    represented: dict[int, list[int]] = {}
    for layer, traced in traced_as.items():
        represented.setdefault(traced, []).append(layer)
    copies = {layer: represented[traced] for layer, traced in traced_as.items()}
    order = {layer: turn for turn, layer in enumerate(layers)}
    freed = np.zeros(sum(len(trace.blocks) for _, trace, _ in instances), np.bool_)
    sections: list[Ints] = []
    events_after: dict[Section, Ints] = {}
    for section, trace, _ in instances:
        if section[1] < 0:
            events, events_after[section] = _outside(trace, bases, copies, freed)
        else:
            events = _inside(trace, bases, layers, order[section[1]])
        freed[~events[events < 0]] = True
        sections.append(events)
    return sections, events_after


def _inside(trace: SectionTrace, bases: Mapping[Section, int], layers: Sequence[int], here: int) -> Ints:
    """The events of one pass of the layer that is number `here` in order."""
    first_blocks = np.array([bases[_resolve(ref, here, layers)] for ref in trace.refs], np.int64)
    blocks = first_blocks[trace.ref] + trace.number if len(trace.ref) else trace.number
    return np.where(trace.frees, ~blocks, blocks)


def _resolve(ref: Ref, here: int, layers: Sequence[int]) -> Section:
    """The section that a reference from the layer `here` means."""
    part, distance = ref
    if part not in ("forward", "backward"):
        return ref
    there = here + distance
    if not 0 <= there < len(layers):
        raise NotComposable("layers far from each other hold the same memory")
    return (part, layers[there])


def _outside(
    trace: SectionTrace,
    bases: Mapping[Section, int],
    copies: Mapping[int, Sequence[int]],
    freed: npt.NDArray[np.bool_],
) -> tuple[Ints, Ints]:
    """The events of a section outside the layers, and how many there are after each event of the trace.

    Where it frees a block of a traced layer, it frees that of every layer represented by it which still holds it: the
    next layer frees the output of a layer, and the head that of the last but one.
    """
    events: list[int] = []
    after: list[int] = []
    for number, frees, code in zip(trace.number.tolist(), trace.frees.tolist(), trace.ref.tolist(), strict=True):
        part, layer = trace.refs[code]
        homes: Sequence[Section] = [(part, other) for other in copies[layer]] if layer >= 0 else [(part, layer)]
        blocks = [bases[home] + number for home in homes]
        events.extend(~block if frees else block for block in blocks if not (frees and layer >= 0 and freed[block]))
        after.append(len(events))
    return np.array(events, np.int64), np.array(after, np.int64)


def _check(events: Ints, num_blocks: int) -> None:
    """Each block is allocated once, and freed at most once and later."""
    times = np.arange(len(events))
    allocates, frees = events >= 0, events < 0
    allocated_at = np.full(num_blocks, -1, np.int64)
    allocated_at[events[allocates]] = times[allocates]
    freed = ~events[frees]
    if np.count_nonzero(allocates) != num_blocks or (allocated_at < 0).any():
        raise NotComposable("a block is allocated twice")
    if len(np.unique(freed)) != len(freed) or (allocated_at[freed] > times[frees]).any():
        raise NotComposable("a block is freed twice, or before it is allocated")
