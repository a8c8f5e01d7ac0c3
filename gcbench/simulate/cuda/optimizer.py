"""Lets optimizers on fake CPU tensors run as on CUDA: with foreach operators.

From torch's own Python code (2.9 to 2.13), named beside each function. Not yet measured by gcbench on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as torch_optimizer


@contextmanager
def foreach_on_cpu() -> Iterator[None]:
    """Let torch's optimizers choose for fake CPU parameters what they choose on CUDA: foreach, unless set otherwise.

    `_default_to_fused_or_foreach` in torch/optim/optimizer.py checks the device and the exact type of each parameter
    when the optimizer steps. A foreach operator is one operator on lists, as on CUDA, where its kernels need no buffers
    as long as parameters, gradients and states agree in device, dtype and strides (`can_use_fast_route` in pytorch's
    aten/src/ATen/native/ForeachUtils.h).

    torch.optim.Adafactor does not run so: it reads values. transformers' Adafactor has only its loop, on CUDA too.
    """
    devices = torch_optimizer._get_foreach_kernels_supported_devices  # type: ignore[attr-defined]
    types = [*torch_optimizer._foreach_supported_types, FakeTensor]
    with (
        mock.patch.object(torch_optimizer, "_get_foreach_kernels_supported_devices", lambda: [*devices(), "cpu"]),
        mock.patch.object(torch_optimizer, "_foreach_supported_types", types),
    ):
        yield
