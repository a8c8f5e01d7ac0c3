"""Cuts a layered trace into the traces of its sections, from which passes of any number of layers are composed.

The trace of a section is what one layer does in one pass: the blocks that it allocates, and those, its own or others',
that it frees. Others' are named by where they were allocated: so many layers away, or in a section outside the layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gcbench.simulate.costs import Work
from gcbench.simulate.events import Block
from gcbench.simulate.trace.fake_model import BEFORE, HEAD, LOSS, REST, LayeredTrace, NotComposable, Section

Ints = npt.NDArray[np.int64]
Ref = tuple[str, int]
"""Where a block was allocated: ("forward", layers away), ("backward", layers away), or a section outside the layers."""


@dataclass(frozen=True, kw_only=True)
class SectionTrace:
    """What happens in one section.

    Attributes:
        blocks: those allocated in it.
        number: for each event, the block's number within the section in which it was allocated.
        frees: whether the event frees the block.
        ref: for each event, an index into `refs`.
        works: the work of its operators, in order.
    """

    blocks: tuple[Block, ...]
    number: Ints
    frees: npt.NDArray[np.bool_]
    ref: Ints
    refs: tuple[Ref, ...]
    works: tuple[Work, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerTraces:
    """All sections of one trace, and where the gradients lie.

    Attributes:
        by_section: in order of time.
        gradients: id of a parameter -> (section, number of the block within it).
        layer_inputs: layer -> (where its input was allocated relative to it, number of the block there).
        accumulated: id of a parameter -> (section, number of its events before the gradient was complete).
        update_at: (section, number of its events before the optimizer would step); None for all.
    """

    by_section: Mapping[Section, SectionTrace]
    gradients: Mapping[int, tuple[Section, int]]
    layer_inputs: Mapping[int, tuple[Ref, int]]
    accumulated: Mapping[int, tuple[Section, int]] = field(default_factory=dict)
    update_at: tuple[Section, int] | None = None


def cut(layered: LayeredTrace) -> LayerTraces:
    """Cut a trace at its sections; raises NotComposable when they are not those of layers run one by one."""
    starts = [start for start, _ in layered.sections]
    names = [name for _, name in layered.sections]
    layers = _layer_order(names)
    in_order = sections_in_order(layers)
    if len(set(names)) != len(names) or names != (in_order if names[-1] == REST else in_order[:-1]):
        raise NotComposable("the layers' passes are not in order")
    order = {layer: turn for turn, layer in enumerate(layers)}
    homes: dict[int, tuple[Section, int]] = {}
    by_section: dict[Section, SectionTrace] = {}
    ends = [*starts[1:], len(layered.trace.events)]
    works_of = layered.works or [()] * len(names)
    for name, start, end, works in zip(names, starts, ends, works_of, strict=True):
        by_section[name] = _section_trace(layered, name, range(start, end), works, homes, order)
    return LayerTraces(
        by_section=by_section,
        gradients=_gradient_homes(layered, homes),
        layer_inputs={
            layer: (_relative(("forward", layer), homes[block][0], order), homes[block][1])
            for layer, block in layered.layer_inputs.items()
            if block in homes
        },
        accumulated={param: _within(moment, starts, names) for param, moment in layered.accumulated.items()},
        update_at=None if layered.update_at is None else _within(layered.update_at, starts, names),
    )


def sections_in_order(layers: Sequence[int]) -> list[Section]:
    """The sections of a step whose layers run one by one; the last, `REST`, may be absent."""
    forward: list[Section] = [("forward", layer) for layer in layers]
    backward: list[Section] = [("backward", layer) for layer in reversed(layers)]
    return [BEFORE, *forward, HEAD, LOSS, *backward, REST]


def _section_trace(
    layered: LayeredTrace,
    name: Section,
    places: range,
    works: tuple[Work, ...],
    homes: dict[int, tuple[Section, int]],
    order: Mapping[int, int],
) -> SectionTrace:
    """The trace of the section whose events are at `places`.

    `homes` has for every block allocated so far its section and its number within it; those of this one are added.
    """
    allocated: list[Block] = []
    numbers: list[int] = []
    refs: dict[Ref, int] = {}
    codes: list[int] = []
    frees: list[bool] = []
    for event in layered.trace.events[places.start : places.stop]:
        block = event if event >= 0 else ~event
        if event >= 0:
            homes[block] = (name, len(allocated))
            allocated.append(layered.trace.blocks[block])
        elif block not in homes:
            raise NotComposable("the step frees memory that was allocated before it")
        home, number = homes[block]
        numbers.append(number)
        codes.append(refs.setdefault(_relative(name, home, order), len(refs)))
        frees.append(event < 0)
    return SectionTrace(
        blocks=tuple(allocated),
        number=np.array(numbers, np.int64),
        frees=np.array(frees, np.bool_),
        ref=np.array(codes, np.int64),
        refs=tuple(refs),
        works=works,
    )


def _gradient_homes(layered: LayeredTrace, homes: Mapping[int, tuple[Section, int]]) -> dict[int, tuple[Section, int]]:
    """id of a parameter -> (section, number within it) of its gradient's block."""
    if any(block not in homes for block in layered.gradients.values()):
        raise NotComposable("a gradient was allocated before the step")
    return {param: homes[block] for param, block in layered.gradients.items()}


def _within(moment: int, starts: Sequence[int], names: Sequence[Section]) -> tuple[Section, int]:
    """A number of events before a moment of the step, as (section, number of its own events before it)."""
    place = bisect_right(starts, max(moment - 1, 0)) - 1
    return names[place], moment - starts[place]


def _layer_order(names: Sequence[Section]) -> list[int]:
    return [layer for part, layer in names if part == "forward"]


def _relative(here: Section, home: Section, order: Mapping[int, int]) -> Ref:
    """How `here` refers to `home`: by distance between layers, by name otherwise."""
    if here[1] < 0 or home[1] < 0:
        return home
    return (home[0], order[home[1]] - order[here[1]])
