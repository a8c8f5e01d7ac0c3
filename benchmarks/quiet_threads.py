"""Restarts a benchmark in the environment in which `gcbench run` measures."""

from __future__ import annotations

import os
import sys

from gcbench.devices.conditions import SLEEPING


def restart_with_sleeping_threads() -> None:
    """Start this program again, before torch is imported, where OpenMP's threads would spin while they wait."""
    lacking = {name: value for name, value in SLEEPING.items() if name not in os.environ}
    if lacking:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | lacking)
