"""The time that a call takes in a step beyond its time by itself, by its caller. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from gcbench.simulate.costs import Caller, Work


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The time that a call takes in a step beyond its time by itself, for one caller.

    Attributes:
        caller: as in `Work`: the model's Python, autograd, checkpointing.
        call_s: seconds per call. Negative where the caller has less overhead than Python.
        cold_s: further seconds where the call touches `CORE_BYTES` or more, in proportion where it touches less,
            because it evicts the code that runs next from the core's own cache.
    """

    caller: Caller
    call_s: float
    cold_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """The overhead of this call."""
        return self.call_s + self.cold_s * coldness(work)


def coldness(work: Work) -> float:
    """The fraction of a core's own cache that the call fills; at most 1."""
    return min(work.nbytes / CORE_BYTES, 1.0)


CORE_BYTES = 2**20
"""Size of a core's own cache: 0.5 to 2 MiB in current processors."""
