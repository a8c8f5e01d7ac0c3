"""The driver of the emulated cards, compiled once, and a process that calls it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gcbench.emulate import library, properties
from gcbench.emulate.properties import Architectures
from gcbench.emulate.symbols import Library

EVERY_ARCHITECTURE = Architectures(compiled=((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)), ptx=((12, 0),))


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libcuda.so.1 of the emulation, which needs a C compiler and no torch."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    place = tmp_path_factory.mktemp("emulated")
    stand_in = library.Torch(version="2.13.0", cuda="13.0", folder=place)
    wanted = Library(soname="libcuda.so.1", functions={"cuStreamSynchronize"})
    library._compile(wanted, library._compiler(), library._defines(stand_in), place)
    return place / "libcuda.so.1"


Call = Callable[..., str]


@pytest.fixture
def call(driver: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs Python code, with the driver as `cuda`, in a process of its own; returns what it prints."""

    def run(code: str, *, ledger: Path | None = None, **changes: object) -> str:
        from gcbench.devices import cards

        card = cards.find("t4")
        values = properties.properties(card, num_cards=2, built_for=EVERY_ARCHITECTURE, torch_version="2.13")
        values |= {name: str(value) for name, value in changes.items()}
        outer = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # where tests are emulated
        env = outer | {"GCBENCH_EMULATED_PROPERTIES": properties.joined(values)}
        if ledger is not None:
            env["GCBENCH_EMULATED_LEDGER"] = str(ledger)
        begin = f"import ctypes as c, os, sys, subprocess\ncuda = c.CDLL({str(driver)!r})\n" + _HELPERS
        done = subprocess.run([sys.executable, "-c", begin + code], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


_HELPERS = """
MIB = 1 << 20
def alloc(size):
    address = c.c_uint64()
    status = cuda.cuMemAlloc_v2(c.byref(address), c.c_size_t(size))
    return address.value if status == 0 else None
def free(address):
    return cuda.cuMemFree_v2(c.c_uint64(address))
def unused():
    a, b = c.c_size_t(), c.c_size_t()
    cuda.cuMemGetInfo_v2(c.byref(a), c.byref(b))
    return a.value
def use(device):
    context = c.c_void_p()
    status = cuda.cuDevicePrimaryCtxRetain(c.byref(context), device)
    cuda.cuCtxSetCurrent(context)
"""
