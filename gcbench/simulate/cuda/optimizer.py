"""The optimizer phase as CUDA has it, on fake CPU tensors: foreach optimizers, and a gradient scaler without values.

From torch's own Python code (2.9 to 2.13), named beside each piece. Not yet measured by gcbench on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as torch_optimizer


@contextmanager
def foreach_on_cpu() -> Iterator[None]:
    """Let torch's optimizers choose for fake CPU parameters what they choose on CUDA: foreach, unless told otherwise.

    `_default_to_fused_or_foreach` in torch/optim/optimizer.py asks for the device and for the exact type of each
    parameter when the optimizer steps. A foreach operator is one operator on lists, as on CUDA, where its kernels take
    nothing for themselves as long as parameters, gradients and states agree in device, dtype and strides
    (`can_use_fast_route` in pytorch's aten/src/ATen/native/ForeachUtils.h).

    torch.optim.Adafactor does not run so: it asks for values. transformers' Adafactor has only its loop, on CUDA too.
    """
    devices = torch_optimizer._get_foreach_kernels_supported_devices  # type: ignore[attr-defined]
    types = [*torch_optimizer._foreach_supported_types, FakeTensor]
    with (
        mock.patch.object(torch_optimizer, "_get_foreach_kernels_supported_devices", lambda: [*devices(), "cpu"]),
        mock.patch.object(torch_optimizer, "_foreach_supported_types", types),
    ):
        yield


def optimizer_steps_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the counters of steps in an optimizer's state, one number a parameter, are in the card's memory.

    `_init_group` in torch/optim/adam.py and its kin puts them there for the fused and the capturable implementation;
    for the others they are CPU tensors, and with them the 1 that foreach adds to them in each step. An optimizer
    without counters answers False.
    """
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
