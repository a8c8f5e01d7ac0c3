"""Calls a function right after a module has been imported, before anyone else has it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


class AfterImport(MetaPathFinder):
    """A finder that wraps the loaders of some modules.

    Args:
        callbacks: module name -> function that gets the module, once.
    """

    def __init__(self, callbacks: dict[str, Callback]) -> None:
        self._callbacks = callbacks

    def install(self) -> None:
        """Put the finder first in `sys.meta_path`; modules that are imported already are called back at once."""
        sys.meta_path.insert(0, self)
        for name in [name for name in self._callbacks if name in sys.modules]:
            self._callbacks.pop(name)(sys.modules[name])

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        callback = self._callbacks.pop(fullname, None)
        if callback is None:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallingBack(spec.loader, callback)
                return spec
        self._callbacks[fullname] = callback
        return None


class _CallingBack(Loader):
    """A loader that calls back after another one has executed the module."""

    def __init__(self, loader: Loader, callback: Callback) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if it had been loaded by its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._callback(module)
