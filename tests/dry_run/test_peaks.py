"""The script's own peaks are those that it would have read without an observer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gcbench.dry_run.observer.peaks import PeakMeter


class Card:
    """An allocator's statistics, with the functions of `torch._C`."""

    def __init__(self) -> None:
        self.current = self.peak = 0

    def hold(self, count: int) -> None:
        self.current = count
        self.peak = max(self.peak, count)

    def stats(self, device: int) -> dict[str, Any]:
        both = {"current": self.current, "peak": self.peak, "allocated": 0, "freed": 0}
        return {"num_ooms": 3, **{name: {"all": dict(both)} for name in ("allocated_bytes", "reserved_bytes")}}

    def reset(self, device: int) -> None:
        self.peak = self.current


def made() -> tuple[Card, PeakMeter, SimpleNamespace]:
    card = Card()
    core = SimpleNamespace(_cuda_memoryStats=card.stats, _cuda_resetPeakMemoryStats=card.reset)
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1)
    return card, PeakMeter(SimpleNamespace(_C=core, cuda=cuda)), core


def peak_for_the_script(core: SimpleNamespace) -> int:
    peak: int = core._cuda_memoryStats(0)["allocated_bytes"]["all"]["peak"]
    return peak


def test_a_phase_begins_anew_and_the_script_does_not():
    card, meter, core = made()
    card.hold(100)
    card.hold(10)
    assert meter.take() == {0: (100, 100)}
    card.hold(40)
    assert meter.take() == {0: (40, 40)}
    assert peak_for_the_script(core) == 100
    assert core._cuda_memoryStats(0)["num_ooms"] == 3


def test_the_scripts_reset_loses_no_peak_of_the_phase():
    card, meter, core = made()
    card.hold(100)
    card.hold(10)
    core._cuda_resetPeakMemoryStats(0)
    assert peak_for_the_script(core) == 10
    card.hold(30)
    assert meter.take() == {0: (100, 100)}
    assert peak_for_the_script(core) == 30
    assert meter.take() == {0: (30, 30)}


def test_nothing_is_read_without_cuda():
    assert PeakMeter(SimpleNamespace(_C=SimpleNamespace())).take() == {}
