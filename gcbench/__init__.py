"""Measures, predicts and plans gradient (activation) checkpointing of Hugging Face causal LMs."""

import importlib
from typing import TYPE_CHECKING, Any

from gcbench.core.version import __version__ as __version__

if TYPE_CHECKING:
    from gcbench.api import apply, remove
    from gcbench.checkpointing.segments import LayersNotSequential
    from gcbench.report.loaded import load
    from gcbench.strategies import Plan, Policy

__all__ = ["LayersNotSequential", "Plan", "Policy", "apply", "load", "remove"]

_HOMES = {
    "apply": "gcbench.api",
    "remove": "gcbench.api",
    "load": "gcbench.report.loaded",
    "LayersNotSequential": "gcbench.checkpointing.segments",
    "Plan": "gcbench.strategies",
    "Policy": "gcbench.strategies",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line answers without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gcbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names and those that every module has, for tab completion; imports nothing."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
