"""Fake CPU tensors run CUDA's kernels, optimizers and gradient scaler. Autocast: `test_cuda_autocast.py`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.simulate.cuda.kernels import as_on_cuda, cuda_operators, experts_of
from gcbench.simulate.cuda.optimizer import foreach_on_cpu
from gcbench.simulate.cuda.workspaces import internal_buffers
from gcbench.simulate.trace.grad_scaler import scaler_for_fake_tensors
from gcbench.simulate.trace.recorder import Recorder

ROWS, WIDTH = 6, 64


class Calls(TorchDispatchMode):
    """The operators that were called, and the new storages that each returned."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.new = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        self.names.append(name)
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                self.new.setdefault(name, []).append((leaf.dtype, leaf.untyped_storage().nbytes()))
        return result

    @property
    def nbytes(self):
        return sum(nbytes for made in self.new.values() for _, nbytes in made)


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def operators(fake):
    with cuda_operators():
        yield


def tensor(*shape, dtype=torch.float32, requires_grad=True):
    return torch.empty(shape or (ROWS, WIDTH), dtype=dtype, requires_grad=requires_grad)


def called(function, *args, **kwargs):
    with Calls() as calls:
        result = function(*args, **kwargs)
    return calls, result


def test_dropout_saves_one_byte_per_element(operators):
    """The CPU's mask is of the input's dtype: four times CUDA's in fp32, and scaled in another operator."""
    for spelling in (
        functional.dropout,
        lambda x: torch.dropout(x, 0.5, True),
        torch.nn.Dropout(0.5),
        lambda x: functional.dropout(x, p=0.25, training=True),
    ):
        calls, result = called(spelling, tensor())
        assert calls.new == {"native_dropout": [(torch.float32, ROWS * WIDTH * 4), (torch.bool, ROWS * WIDTH)]}
        backward, _ = called(result.sum().backward)
        assert "native_dropout_backward" in backward.names


def test_without_cuda_kernels_dropout_saves_a_mask_in_fp32(fake):
    """Fails when the kernels outlive their context, or when torch's CPU learns the fused dropout."""
    with cuda_operators():
        pass
    calls, _ = called(functional.dropout, tensor())
    assert "native_dropout" not in calls.names
    assert calls.nbytes >= 2 * ROWS * WIDTH * 4


def test_idle_dropout_allocates_nothing(operators):
    """torch returns the input itself; a copy would be saved for the backward pass."""
    x = tensor()
    for idle in (torch.dropout(x, 0.0, True), torch.dropout(x, 0.5, False), torch.nn.Dropout(0.0)(x)):
        assert idle is x
    calls, _ = called(functional.dropout, x, 1.0)
    assert "native_dropout" not in calls.names


@pytest.mark.parametrize("function", [functional.softmax, functional.log_softmax])
def test_softmax_of_fp16_into_fp32_makes_no_fp32_copy(operators, function):
    """The kernel casts as it reads, for fp16 alone: bf16 is copied first on CUDA, too."""
    element = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = tensor(dtype=dtype)
        calls, result = called(function, x, dim=-1, dtype=torch.float32)
        assert result.dtype is torch.float32
        result.sum().backward()
        assert x.grad.dtype is dtype
        element[dtype] = calls.nbytes // (ROWS * WIDTH)
    assert element == {torch.float16: 4, torch.bfloat16: 8, torch.float32: 4}


