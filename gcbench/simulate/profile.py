"""What one layer adds to a step's memory and time, read off a step in which every layer is treated alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gcbench.costs import Figures, total
from gcbench.simulate.predictor import Step
from gcbench.simulate.stage import HEAD, LOSS


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProfile:
    """One layer in one step; bytes.

    Attributes:
        kept_bytes: alive from its forward to its backward pass.
        forward_bytes: highest while its forward pass runs, above what stood when that began.
        backward_bytes: highest while its backward pass runs, above what stood when that began less what it keeps.
        gradient_bytes: what its backward pass leaves behind.
        seconds: both passes, recomputation included.
    """

    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """A step, layer by layer.

    Attributes:
        layers: their numbers, in the order in which they run.
        profiles: for each of them.
        standing_bytes: alive when the first layer begins.
        head_bytes: highest between the last layer's forward and its backward pass, above all that is kept.
        loss_left_bytes: alive when the last layer's backward pass begins, above all that is kept.
        other_peak_bytes: highest before the first layer, after its backward pass, and in the optimizer step.
    """

    layers: tuple[int, ...]
    profiles: tuple[LayerProfile, ...]
    standing_bytes: int
    head_bytes: int
    loss_left_bytes: int
    other_peak_bytes: int


def profile(step: Step, figures: Figures, *, rounding: int = 1) -> StepProfile | None:
    """The step layer by layer; None where it was traced in full, so that layers are not told apart.

    Sizes are rounded up to multiples of `rounding` bytes, as the device's allocator does.
    """
    assembly = step.assembly
    if not assembly.places:
        return None
    line = assembly.timeline
    sizes = -(-line.nbytes // rounding) * rounding
    taken = line.events >= 0
    blocks = np.where(taken, line.events, ~line.events)
    live = np.concatenate([[0], np.cumsum(np.where(taken, sizes[blocks], -sizes[blocks]))])
    starts = [start for start, _ in assembly.segments]
    ends = [*starts[1:], len(line.events)]
    before: dict[tuple[str, int], int] = {}
    after: dict[tuple[str, int], int] = {}
    highest: dict[tuple[str, int], int] = {}
    for place, start, end in zip(assembly.places, starts, ends, strict=False):
        before[place], after[place] = int(live[start]), int(live[end])
        highest[place] = int(live[start : end + 1].max())
    seconds: dict[tuple[str, int] | None, float] = {}
    known: dict[int, float] = {}
    for segment, works in step.works:
        if id(works) not in known:
            known[id(works)] = total(works, figures)
        seconds[segment] = known[id(works)]
    layers = tuple(layer for part, layer in assembly.places if part == "forward")
    profiles = []
    for layer in layers:
        there, back = ("forward", layer), ("backward", layer)
        kept = after[there] - before[there]
        profiles.append(
            LayerProfile(
                kept_bytes=kept,
                forward_bytes=highest[there] - before[there],
                backward_bytes=highest[back] - before[back] + kept,
                gradient_bytes=after[back] - before[back] + kept,
                seconds=seconds[there] + seconds[back],
            )
        )
    standing = before["forward", layers[0]]
    all_kept = sum(layer.kept_bytes for layer in profiles)
    outside = [place for place in assembly.places if place[1] < 0 and place not in (HEAD, LOSS)]
    update = starts[len(assembly.places)]
    return StepProfile(
        layers=layers,
        profiles=tuple(profiles),
        standing_bytes=standing,
        head_bytes=max(highest[HEAD], highest[LOSS]) - standing - all_kept,
        loss_left_bytes=before["backward", layers[-1]] - standing - all_kept,
        other_peak_bytes=max([int(live[update:].max()), *(highest[place] for place in outside)]),
    )
