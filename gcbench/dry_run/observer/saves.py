"""Notes the files that a script saves, and the memory while it does; nothing in them was computed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .phases import Phases

_MOST_FILES = 50


class Saves:
    """The files that were saved from tensors.

    Attributes:
        files: their absolute paths.
    """

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._depth = 0
        self.files: list[str] = []

    def watch(self, module: ModuleType, name: str, *, position: int, keyword: str) -> None:
        """Wrap a function of a module that writes the file that an argument names."""
        original: Callable[..., Any] = getattr(module, name)

        @functools.wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            target = args[position] if len(args) > position else kwargs.get(keyword)
            if isinstance(target, (str, os.PathLike)):
                path = os.path.abspath(os.fspath(target))  # noqa: PTH100 - it may not exist yet, and stays as named
                if path not in self.files and len(self.files) < _MOST_FILES:
                    self.files.append(path)
            if self._depth:
                return original(*args, **kwargs)
            self._depth += 1
            before = self._phases.save_begins()
            try:
                return original(*args, **kwargs)
            finally:
                self._phases.save_ends(before)
                self._depth -= 1

        setattr(module, name, save)
