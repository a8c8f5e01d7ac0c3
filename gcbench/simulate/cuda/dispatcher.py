"""Replaces kernels of torch's own operators for a while, in torch's dispatcher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Kernel = Callable[..., Any]

FALLTHROUGH: Kernel = torch.library.fallthrough_kernel
"""The kernel that means none: the dispatcher goes on to the next key."""

_OVERRIDES = "Warning only once for all operators"


@contextmanager
def kernels_replaced(key: str, kernels: Mapping[str, Kernel]) -> Iterator[None]:
    """Let aten operators ("softmax.int") run these kernels at a dispatch key (`"AutocastCPU"`).

    Holds for the whole process; the former kernels are restored afterwards.
    """
    library: Any = torch.library.Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_OVERRIDES, category=UserWarning)
            for name, kernel in kernels.items():
                library.impl(name, kernel)
        yield
    finally:
        library._destroy()


def first_result(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the first of an operator's several results; the others are freed in order, as those of C++'s tuple are.

    Python frees the last item of a tuple first.
    """
    results = list(op(*args, **kwargs))
    results.reverse()
    first = results.pop()
    while results:
        results.pop()
    return first
