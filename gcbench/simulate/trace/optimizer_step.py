"""Traces the optimizer phase by itself: what it allocates and keeps for a list of parameters, whatever their layers.

Optimizers do the same for every parameter of one shape and dtype, either one after the other or all in one operator
(foreach). So a few are traced, chosen such that every neighbourhood is among them, and the trace is unrolled to all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gcbench.simulate.costs import Work
from gcbench.simulate.events import Block
from gcbench.simulate.trace.fake_model import CPU_TRACE, TraceMode
from gcbench.simulate.trace.recorder import Recorder, as_in_a_real_run
from gcbench.simulate.trace.representative_layers import sample
from gcbench.training.step import Update


@dataclass(frozen=True, kw_only=True)
class UpdateTrace:
    """The first optimizer phase, which makes the states, and every later one.

    Blocks are numbered from 0: the gradients, one for each parameter, then what the phases allocate. Both phases end
    by freeing the gradients.

    Attributes:
        owners: for each block, the parameter it serves; -1 for none.
        is_loop: whether parameters are handled one after the other. A loop's variables hold what was assigned for one
            parameter until they are assigned for the next.
        first, later: events; `n` for the allocation of block n, `~n` for its release.
        works: the work of a later phase's operators, for the parameters that were traced.
        times: for each of the works, how often it is done for all parameters: in a loop, once for each that the traced
            one represents; in an operator on lists, the ratio of all bytes to the traced ones.
    """

    num_params: int
    blocks: tuple[Block, ...]
    owners: tuple[int, ...]
    is_loop: bool
    first: tuple[int, ...]
    later: tuple[int, ...]
    works: tuple[Work, ...] = ()
    times: tuple[float, ...] = ()

    @property
    def own(self) -> tuple[Block, ...]:
        """The blocks that the phases allocate: all but the gradients."""
        return self.blocks[self.num_params :]

    @property
    def states(self) -> tuple[int, ...]:
        """Blocks that the first phase allocates and keeps."""
        freed = {~event for event in self.first if event < 0}
        return tuple(event for event in self.first if event >= 0 and event not in freed)


def trace_update(
    params: Sequence[torch.Tensor],
    *,
    precision: str,
    optim: str,
    trace_mode: TraceMode = CPU_TRACE,
    steps_on_device: bool = True,
    every_one: bool = False,
) -> UpdateTrace:
    """Trace the optimizer phase for trained parameters of these shapes and dtypes, which all have a gradient.

    If not `steps_on_device`, the optimizer's step counters are in host memory and are left out. With `every_one`,
    every parameter is traced, which takes milliseconds each.
    """
    chosen = sample([] if every_one else [(p.shape, p.stride(), p.dtype) for p in params])
    traced, served = _trace(
        params if every_one else [params[number] for number in chosen.representatives],
        precision=precision,
        optim=optim,
        trace_mode=trace_mode,
        steps_on_device=steps_on_device,
    )
    if every_one:
        return traced
    position = {number: place for place, number in enumerate(chosen.representatives)}
    represented_by = [position[number] for number in chosen.represented_by]
    some = sum(params[number].nbytes for number in chosen.representatives)
    times = {_ALL: sum(param.nbytes for param in params) / some if some else 1.0, _NONE: 1.0, **Counter(represented_by)}
    # One that represents none was traced as a neighbour.
    return replace(_unrolled(traced, represented_by), times=tuple(float(times.get(owner, 0)) for owner in served))


_NEW_NUMBER = "lift_fresh.default"
"""What `torch.tensor(1.0)` is."""

_NONE, _ALL = -1, -2
"""Owners of what serves no parameter, or more than one; and of what is done for a list of all of them."""


class _Attributing(Recorder):  # type: ignore[no-untyped-call]
    """Also notes which parameter each block serves: that of the tensors it was computed from.

    A foreach operator makes one result for each tensor in its first list.
    """

    def __init__(self, trace_mode: TraceMode) -> None:
        super().__init__(trace_mode.kernel_buffers)
        self.owners: dict[int, int] = {}
        self.is_loop = True
        self.served: list[int] = []
        """For each of the works, the parameter it serves, or `_NONE`, or `_ALL`."""
        self.states: Callable[[], Iterable[tuple[torch.Tensor, int]]] = tuple
        """The optimizer's states and their parameters: created from no tensor, each serves its own parameter."""

    def own(self, tensor: torch.Tensor, owner: int) -> int:
        number = self.number(tensor)
        assert number is not None
        self.owners[number] = owner
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, worked = len(self.trace.blocks), len(self.works)
        if func.__name__.startswith("_foreach"):
            self.is_loop = False
        result = super().__torch_dispatch__(func, types, args, kwargs)
        allocated = range(before, len(self.trace.blocks))
        inputs = (*args, *(kwargs or {}).values())
        for number in allocated:
            each = (args[0][(number - before) % len(args[0])],) if args and _are_tensors(args[0]) else inputs
            owner = self._owner(each)
            if owner >= 0:
                self.owners[number] = owner
        if len(self.works) > worked:
            self.served.append(_ALL if any(map(_are_tensors, args)) else self._owner(inputs))
        return result

    def _owner(self, sources: Iterable[Any]) -> int:
        """The one parameter that these serve, or `_NONE`."""
        used = {self.number(source) for source in tree_leaves(sources) if isinstance(source, torch.Tensor)}
        if any(block is not None and block not in self.owners for block in used):
            for tensor, owner in self.states():
                if self.number(tensor) is not None:
                    self.own(tensor, owner)
        owners = {self.owners[block] for block in used if block in self.owners}
        return owners.pop() if len(owners) == 1 else _NONE


