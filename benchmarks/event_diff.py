"""Compares what a training step allocates on a card, event by event, with what is predicted for it.

    python benchmarks/event_diff.py --emulate t4 --model gpt2 --batch 4 --seq-len 512 --strategy per-layer
    python benchmarks/event_diff.py --emulate t4 --case "gpt2, fp32" --strategy per-layer        a case of the grid
    python benchmarks/event_diff.py …                             without --emulate, on this machine's card

The step is gcbench's own, recorded by PyTorch from an empty card on. Allocations are matched in order by their rounded
size; where the lists part, both are shown with the operator that is predicted and the code that really asked. Blocks of
a megabyte and less are left out of the comparison, unless --least-bytes says other. Also shown: where both have the
same blocks but free them at different times.

A prediction is replayed twice, once with its own events and once with the recorded ones, which tells a difference of
events from one of the allocator. Needs a CUDA build of torch; the card may be emulated.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from grid import cases

from gcbench.devices import cards
from gcbench.emulate.environment import emulated_card, environment
from gcbench.job import settings as config
from gcbench.models import sources

_CONTEXT = 2
_FRAMES = 5
_TELLING = ("at::native::", "at::TensorIterator", "at::_ops::", "at::cuda::", "torch::autograd::", "pytorch_flash")
_ROUNDING = 512
_RESIDENT = "resident: "


@dataclass(frozen=True, kw_only=True)
class Event:
    """An allocation, or with `frees` the end of one: which it is in its list, its rounded size, and who asked."""

    block: int
    nbytes: int
    frees: bool
    who: str


def record(cell: dict[str, Any], path: str) -> None:
    """Run two steps of a cell on the card and keep the allocator's history of both, with stacks."""
    import torch

    from gcbench import strategies
    from gcbench.checkpointing import apply as checkpointing
    from gcbench.models import build as models
    from gcbench.training.step import TrainingStep, parameter_dtype, random_batch

    wanted = config.settings({**cell, "device": "cuda"})
    source = sources.resolve(wanted.model, pretrained=False, trust_remote_code=False)
    model_config = models.build_config(source, layers=wanted.layers, overrides=wanted.set or {})
    torch.cuda.memory._record_memory_history(context="alloc", stacks="all", max_entries=10_000_000)
    model = models.build(
        source,
        model_config,
        device="cuda:0",
        dtype=parameter_dtype(wanted.precision),
        attn_implementation=wanted.attn_implementation,
        seed=0,
        lora=wanted.lora,
    )
    layers = checkpointing.layers_of(model)
    checkpointing.apply(model, strategies.parse(wanted.strategies[0]).plan_for(len(layers)))
    batch = random_batch(model, batch_size=wanted.batch_size[0], seq_len=wanted.seq_len[0], seed=0)
    step = TrainingStep(model, batch=batch, precision=wanted.precision, optim=wanted.optim, seed=0)

    def history() -> list[dict[str, Any]]:
        return list(torch.cuda.memory._snapshot()["device_traces"][0])

    places: list[tuple[str, int]] = [("model", len(history()))]
    step()
    places.append(("first step", len(history())))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(lambda phase: places.append((phase, len(history()))))
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    Path(path).write_bytes(pickle.dumps((history(), places, peaks)))


def real_events(history: Sequence[dict[str, Any]]) -> Iterator[Event]:
    """The allocator's history as events, numbered in order of allocation."""
    alive: dict[int, tuple[int, int, str]] = {}
    number = 0
    for entry in history:
        if entry["action"] == "alloc":
            alive[entry["addr"]] = (number, _rounded(entry["size"]), _who(entry.get("frames", [])))
            block, nbytes, who = alive[entry["addr"]]
            number += 1
            yield Event(block=block, nbytes=nbytes, frees=False, who=who)
        elif entry["action"] == "free_completed" and entry["addr"] in alive:
            block, nbytes, who = alive.pop(entry["addr"])
            yield Event(block=block, nbytes=nbytes, frees=True, who=who)


