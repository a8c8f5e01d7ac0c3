"""Marks what a model's own PyTorch code allocates where a card, with a package installed, would run a fused kernel.

For the scans and convolutions of recurrent layers (Mamba, gated delta rule and the like) transformers has a kernel from
a package such as mamba-ssm, and a reference implementation in PyTorch for when that is not installed. A trace on fake
CPU tensors always runs the reference, which saves far more for the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from gcbench.simulate.trace.recorder import Recorder

_DISTRIBUTIONS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}
"""Name to import -> name to install."""
_BY_NAME = {"rwkv_linear_attention_cpu": "kernels"}
"""References that a model chooses itself, and the package that has the kernel."""


@contextmanager
def marked(modules: Iterable[torch.nn.Module], recorder: Recorder) -> Iterator[None]:
    """Mark for the recorder, while entered, every reference implementation that runs in place of a kernel."""
    with ExitStack() as stack:
        for name in dict.fromkeys(type(module).__module__ for module in modules):
            module = sys.modules.get(name)
            for function, value in list(vars(module).items()) if module is not None else ():
                package = package_of(function, value)
                if package is not None:
                    stack.enter_context(mock.patch.object(module, function, _noting(value, package, recorder)))
        yield


def package_of(name: str, function: object) -> str | None:
    """The package whose kernel this function is the reference for; None if it is no such function."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    code = getattr(function, "__code__", None)
    if code is None or not {"is_new_implementation", "package"} <= set(code.co_freevars):
        return None
    cells = dict(zip(code.co_freevars, function.__closure__, strict=True))  # type: ignore[attr-defined]
    if cells["is_new_implementation"].cell_contents:
        return None
    package = str(cells["package"].cell_contents)
    return _DISTRIBUTIONS.get(package, package)


def _noting(function: Callable[..., Any], package: str, recorder: Recorder) -> Callable[..., Any]:
    @wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        with recorder.in_fallback(package):
            return function(*args, **kwargs)

    return noted
