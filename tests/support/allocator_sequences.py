"""Random sequences on gcbench's model of the caching allocator and on the real one, compared after each event.

Run as a program on a machine with a CUDA device, in a process of its own: the allocator reads PYTORCH_ALLOC_CONF once.

    python allocator_sequences.py LIMIT FIRST_SEED SEQUENCES

LIMIT is `none`, `fraction` (torch.cuda.set_per_process_memory_fraction) or `device` (the device's own memory: only on
an emulated card, where no other process takes any). Prints one JSON document: sequences, events, retries, out-of-memory
errors, and a sentence for each sequence that differs.
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import suppress

import torch

from gcbench.simulate.allocator.caching_allocator import CachingAllocator, OutOfMemory

KIB, MIB = 1 << 10, 1 << 20
EVENTS = 400
EDGES = [1, 512, 3 * KIB, 100_000, MIB, MIB + 1, 3_000_000, 9_437_184, 10 * MIB - 1, 10 * MIB, 10 * MIB + 512, 32 * MIB]
"""Sizes at which the allocator changes pools, segments or whether it splits."""

COUNTS_ADDRESSES = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
"""Whether the address decides among free blocks of one size. Since 2.13 the segment that is older does, as in the
model, whose addresses go up."""


def sizes_for(rng: random.Random, budget_bytes: int, *, short: bool) -> list[int]:
    """Sizes that fill the budget several times over in a sequence, or stay well below it."""
    large = budget_bytes // 300
    few = [rng.randrange(budget_bytes // 80, budget_bytes // 4) for _ in range(4)] if short else []
    return [*rng.choices(EDGES, k=12), *(rng.randrange(1, large) for _ in range(6)), *few]


def figures_of_torch() -> tuple[int, ...]:
    stats = torch.cuda.memory_stats_as_nested_dict()
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    return (allocated["current"], reserved["current"], allocated["peak"], reserved["peak"], stats["num_alloc_retries"])


def figures_of_model(model: CachingAllocator) -> tuple[int, ...]:
    return (
        model.allocated_bytes,
        model.reserved_bytes,
        model.peak_allocated_bytes,
        model.peak_reserved_bytes,
        model.num_alloc_retries,
    )


class Sequence:
    """One random sequence on both allocators."""

    def __init__(self, seed: int, limit: str, *, expandable: bool) -> None:
        self.rng = random.Random(seed)
        free, total = torch.cuda.mem_get_info()
        fraction = self.rng.choice([1 / 3, 1 / 7, 1 / 20]) if limit == "fraction" else 1.0
        torch.cuda.set_per_process_memory_fraction(fraction)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        budget = {"fraction": int(fraction * total), "device": total, "none": free // 2}[limit]
        self.sizes = sizes_for(self.rng, budget, short=limit != "none")
        self.model = CachingAllocator(
            limit_bytes=free if limit == "device" else None,
            allowed_bytes=int(fraction * total) if limit == "fraction" else None,
            device_bytes=total,
            expandable_segments=expandable,
        )
        # Where mapping pages fails, torch keeps a range of addresses that no pointer shows.
        self.feeds_addresses = COUNTS_ADDRESSES and not (expandable and limit == "device")
        self.live: list[tuple[int, int]] = []
        self.events = self.out_of_memory = 0

    def run(self) -> str | None:
        """Run it to its end or to the first difference; returns that difference in words."""
        try:
            while self.events < EVENTS:
                self.events += 1
                what = self._event()
                real, mine = figures_of_torch(), figures_of_model(self.model)
                if what is None and real != mine:
                    what = f"torch has {real}, the model {mine}"
                if what is not None:
                    return f"event {self.events}: {what}"
        finally:
            for pointer, _ in self.live:
                torch._C._cuda_cudaCachingAllocator_raw_delete(pointer)
            torch.cuda.empty_cache()
        return None

    def _event(self) -> str | None:
        chance = self.rng.random()
        if chance < 0.005:
            torch.cuda.empty_cache()
            self.model.empty_cache()
        elif chance < 0.01:
            torch.cuda.reset_peak_memory_stats()
            self.model.reset_peaks()
        elif chance < 0.56 or not self.live:
            return self._allocate(self.rng.choice(self.sizes))
        else:
            pointer, handle = self.live.pop(self.rng.randrange(len(self.live)))
            torch._C._cuda_cudaCachingAllocator_raw_delete(pointer)
            self.model.free(handle)
        return None

    def _allocate(self, nbytes: int) -> str | None:
        pointer = handle = None
        try:
            pointer = torch._C._cuda_cudaCachingAllocator_raw_alloc(nbytes, 0)
        except torch.OutOfMemoryError:
            self.out_of_memory += 1
        if pointer is not None and self.feeds_addresses:
            # The driver chose the address of a new segment, whose first block is handed out at that address.
            self.model._next_address = pointer
        with suppress(OutOfMemory):
            handle = self.model.malloc(nbytes)
        if (pointer is None) != (handle is None):
            return f"{nbytes} bytes: torch {'runs' if pointer is None else 'does not run'} out of memory"
        if pointer is not None and handle is not None:
            self.live.append((pointer, handle))
            if self.feeds_addresses and pointer != handle:
                return f"{nbytes} bytes: torch takes the block at {pointer:#x}, the model that at {handle:#x}"
        return None


def main(limit: str, first_seed: int, count: int) -> None:
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", "")
    torch.empty(1, device="cuda")  # creates the context, which takes memory
    torch.cuda.empty_cache()
    total = {"sequences": count, "events": 0, "retries": 0, "out_of_memory": 0}
    differing = {}
    for seed in range(first_seed, first_seed + count):
        sequence = Sequence(seed, limit, expandable=expandable)
        difference = sequence.run()
        total["events"] += sequence.events
        total["retries"] += sequence.model.num_alloc_retries
        total["out_of_memory"] += sequence.out_of_memory
        if difference is not None:
            differing[seed] = difference
    print(json.dumps({**total, "differing": differing}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
