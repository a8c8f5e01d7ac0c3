"""Numbers the storages of tensors for as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


class LiveStorages:
    """The number of each storage; `on_free` is called with it when the last reference to the storage goes."""

    def __init__(self, on_free: Callable[[int], object] = lambda number: None) -> None:
        self._on_free = on_free
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def add(self, storage: torch.UntypedStorage, number: int) -> None:
        """Follow a storage from here on."""
        key = storage._cdata

        def freed(reference: object) -> None:
            self._alive.pop(key, None)
            self._on_free(number)

        self._alive[key] = (weakref.ref(storage, freed), number)

    def get(self, storage: torch.UntypedStorage) -> int | None:
        """The number of a storage; None if it is not followed."""
        alive = self._alive.get(storage._cdata)
        return None if alive is None else alive[1]

    def forget(self, storage: torch.UntypedStorage) -> int | None:
        """Follow a storage no longer, so that its end is not told; returns its number."""
        alive = self._alive.pop(storage._cdata, None)
        return None if alive is None else alive[1]