def predicted_events(cell: dict[str, Any], device: str) -> tuple[list[Event], Any, Any]:
    """The predicted events of both steps, the timeline and the peak."""
    from gcbench import strategies
    from gcbench.devices import target as targets
    from gcbench.devices.target import TargetOptions
    from gcbench.predict.task import PredictTask
    from gcbench.predict.worker import Session

    wanted = config.settings(cell)
    target = targets.resolve_target(TargetOptions(device=device), None)
    assert target is not None
    task = PredictTask(
        source=sources.resolve(wanted.model, pretrained=False, trust_remote_code=False),
        layers=wanted.layers,
        overrides=wanted.set or {},
        attn_implementation=wanted.attn_implementation,
        lora=wanted.lora,
        precision=wanted.precision,
        optim=wanted.optim,
        target=target,
        cells=(),
        explain=False,
        exact=False,
    )
    session = Session(task)
    plan = strategies.parse(wanted.strategies[0]).plan_for(len(session.predictor.fake_model.layers))
    step = session.predictor.step(plan, batch_size=wanted.batch_size[0], seq_len=wanted.seq_len[0])
    line = step.timeline
    blocks = [step.assembly.block(number) for number in range(len(line.nbytes))]
    parts = [f"{_part(step, place)}" for place in range(len(line.events))]
    num_resident = len(step.parts.resident) if step.parts else 0
    events = []
    named: dict[int, str] = {}
    for place, event in enumerate(line.events.tolist()):
        block = event if event >= 0 else ~event
        nbytes = _rounded(int(line.nbytes[block]))
        if event >= 0:
            named[block] = f"{blocks[block].op} {blocks[block].shape} [{parts[place]}]"
            if block < num_resident or blocks[block].op is None:
                named[block] = f"{_RESIDENT}{blocks[block].op}"
        if nbytes:
            events.append(Event(block=block, nbytes=nbytes, frees=event < 0, who=named[block]))
    return events, line, session.peak(line)


def _part(step: Any, place: int) -> str:
    begin = step.timeline.marks[0][0]
    return step.assembly.part(place) if place >= begin else "first step"


def replayed(events: Sequence[Event], settles: Sequence[int], begin: int) -> tuple[int, int]:
    """(allocated, reserved) peaks from event `begin` on, of these events in gcbench's model of the allocator.

    `settles` are numbers of events after which the cache is emptied.
    """
    from gcbench.simulate.allocator.caching_allocator import CachingAllocator

    allocator = CachingAllocator()
    held: dict[int, int] = {}
    for place, event in enumerate(events):
        if place in settles:
            allocator.empty_cache()
        if place == begin:
            allocator.reset_peaks()
        if event.frees:
            allocator.free(held.pop(event.block))
        else:
            held[event.block] = allocator.malloc(event.nbytes)
    return allocator.peak_allocated_bytes, allocator.peak_reserved_bytes


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ROUNDING) * _ROUNDING


def _who(frames: Sequence[dict[str, Any]]) -> str:
    """The lowest functions that say something of one allocation, from the callee on."""
    names = []
    for frame in frames:
        name = frame["name"].split("(")[0].strip()
        if frame["filename"].endswith(".py"):
            names.append(f"{Path(frame['filename']).name}:{frame['line']} {name}")
        elif name.startswith(_TELLING):
            names.append(name.removeprefix("at::_ops::").removeprefix("at::native::").removesuffix("::call"))
    return " < ".join(list(dict.fromkeys(names))[:_FRAMES])


def differences(real: Sequence[Event], said: Sequence[Event]) -> Iterator[str]:
    """Where two lists of events part, in words.

    Allocations are matched in order by size, then all events by block: two frees of one size may be of two tensors.
    """
    same = _same_blocks([e for e in real if not e.frees], [e for e in said if not e.frees])
    keys = [(e.frees, same.get(e.block, ~e.block)) for e in real]
    matcher = SequenceMatcher(None, keys, [(e.frees, e.block) for e in said], autojunk=False)
    for tag, begin, end, said_begin, said_end in matcher.get_opcodes():
        if tag == "equal":
            continue
        yield f"@ real {begin}, predicted {said_begin}"
        yield from (_line(" ", event) for event in real[max(begin - _CONTEXT, 0) : begin])
        yield from (_line("-", event) for event in real[begin:end])
        yield from (_line("+", event) for event in said[said_begin:said_end])
        yield from (_line(" ", event) for event in said[said_end : said_end + _CONTEXT])