def test_softmax_without_dtype_returns_that_of_its_input(operators):
    for dtype in (torch.float16, torch.bfloat16):
        for result in (tensor(dtype=dtype).softmax(-1), torch.log_softmax(tensor(dtype=dtype), 0)):
            assert result.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_saves_fp32_statistics(operators, dtype):
    """On the CPU the two statistics of each row are halves as their input is."""
    norm = torch.nn.LayerNorm(WIDTH, dtype=dtype)
    x = tensor(dtype=dtype)
    calls, result = called(norm, x)
    made = [block for blocks in calls.new.values() for block in blocks]
    assert made == [(dtype, ROWS * WIDTH * 2), (torch.float32, ROWS * 4), (torch.float32, ROWS * 4)]
    result.sum().backward()
    assert [x.grad.dtype, norm.weight.grad.dtype, norm.bias.grad.dtype] == [dtype] * 3
    assert (x.grad.shape, norm.weight.grad.shape) == (x.shape, (WIDTH,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_norm_of_a_part_of_a_tensor_copies_it(operators, norm, dtype):
    """`expect_contiguous`, as for the queries among fused queries, keys and values; by hand: one copy of the part, in
    the forward pass and again in the backward pass."""
    whole = tensor(ROWS, 3, WIDTH, dtype=dtype)
    part_bytes = ROWS * WIDTH * whole.element_size()
    layer = norm(WIDTH, dtype=dtype)
    target = Target(kind="cuda", name="h100", card=cards.find("h100"))
    copies = {}
    for name, given in (("part", whole[:, 1]), ("whole", tensor(dtype=dtype))):
        recorder = Recorder(partial(internal_buffers, target=target))
        recorder.note(whole, None)
        with recorder:
            result = layer(given)
            result.backward(torch.empty_like(result))
        copies[name] = sum(block.nbytes == part_bytes for block in recorder.trace.blocks)
    assert copies["part"] >= copies["whole"] + 2


@pytest.mark.parametrize(
    ("shapes", "copies"),
    [
        (((4, 1), (6,)), 2),  # one index for rows and one for columns: broadcast, neither is contiguous
        (((4, 6), (6,)), 1),
        (((4, 6), (4, 6)), 0),
        (((6,),), 0),
    ],
)
def test_indices_of_different_strides_are_made_contiguous(operators, shapes, copies):
    """By hand, of AdvancedIndex: a copy of 24 int64 before the result, which outlives the call no more than it does."""
    target = Target(kind="cuda", name="h100", card=cards.find("h100"))
    values, indices = tensor(10, 10, requires_grad=False), [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
    recorder = Recorder(partial(internal_buffers, target=target))
    with recorder:
        result = values[tuple(indices)]
    made = [block.nbytes for block in recorder.trace.blocks]
    assert made == [4 * 6 * 8] * copies + [result.untyped_storage().nbytes()]
    assert [event for event in recorder.trace.events if event < 0] == [~number for number in reversed(range(copies))]


def test_results_that_nobody_reads_are_freed_in_order(operators):
    """By hand: the mean is freed before its reciprocal deviation, as C++ destroys a tuple; Python begins at the end."""
    for dtype in (torch.float32, torch.bfloat16):
        recorder = Recorder()
        with recorder, torch.no_grad():
            torch.nn.LayerNorm(WIDTH, dtype=dtype)(tensor(dtype=dtype))
        statistics = [number for number, block in enumerate(recorder.trace.blocks) if block.nbytes == ROWS * 4]
        assert len(statistics) == 2
        assert [~event for event in recorder.trace.events if event < 0 and ~event in statistics] == statistics


def test_frozen_layer_norm_has_no_gradients_of_its_own(operators):
    """A LoRA adapter trains beside frozen norms: the kernel must not compute gradients that nobody reads."""
    norm = torch.nn.LayerNorm(WIDTH, dtype=torch.bfloat16).requires_grad_(False)
    x = tensor(dtype=torch.bfloat16)
    result = norm(x)
    gradient = torch.empty_like(result)
    calls, _ = called(result.backward, gradient)
    assert calls.new["native_layer_norm_backward"] == [(torch.bfloat16, ROWS * WIDTH * 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_one_kernel_that_saves_one_statistic_per_row(operators, dtype):
    """The CPU's chain of operators saves several tensors of the input's size."""
    norm = torch.nn.RMSNorm(WIDTH, dtype=dtype)
    x = tensor(dtype=dtype)
    calls, result = called(norm, x)
    assert calls.new == {"_fused_rms_norm": [(dtype, ROWS * WIDTH * dtype.itemsize), (torch.float32, ROWS * 4)]}
    backward, _ = called(result.backward, torch.empty_like(result))
    assert "_fused_rms_norm_backward" in backward.names
    assert (x.grad.shape, norm.weight.grad.shape) == (x.shape, (WIDTH,))
    assert norm.weight.grad.dtype is dtype


def test_rms_norm_with_a_weight_of_another_dtype_is_a_chain(operators):
    """`rms_norm_symint` leaves the fused kernel then, on CUDA as well."""
    norm = torch.nn.RMSNorm(WIDTH)
    calls, _ = called(norm, tensor(dtype=torch.bfloat16))
    assert {"pow", "rsqrt"} <= set(calls.names)


def test_real_tensors_compute_what_they_did():
    """The kernels are replaced for the process: a real tensor must still get the same numbers."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH)
    norms = [torch.nn.LayerNorm(WIDTH), torch.nn.RMSNorm(WIDTH)]
    functions = [*norms, lambda x: x.half().softmax(-1, dtype=torch.float32), lambda x: x.log_softmax(0)]
    before = [function(x) for function in functions]
    with cuda_operators():
        after = [function(x) for function in functions]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def parameters(dtype=torch.float32):
    held = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in ((WIDTH, WIDTH), (WIDTH,), (3, WIDTH))]
    for parameter in held:
        parameter.grad = torch.empty_like(parameter)
    return held, sum(parameter.untyped_storage().nbytes() for parameter in held)


def test_adamw_allocates_a_copy_of_all_parameters_at_once(fake):
    """The CPU's loop holds one parameter's temporaries at a time; CUDA's foreach those of all."""
    held, nbytes = parameters()
    optimizer = torch.optim.AdamW(held)
    looped, _ = called(optimizer.step)
    assert "_foreach_sqrt" not in looped.names
    with foreach_on_cpu():
        calls, _ = called(optimizer.step)
    assert sum(nbytes for _, nbytes in calls.new["_foreach_sqrt"]) == nbytes
    assert calls.names.count("_foreach_sqrt") == 1
    again, _ = called(optimizer.step)
    assert "_foreach_sqrt" not in again.names


def test_sgd_is_foreach_and_what_the_user_chose_stays(fake):
    held, _ = parameters()
    with foreach_on_cpu():
        calls, _ = called(torch.optim.SGD(held, momentum=0.9).step)
        assert "_foreach_add_" in calls.names
        calls, _ = called(torch.optim.AdamW(held, foreach=False).step)
        assert not [name for name in calls.names if name.startswith("_foreach")]
        calls, _ = called(torch.optim.AdamW(held, fused=True).step)
        assert "_fused_adamw_" in calls.names


def test_a_scaler_steps_on_fake_tensors(fake):
    """Without the context it reads from a fake tensor whether a gradient overflowed, and ends the simulation."""
    held, _ = parameters()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW(held)

    def step():
        scaler.scale(torch.empty(()))
        scaler.step(optimizer)
        scaler.update()

    with pytest.raises(DataDependentOutputException):
        step()
    optimizer.state.clear()
    scaler = torch.amp.GradScaler("cpu")
    with scaler_for_fake_tensors(), foreach_on_cpu():
        calls, _ = called(step)
    assert "_amp_foreach_non_finite_check_and_unscale_" in calls.names
    assert "_amp_update_scale_" in calls.names
    assert len(optimizer.state) == len(held)


def test_experts_before_ampere_multiply_one_by_one(fake):
    """transformers treats every CPU as able to multiply groups."""
    x = tensor(dtype=torch.bfloat16)
    given = (x, x, torch.empty(1, dtype=torch.int32))[: moe._can_use_grouped_mm.__code__.co_argcount]
    for capability, able in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), (None, True)):
        with experts_of(capability):
            assert moe._can_use_grouped_mm(*given) is able
    assert moe._can_use_grouped_mm(*given)


def test_experts_of_older_transformers_have_gradients_without_the_sizes_of_groups(fake, monkeypatch):
    """By hand: their backward pass is no operator, and asks how many tokens each expert has."""
    operator = OPDEFS["transformers::grouped_mm_fallback"]
    monkeypatch.delitem(OPDEFS, "transformers::grouped_mm_fallback_backward", raising=False)
    monkeypatch.setattr(operator, "_backward_fn", lambda ctx, grad: ctx.offs.tolist())
    states, weight = tensor(6, WIDTH), tensor(2, WIDTH, 3)
    offsets = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(DataDependentOutputException):
        torch.ops.transformers.grouped_mm_fallback(states, weight, offsets).sum().backward()
    with experts_of((7, 5)):
        torch.ops.transformers.grouped_mm_fallback(states, weight, offsets).sum().backward()
    assert (states.grad.shape, weight.grad.shape) == (states.shape, weight.shape)


def test_cuda_kernels_run_for_a_cuda_target_alone(fake):
    """A prediction for the CPU must stay the CPU's."""

    def step():
        x = functional.dropout(tensor())
        held, _ = parameters()
        torch.optim.AdamW(held).step()
        with torch.autocast("cpu", torch.bfloat16):
            return (x.bfloat16() ** 2).dtype

    with as_on_cuda(Target(kind="cpu", name="cpu")):
        calls, dtype = called(step)
    assert dtype is torch.bfloat16
    assert not {"native_dropout", "_foreach_sqrt"} & set(calls.names)
    with as_on_cuda(Target(kind="cuda", name="h100", card=cards.find("h100"))):
        calls, dtype = called(step)
    assert dtype is torch.float32
    assert {"native_dropout", "_foreach_sqrt"} <= set(calls.names)
