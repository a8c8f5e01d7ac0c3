"""Asks the emulation library, from within an emulated process, what ran on the cards."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.emu_num_launches.restype = ctypes.c_ulong
    library.emu_refused.restype = ctypes.c_char_p
    library.emu_refused.argtypes = (ctypes.c_size_t,)
    return library


def num_launches() -> int:
    """Return how many kernels were launched, into nothing."""
    return int(_library().emu_num_launches())


def refused() -> tuple[str, ...]:
    """Return the functions of NVIDIA's libraries that were called and that the emulation refuses."""
    names: list[str] = []
    while (name := _library().emu_refused(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)