def _same_blocks(real: Sequence[Event], said: Sequence[Event]) -> dict[int, int]:
    """Real block -> the predicted one that it is."""
    matcher = SequenceMatcher(None, [e.nbytes for e in real], [e.nbytes for e in said], autojunk=False)
    return {
        real[begin + offset].block: said[said_begin + offset].block
        for begin, said_begin, size in matcher.get_matching_blocks()
        for offset in range(size)
    }


def _line(sign: str, event: Event) -> str:
    return f"{sign} {'free ' if event.frees else 'alloc'} {event.nbytes:>14,}  {event.who}"


def main() -> None:
    """Record, predict and compare one cell."""
    if sys.argv[1:2] == ["--record"]:
        record(json.loads(sys.argv[2]), sys.argv[3])
        os._exit(0)  # an interpreter that ends would end the process with autograd's thread, if that is still busy
    arguments = argparse.ArgumentParser(description="Compare a step's allocations with the predicted ones.")
    arguments.add_argument("--emulate", metavar="CARD", help="Emulate this card.")
    arguments.add_argument("--device", default="h100", help="The card here, as predict names it (default: h100).")
    arguments.add_argument("--case", help="A case of the emulated grid by name.")
    arguments.add_argument("--settings", default="{}", help="Settings of gcbench run as JSON, added to the case's.")
    arguments.add_argument("--strategy", default="off", help="One strategy (default: off).")
    arguments.add_argument("--least-bytes", type=int, default=(1 << 20) + 1, help="Smaller blocks are left out.")
    arguments.add_argument("--most-lines", type=int, default=80, help="Lines of differences to print (default: 80).")
    asked = arguments.parse_args()
    known = {case.name: case.settings for case in cases("emulated")}
    cell = {**known.get(asked.case, {}), **json.loads(asked.settings), "strategies": [asked.strategy]}
    if asked.emulate and emulated_card() is None:  # from the beginning: torch may not be importable without
        added = environment(cards.find(asked.emulate))
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **added})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.pickle"
        command = [sys.executable, __file__, "--record", json.dumps(cell), str(path)]
        subprocess.run(command, check=True)
        history, places, peaks = pickle.loads(path.read_bytes())
    real = list(real_events(history))
    before = {name: sum(1 for _ in real_events(history[:place])) for name, place in places}
    said, line, peak = predicted_events(cell, asked.emulate or asked.device)
    said_begin = len(_of_line(line, line.marks[0][0]))
    said_settled = [len(_of_line(line, at)) for at in line.settled_at]
    print(f"real                {peaks[0]:>15,} allocated {peaks[1]:>15,} reserved")
    print(
        f"predicted           {peak.memory.allocated_bytes:>15,} allocated {peak.memory.reserved_bytes:>15,} reserved"
    )
    again = replayed(real, [before["first step"]], before["forward"])
    print(f"real, replayed      {again[0]:>15,} allocated {again[1]:>15,} reserved")
    again = replayed(said, said_settled, said_begin)
    print(f"predicted, replayed {again[0]:>15,} allocated {again[1]:>15,} reserved")
    for name, ours, theirs in (
        ("first step", real[before["model"] : before["first step"]], said[:said_begin]),
        ("measured step", real[before["forward"] :], said[said_begin:]),
    ):
        if name == "first step":
            ours_kept, theirs_kept = ours, theirs[_num_resident(theirs) :]
        else:
            ours_kept, theirs_kept = ours, theirs
        ours_kept, theirs_kept = (
            [event for event in events if event.nbytes >= asked.least_bytes] for events in (ours_kept, theirs_kept)
        )
        found = list(differences(ours_kept, theirs_kept))
        print(f"\n== {name}: {len(ours_kept)} real events, {len(theirs_kept)} predicted, {len(found)} lines differ")
        print("\n".join(found[: asked.most_lines]))


def _of_line(line: Any, count: int) -> list[int]:
    """The first `count` events of a timeline without those of empty blocks."""
    return [e for e in line.events[:count].tolist() if line.nbytes[e if e >= 0 else ~e]]


def _num_resident(events: Sequence[Event]) -> int:
    """How many of the first events are the model's and the batch's tensors."""
    return next((place for place, event in enumerate(events) if not event.who.startswith(_RESIDENT)), len(events))


if __name__ == "__main__":
    main()
