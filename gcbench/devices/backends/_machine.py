"""Describe the machine of a report, as far as it does not depend on the type of device."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gcbench.core.records import Machine
from gcbench.core.version import __version__

_PACKAGES = ("torch", "transformers", "peft", "accelerate")
_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "MALLOC_ARENA_MAX",
    "LD_PRELOAD",
)


def machine(
    *, device: str, device_name: str, device_memory_bytes: int | None, driver: dict[str, str], settings: dict[str, str]
) -> Machine:
    """Return a `Machine` with the versions and environment variables that all devices share."""
    versions = {"gcbench": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    shared = {
        "cpu_cores": str(usable_cores()),
        "torch_threads": str(torch.get_num_threads()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return Machine(
        device=device,
        device_name=device_name,
        device_memory_bytes=device_memory_bytes,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions | driver,
        settings=shared | settings | variables,
    )


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """Return the CPU's product name, or its architecture when the system does not report one."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
