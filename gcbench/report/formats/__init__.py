"""Output formats: each renders a report as text and writes no file; one module each.

Every module has `NAME`, `SUFFIX` and `render(report)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gcbench.core.plugins import modules
from gcbench.core.records import Report


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format; `suffix` is that of its file, with the dot."""

    name: str
    suffix: str
    render: Callable[[Report], str]


def names() -> tuple[str, ...]:
    """Return the name of every format."""
    return tuple(module.NAME for module in modules(__name__))


def get(name: str) -> Format:
    """Return the format called `name`; raises KeyError."""
    module = {module.NAME: module for module in modules(__name__)}[name]
    return Format(name=module.NAME, suffix=module.SUFFIX, render=module.render)