def _are_tensors(value: Any) -> bool:
    """Whether it is a list of tensors."""
    return isinstance(value, (list, tuple)) and isinstance(next(iter(value), None), torch.Tensor)


def _trace(
    params: Sequence[torch.Tensor], *, precision: str, optim: str, trace_mode: TraceMode, steps_on_device: bool
) -> tuple[UpdateTrace, list[int]]:
    """The trace, and for each of its works the parameter that it serves."""
    recorder = _Attributing(trace_mode)
    with ExitStack() as stack:
        stack.enter_context(as_in_a_real_run(recorder, notes_random_state=trace_mode.notes_random_state))
        stack.enter_context(trace_mode.patches())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        own = [torch.nn.Parameter(torch.empty_strided(p.size(), p.stride(), dtype=p.dtype)) for p in params]
        update = Update(own, precision=precision, optim=optim, device_type="cpu")
        recorder.states = lambda: ((value, place) for _, value, place in _states(own, update.optimizer))
        stack.enter_context(recorder)
        gradients, spans = _two_updates(recorder, own, update)
        recorder.close()
    counters: set[int] = set()
    for name, value, position in _states(own, update.optimizer):
        if recorder.number(value) is not None:
            number = recorder.own(value, position)
            counters |= {number} if name == "step" else set()
    if counters:  # beside them lies the number that is added to them
        counters |= {number for number, block in enumerate(recorder.trace.blocks) if block.op == _NEW_NUMBER}
    omitted = set() if steps_on_device else counters
    return _phases(recorder, gradients, spans, omitted), recorder.served


def _states(
    params: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name, tensor, position of its parameter) for each tensor in the optimizer's state."""
    for position, param in enumerate(params):
        for name, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                yield name, value, position


def _two_updates(
    recorder: _Attributing, params: Sequence[torch.nn.Parameter], update: Update
) -> tuple[dict[int, int], list[range]]:
    """Run the first optimizer phase and a later one.

    Returns block of a gradient -> position of its parameter, and for each phase the events that it consists of.
    """
    gradients: dict[int, int] = {}
    spans: list[range] = []
    for position, param in enumerate(params):
        recorder.note(param, None)
        recorder.own(param, position)
    for _ in range(2):
        update.scaled(torch.zeros(()))
        for position, param in enumerate(params):
            param.grad = torch.empty_like(param)
            gradients[recorder.own(param.grad, position)] = position
        start = len(recorder.trace.events)
        recorder.works.clear()
        recorder.served.clear()
        recorder.cool()  # the passes lie between
        update()
        spans.append(range(start, len(recorder.trace.events)))
    return gradients, spans


