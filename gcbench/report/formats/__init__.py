"""Output formats: each turns a report into text and touches no file. One file each.

Every module has `NAME`, `SUFFIX` and `render(report)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gcbench.core.plugins import modules
from gcbench.core.records import Report


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a report; `suffix` is that of its file, dot included."""

    name: str
    suffix: str
    render: Callable[[Report], str]


def names() -> tuple[str, ...]:
    """Every format's name."""
    return tuple(module.NAME for module in modules(__name__))


def get(name: str) -> Format:
    """The format called `name`; KeyError when there is none."""
    module = {module.NAME: module for module in modules(__name__)}[name]
    return Format(name=module.NAME, suffix=module.SUFFIX, render=module.render)
