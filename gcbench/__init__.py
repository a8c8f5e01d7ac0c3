"""gcbench: which gradient-checkpointing setting to use, measured on the real model."""

import importlib
from typing import TYPE_CHECKING, Any

from gcbench.core.version import __version__ as __version__

if TYPE_CHECKING:
    from gcbench.api import apply, remove
    from gcbench.checkpointing.segments import LayersNotSequential
    from gcbench.strategies import Plan, Policy

__all__ = ["LayersNotSequential", "Plan", "Policy", "apply", "remove"]

_HOMES = {
    "apply": "gcbench.api",
    "remove": "gcbench.api",
    "LayersNotSequential": "gcbench.checkpointing.segments",
    "Plan": "gcbench.strategies",
    "Policy": "gcbench.strategies",
}


def __getattr__(name: str) -> Any:
    """What is public, imported when it is first asked for: the command line answers without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gcbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What tab completion shows: what is public, and what every module has. Imports nothing."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
