"""Reads the peaks of each phase without changing those that the script itself asks for.

A peak of a phase needs a reset of the allocator's peak at its beginning, and the script may read and reset the same
peak: `torch.cuda.max_memory_allocated`, `reset_peak_memory_stats`, `memory_stats` and their `torch.accelerator` forms.
Those get the peak since their own last reset, as if nobody else had reset it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Peak = tuple[int, int]
"""Bytes allocated and reserved."""


def fold_peaks(kept: dict[str, Any], stats: Mapping[str, Any]) -> None:
    """Raise every peak in `kept` to that of `stats`, which is nested as PyTorch's statistics are."""
    for name, value in stats.items():
        if isinstance(value, Mapping):
            inner = kept.setdefault(name, {})
            if "peak" in value:
                inner["peak"] = max(inner.get("peak", 0), value["peak"])
            else:
                fold_peaks(inner, value)


def raise_peaks(stats: dict[str, Any], kept: Mapping[str, Any]) -> None:
    """Raise every peak of `stats` to that in `kept`, where both have it."""
    for name, value in kept.items():
        inner = stats.get(name)
        if not isinstance(inner, dict):
            continue
        if "peak" in value and "peak" in inner:
            inner["peak"] = max(inner["peak"], value["peak"])
        else:
            raise_peaks(inner, value)


class PeakMeter:
    """The peaks of all cards, since it was last asked.

    Args:
        torch: the module.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._kept: dict[int, dict[str, Any]] = {}
        self._pending: dict[int, Peak] = {}
        core = torch._C
        self._stats: Callable[[int], dict[str, Any]] | None = getattr(core, "_cuda_memoryStats", None)
        if self._stats is None:  # a build without CUDA
            return
        self._reset: Callable[[int], None] = core._cuda_resetPeakMemoryStats
        core._cuda_memoryStats = self._for_the_script(self._stats)
        core._cuda_resetPeakMemoryStats = self._reset_for_the_script
        if hasattr(core, "_accelerator_getDeviceStats"):
            core._accelerator_getDeviceStats = self._for_the_script(core._accelerator_getDeviceStats)
            core._accelerator_resetPeakStats = self._reset_for_the_script

    def take(self) -> dict[int, Peak]:
        """Return card -> peak allocated and reserved bytes since the last call, and begin anew."""
        if self._stats is None or not self._torch.cuda.is_initialized():
            return {}
        taken = {}
        for device in range(self._torch.cuda.device_count()):
            taken[device] = _higher(self._begin_anew(device), self._pending.pop(device, (0, 0)))
        return taken

    def _begin_anew(self, device: int) -> Peak:
        assert self._stats is not None
        stats = self._stats(device)
        fold_peaks(self._kept.setdefault(device, {}), stats)
        self._reset(device)
        return stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"]

    def _for_the_script(self, original: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
        def stats(device: int) -> dict[str, Any]:
            found = original(device)
            raise_peaks(found, self._kept.get(device, {}))
            return found

        return stats

    def _reset_for_the_script(self, device: int) -> None:
        self._pending[device] = _higher(self._begin_anew(device), self._pending.get(device, (0, 0)))
        self._kept.pop(device, None)


def _higher(a: Peak, b: Peak) -> Peak:
    return max(a[0], b[0]), max(a[1], b[1])
