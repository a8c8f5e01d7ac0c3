"""Backends that run and measure a step, one file per device type, imported only in a child process."""

from __future__ import annotations

from typing import cast

from gcbench.core.errors import UnavailableError
from gcbench.core.plugins import modules
from gcbench.devices.backends._base import Device, MemoryProbe

__all__ = ["Device", "MemoryProbe", "choose", "open_device"]


def choose(name: str) -> str:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine, as "cpu" or "cuda:N".

    Raises UnavailableError when this machine does not have it.
    """
    backends = {module.TYPE: module for module in modules(__name__)}
    if name == "auto":
        best = max((b for b in backends.values() if b.available()), key=lambda b: cast("int", b.PREFERENCE))
        return cast("str", best.choose(None))
    kind, _, index = name.partition(":")
    backend = backends[kind]
    missing = backend.why_missing()
    if missing is not None:
        raise UnavailableError(f"device {name!r} is not available: {missing}; use --device cpu or auto")
    return cast("str", backend.choose(int(index) if index else None))


def open_device(name: str) -> Device:
    """Open the device that `choose` returned."""
    kind = name.partition(":")[0]
    backend = next(module for module in modules(__name__) if kind == module.TYPE)
    return cast("Device", backend.open(name))