def _phases(
    recorder: _Attributing, gradients: Mapping[int, int], spans: Sequence[range], omitted: Collection[int]
) -> UpdateTrace:
    """The phases with their blocks numbered as `UpdateTrace` has them, the gradients first, without those `omitted`."""
    numbers = dict(gradients)
    num_params = len(set(gradients.values()))
    blocks = [Block(0, None)] * num_params
    owners = list(range(num_params))
    for block, position in gradients.items():
        blocks[position] = recorder.trace.blocks[block]
    phases: list[tuple[int, ...]] = []
    for span in spans:
        events: list[int] = []
        for event in recorder.trace.events[span.start : span.stop]:
            block = event if event >= 0 else ~event
            if block in omitted:
                continue
            if block not in numbers:
                if event < 0:
                    continue  # allocated before the phase, like the scaler's own tensors
                numbers[block] = len(blocks)
                blocks.append(recorder.trace.blocks[block])
                owners.append(recorder.owners.get(block, -1))
            events.append(numbers[block] if event >= 0 else ~numbers[block])
        phases.append(tuple(events))
    first, later = phases
    return UpdateTrace(
        num_params=num_params,
        blocks=tuple(blocks),
        owners=tuple(owners),
        is_loop=recorder.is_loop,
        first=first,
        later=later,
        works=tuple(recorder.works),
        times=(1.0,) * len(recorder.works),
    )


@dataclass(frozen=True, slots=True)
class _Event:
    """One event of a wave: the n-th block of a parameter, or of the one `before` it, is allocated or freed."""

    ordinal: int
    frees: bool
    before: bool


def _unrolled(traced: UpdateTrace, represented_by: Sequence[int]) -> UpdateTrace:
    """The trace for parameters of which the n-th is represented by the traced one `represented_by[n]`."""
    ordinals, members = _ordinals(traced)
    blocks = [traced.blocks[param] for param in represented_by]
    owners = list(range(len(represented_by)))
    numbers: dict[tuple[int, int], int] = {(n, 0): n for n in range(len(represented_by))}
    phases: list[tuple[int, ...]] = []
    for events in (traced.first, traced.later):
        unrolled: list[int] = []
        for wave in _waves(traced, events, ordinals):
            for param, like in _order(wave, represented_by):
                for event in wave.get(like, ()):
                    owner = param - event.before
                    number = numbers.get((owner, event.ordinal))
                    if number is None:
                        number = numbers[owner, event.ordinal] = len(blocks)
                        blocks.append(traced.blocks[members[like][event.ordinal]])
                        owners.append(owner)
                    unrolled.append(~number if event.frees else number)
        phases.append(tuple(unrolled))
    first, later = phases
    return UpdateTrace(
        num_params=len(represented_by),
        blocks=tuple(blocks),
        owners=tuple(owners),
        is_loop=traced.is_loop,
        first=first,
        later=later,
        works=traced.works,
    )


def _order(wave: Mapping[int, Sequence[object]], represented_by: Sequence[int]) -> Iterable[tuple[int, int]]:
    """The parameters that a wave goes through, with those that represent them."""
    if -1 in wave:
        return [(-1, -1)]
    all_of_them = list(enumerate(represented_by))
    order = list(wave)
    return all_of_them if order[0] <= order[-1] else reversed(all_of_them)


def _ordinals(traced: UpdateTrace) -> tuple[list[int], dict[int, list[int]]]:
    """For each block its place among those of its owner, and the blocks of each owner."""
    members: dict[int, list[int]] = {}
    ordinals: list[int] = []
    for block, owner in enumerate(traced.owners):
        mine = members.setdefault(owner, [])
        ordinals.append(len(mine))
        mine.append(block)
    return ordinals, members


def _waves(traced: UpdateTrace, events: Sequence[int], ordinals: Sequence[int]) -> Iterator[dict[int, list[_Event]]]:
    """Events by parameter, in waves that go through the parameters once, in order or in reverse.

    A loop over parameters is one wave, and so is a foreach operator, and a run of events that serve no parameter. The
    parameters of a wave are in the order in which it goes through them.
    """
    wave: dict[int, list[_Event]] = {}
    for event in events:
        frees, block = event < 0, event if event >= 0 else ~event
        owner = traced.owners[block]
        current = next(reversed(wave)) if wave else None
        is_of_the_one_before = traced.is_loop and frees and current is not None and 0 <= owner == current - 1
        if is_of_the_one_before:
            owner = owner + 1
        elif wave and not _goes_on(wave, owner, frees, is_loop=traced.is_loop):
            yield wave
            wave = {}
        wave.setdefault(owner, []).append(_Event(ordinals[block], frees, is_of_the_one_before))
    if wave:
        yield wave


def _goes_on(wave: dict[int, list[_Event]], owner: int, frees: bool, *, is_loop: bool) -> bool:
    """Whether an event of `owner` belongs to the wave."""
    *earlier, current = wave
    if owner < 0 or current < 0:
        return owner == current
    if is_loop:
        return owner >= current
    if wave[current][-1].frees != frees or owner == current:
        return wave[current][-1].frees == frees
    return not earlier or (owner > current) == (current > earlier[-1])
