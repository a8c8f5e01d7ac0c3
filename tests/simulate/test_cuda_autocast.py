"""Autocast on fake CPU tensors casts as CUDA's does, by the policies in the header of the installed torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench.simulate.cuda import autocast as policies
from gcbench.simulate.cuda.autocast import cast_by, cuda_autocast
from gcbench.simulate.cuda.kernels import cuda_operators

ROWS, WIDTH = 6, 64
BF16, FP32 = torch.bfloat16, torch.float32


class Names(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def autocast(fake):
    with cuda_autocast(), cuda_operators(), torch.autocast("cpu", BF16):
        yield


def tensor(*shape, dtype=BF16):
    return torch.empty(shape or (ROWS, WIDTH), dtype=dtype)


def header():
    """Policy -> operators, of CUDA, as torch's own header lists them."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text(encoding="utf-8")
    listed = {}
    for macro in re.finditer(r"#define AT_FORALL_(\w+)\(_\)((?:[^\n]*\\\n)*[^\n]*)\n", text):
        entries = re.findall(r"_\(\s*(\w+)\s*(?:,\s*(\w+)\s*)?\)", macro[2].replace("\\\n", " "))
        listed[macro[1]] = {".".join(part for part in entry if part) for entry in entries}
    return listed


def test_policies_are_those_of_the_installed_header():
    """A new torch may move an operator from one policy to another; this says which."""
    listed = header()
    assert listed["FP32_SET_OPT_DTYPE"] == policies.FP32_SET_OPT_DTYPE
    assert listed["PROMOTE"] == policies.PROMOTE
    # Two that the header does not list for every device, and one that CUDA's autocast refuses.
    convolutions = {"cudnn_convolution", "cudnn_convolution_transpose"}
    assert policies.LOWER_PRECISION - convolutions == listed["LOWER_PRECISION_FP"]
    named = policies.LOWER_PRECISION | policies.FP32_SET_OPT_DTYPE | policies.PROMOTE | set(policies.FP32_APPEND_DTYPE)
    assert cast_by("CUDA") - named - {"binary_cross_entropy"} == listed["FP32"]
    assert named <= cast_by("CUDA")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.softmax(x, -1),
        lambda x: torch.softmax(x, -1),
        lambda x: x.softmax(-1),
        lambda x: torch.nn.Softmax(-1)(x),
        lambda x: functional.log_softmax(x, dim=-1),
        lambda x: functional.layer_norm(x, (WIDTH,)),
        lambda x: torch.nn.LayerNorm(WIDTH)(x),
        lambda x: x.pow(2),
        lambda x: x**2,
        lambda x: 2**x,
        torch.rsqrt,
        lambda x: x.rsqrt(),
        torch.exp,
        lambda x: x.norm(),
        lambda x: x.norm(dim=-1),
        torch.linalg.vector_norm,
        lambda x: x.sum(),
        lambda x: x.sum(-1, keepdim=True),
        lambda x: x.cumsum(-1),
        lambda x: x.prod(-1),
        functional.softplus,
        lambda x: functional.mse_loss(x, x),
    ],
)
def test_computed_in_fp32(autocast, function):
    """The CPU's list leaves most of these in bf16, in half the memory; every spelling is its own trap."""
    assert function(tensor()).dtype is FP32


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x,
        lambda x: x.mean(-1),
        functional.silu,
        functional.gelu,
        torch.cos,
        lambda x: torch.cat([x, x]),
        lambda x: functional.softmax(x, -1, dtype=BF16),
        lambda x: x.sum(-1, dtype=BF16),
        lambda x: torch.stack([x, x]),
    ],
)
def test_left_in_bf16(autocast, function):
    """Not on CUDA's list, or the caller chose a dtype."""
    assert function(tensor()).dtype is BF16


def test_a_dtype_is_set_rather_than_a_copy_cast(autocast):
    """`sum` reads bf16 and adds in fp32: an fp32 copy of its input would be twice the input."""
    with Names() as calls:
        tensor().sum(-1)
    assert "_to_copy" not in calls.names
    with Names() as calls:
        tensor() ** 2
    assert calls.names.count("_to_copy") == 1


def test_widest_dtype_wins_where_cuda_promotes(autocast):
    both = tensor(), tensor(dtype=FP32)
    assert torch.addcmul(*both, tensor()).dtype is FP32
    assert torch.addcmul(tensor(), tensor(), tensor()).dtype is BF16


def test_linear_casts_its_weight_once(autocast):
    """Autocast caches the cast weight until it is exited; a cast per call would allocate it again."""
    linear = torch.nn.Linear(WIDTH, WIDTH)
    x = tensor()
    with Names() as first:
        assert linear(x).dtype is BF16
    with Names() as second:
        assert linear(x).dtype is BF16
    assert first.names.count("_to_copy") == 2
    assert second.names.count("_to_copy") == 0


def test_cross_entropy_of_bf16_logits_keeps_them_bf16(autocast):
    """Not on CUDA's list: it passes log-softmax the dtype of its logits. Only `nll_loss` casts."""
    logits, labels = tensor(), torch.empty(ROWS, dtype=torch.int64)
    with Names() as calls:
        loss = functional.cross_entropy(logits, labels)
    assert loss.dtype is FP32
    order = [name for name in calls.names if name in ("_log_softmax", "_to_copy", "nll_loss_forward")]
    assert order == ["_log_softmax", "_to_copy", "nll_loss_forward"]


def test_double_and_integers_are_left_alone(autocast):
    assert (tensor(dtype=torch.float64) ** 2).dtype is torch.float64
    assert tensor(dtype=torch.int64).sum().dtype is torch.int64


def test_gradients_come_back_in_the_dtype_of_the_input(autocast):
    """A cast outside of autograd would lose the gradient."""
    x = tensor().requires_grad_()
    norm = torch.nn.LayerNorm(WIDTH)
    (norm(x) ** 2).sum().backward()
    assert x.grad.dtype is BF16
    assert norm.weight.grad.dtype is FP32


def test_nothing_is_cast_without_autocast(fake):
    with cuda_autocast():
        for function in (lambda x: x.softmax(-1), lambda x: x**2, torch.rsqrt, lambda x: x.sum()):
            assert function(tensor()).dtype is BF16
        with torch.autocast("cpu", BF16), torch.autocast("cpu", enabled=False):
            assert (tensor() ** 2).dtype is BF16


def test_the_cpus_own_autocast_is_restored_afterwards(fake):
    """The kernels are replaced for the process: the next prediction may be for the CPU."""

    def on_cpu():
        with torch.autocast("cpu", BF16):
            return [(tensor() ** 2).dtype, tensor().softmax(-1).dtype, torch.linalg.vector_norm(tensor()).dtype]

    before = on_cpu()
    with cuda_autocast():
        assert on_cpu() == [FP32, FP32, FP32]
    assert on_cpu() == before
    assert before != [FP32, FP32, FP32]


def test_code_that_names_no_device_asks_for_cudas_autocast(fake):
    """As Nemotron's norm does before it casts by itself."""
    with torch.autocast("cpu", dtype=BF16):
        assert not torch.is_autocast_enabled()
        with cuda_autocast():
            assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_gpu_dtype() is BF16
    with cuda_autocast():
        assert not torch.is_autocast_enabled()
