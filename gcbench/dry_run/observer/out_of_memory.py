"""Records every time the card's memory runs out: where, in which phase, and what was allocated then."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from . import places
from .phases import Phases

MOST_EVENTS = 20
MOST_GROUPS = 8
PARAMETERS, GRADIENTS, STATES, BUFFERS, BY_LINE, BACKWARD, REST = (
    "parameters",
    "gradients",
    "optimizer states",
    "buffers",
    "by line",
    "backward",
    "rest",
)


class OutOfMemory:
    """The times at which an allocation failed.

    Args:
        torch: the module.
        on_event: is called after each.

    Attributes:
        events: one JSON object each; `first_after` is the number of steps that were finished.
    """

    def __init__(self, torch: Any, phases: Phases, on_event: Callable[[], object]) -> None:
        self._torch = torch
        self._phases = phases
        self._on_event = on_event
        self.count = 0
        self.events: list[dict[str, Any]] = []

    def attach(self) -> None:
        """Ask PyTorch to report failed allocations; CUDA must be initialised."""
        self._torch._C._cuda_attach_out_of_memory_observer(self._observe)

    def _observe(self, device: int, requested: int, limit: int, free: int) -> None:
        try:
            self.count += 1
            event = self._event(device, requested, limit, free, detailed=len(self.events) < MOST_EVENTS)
            if len(self.events) < MOST_EVENTS:
                self.events.append(event)
            else:  # the last one tells whether training went on
                self.events[-1] = event
            self._on_event()
        except Exception as err:
            print(f"gcbench: what was allocated cannot be told ({err})", file=sys.stderr)

    def _event(self, device: int, requested: int, limit: int, free: int, *, detailed: bool) -> dict[str, Any]:
        cuda = self._torch.cuda
        frames = places.stack(sys._getframe())  # of the observer's own frames none is kept
        return {
            "number": self.count,
            "device": device,
            "requested": requested,
            "limit": limit,
            "free": free,
            "allocated": cuda.memory_allocated(device),
            "reserved": cuda.memory_reserved(device),
            "phase": self._phases.phase,
            "done_steps": self._phases.done_steps,
            "place": places.user_place(frames),
            "library_place": places.library_place(frames),
            "alive": alive(self._torch, device) if detailed else [],
        }


def alive(torch: Any, device: int) -> list[dict[str, Any]]:
    """Return what is allocated on a card, in groups: by what a tensor is for, else by the line that allocated it."""
    owners = _owners(torch)
    sizes: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    for segment in torch._C._cuda_memorySnapshot(None)["segments"]:
        if segment["device"] != device:
            continue
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                continue
            owner = owners.get(block["address"])
            group = sizes[(owner, "", 0) if owner else _line_of(block.get("frames") or [])]
            group[0] += block["size"]
            group[1] += 1
    ordered = sorted(sizes.items(), key=lambda item: -item[1][0])
    return [_described(key, value) for key, value in _shortened(ordered)]


def _shortened(
    ordered: list[tuple[tuple[str, str, int], list[int]]],
) -> Iterable[tuple[tuple[str, str, int], list[int]]]:
    """Yield the named groups and the largest lines, then the sum of the other lines."""
    lines = 0
    rest = [0, 0]
    for key, value in ordered:
        if key[0] == BY_LINE:
            lines += 1
            if lines > MOST_GROUPS:
                rest = [rest[0] + value[0], rest[1] + value[1]]
                continue
        yield key, value
    if rest[1]:
        yield (REST, "", 0), rest


def _described(key: tuple[str, str, int], value: list[int]) -> dict[str, Any]:
    kind, file, line = key
    return {
        "kind": kind,
        "bytes": value[0],
        "count": value[1],
        "file": file or None,
        "line": line or None,
        "function": places.qualified_name(file, line) if file else None,
    }


def _line_of(frames: list[dict[str, Any]]) -> tuple[str, str, int]:
    """Return the group of a block: the innermost line outside torch; without one, the backward pass made it."""
    in_torch = None
    for frame in frames:  # innermost first
        library = places.library_of(frame["filename"])
        if library == "torch" and "/optim/" in frame["filename"]:
            return ("optimizer", "", 0)
        if library not in ("torch", "python", "gcbench"):
            return (BY_LINE, frame["filename"], frame["line"])
        if library == "torch" and in_torch is None:
            in_torch = (BY_LINE, frame["filename"], frame["line"])
    return in_torch or (BACKWARD, "", 0)


def _owners(torch: Any) -> dict[int, str]:
    """Return address -> what a tensor is for: all parameters, their gradients, buffers and optimizer states."""
    found: dict[int, str] = {}
    parameters, modules, optimizers = [], [], []
    for thing in gc.get_objects():
        kind = type(thing)  # asking isinstance would wake lazy objects
        if issubclass(kind, torch.nn.Parameter):
            parameters.append(thing)
        elif issubclass(kind, torch.nn.Module):
            modules.append(thing)
        elif issubclass(kind, torch.optim.Optimizer):
            optimizers.append(thing)
    for module in modules:
        _note(found, torch, (each for each in vars(module).get("_buffers", {}).values()), BUFFERS)
        parameters += [each for each in vars(module).get("_parameters", {}).values() if each is not None]
    for optimizer in optimizers:
        for state in vars(optimizer).get("state", {}).values():
            if isinstance(state, dict):
                _note(found, torch, state.values(), STATES)
    _note(found, torch, (each.grad for each in parameters if each.is_leaf), GRADIENTS)
    _note(found, torch, parameters, PARAMETERS)
    return found


def _note(found: dict[int, str], torch: Any, tensors: Iterable[Any], name: str) -> None:
    for tensor in tensors:
        if issubclass(type(tensor), torch.Tensor) and tensor.is_cuda:
            try:
                found[tensor.untyped_storage().data_ptr()] = name
            except (RuntimeError, NotImplementedError):  # a subclass without storage
                continue
