"""Reads what one layer adds to a step's memory and time off a step in which every layer has the same policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gcbench.simulate.costs import Figures, total
from gcbench.simulate.predictor import Step
from gcbench.simulate.trace.fake_model import HEAD, LOSS


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProfile:
    """Memory and time of one layer in one step.

    Attributes:
        left_bytes: allocated when its forward pass ends, above what was when it began. Includes weights cast by
            autocast, which caches them until the forward pass of the model ends.
        forward_bytes: peak of its forward pass, above the same.
        freed_bytes: what its backward pass frees, less what it leaves allocated.
        backward_bytes: peak of its backward pass, above what was allocated when that began.
        seconds: time of both passes, recomputation included.
    """

    left_bytes: int
    forward_bytes: int
    freed_bytes: int
    backward_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """A step in which all layers have the same policy: each layer, and the peaks of the other parts.

    Attributes:
        layers: their numbers, in the order in which they run.
        profiles: one for each layer.
        standing_bytes: allocated when the first layer begins.
        head_bytes: peak of the forward pass of what follows the last layer.
        loss_bytes: peak of its backward pass.
        before_backward_bytes: allocated when the last layer's backward pass begins.
        other_bytes: peak before the first layer, after its backward pass, and in the optimizer step.
    """

    layers: tuple[int, ...]
    profiles: tuple[LayerProfile, ...]
    standing_bytes: int
    head_bytes: int
    loss_bytes: int
    before_backward_bytes: int
    other_bytes: int


def profile(step: Step, figures: Figures, *, rounding: int = 1) -> StepProfile | None:
    """The step layer by layer; None where it was traced in full, without a distinction of layers.

    Sizes are rounded up to multiples of `rounding` bytes, as the device's allocator does.
    """
    assembly = step.assembly
    if not assembly.sections:
        return None
    line = assembly.timeline
    sizes = -(-line.nbytes // rounding) * rounding
    are_allocations = line.events >= 0
    blocks = np.where(are_allocations, line.events, ~line.events)
    live = np.concatenate([[0], np.cumsum(np.where(are_allocations, sizes[blocks], -sizes[blocks]))])
    starts = [start for start, _ in assembly.section_starts]
    ends = [*starts[1:], len(line.events)]
    before: dict[tuple[str, int], int] = {}
    after: dict[tuple[str, int], int] = {}
    highest: dict[tuple[str, int], int] = {}
    for place, start, end in zip(assembly.sections, starts, ends, strict=False):
        before[place], after[place] = int(live[start]), int(live[end])
        highest[place] = int(live[start : end + 1].max())
    seconds: dict[tuple[str, int] | None, float] = {}
    known: dict[int, float] = {}
    for segment, works in step.works:
        if id(works) not in known:
            known[id(works)] = total(works, figures)
        seconds[segment] = known[id(works)]
    layers = tuple(layer for part, layer in assembly.sections if part == "forward")
    outside = [place for place in assembly.sections if place[1] < 0 and place not in (HEAD, LOSS)]
    update = starts[len(assembly.sections)]
    return StepProfile(
        layers=layers,
        profiles=tuple(
            LayerProfile(
                left_bytes=after["forward", layer] - before["forward", layer],
                forward_bytes=highest["forward", layer] - before["forward", layer],
                freed_bytes=before["backward", layer] - after["backward", layer],
                backward_bytes=highest["backward", layer] - before["backward", layer],
                seconds=seconds["forward", layer] + seconds["backward", layer],
            )
            for layer in layers
        ),
        standing_bytes=before["forward", layers[0]],
        head_bytes=highest[HEAD],
        loss_bytes=highest[LOSS],
        before_backward_bytes=before["backward", layers[-1]],
        other_bytes=max([int(live[update:].max()), *(highest[place] for place in outside)]),
    )
