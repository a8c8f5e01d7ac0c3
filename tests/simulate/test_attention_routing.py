"""On fake CPU tensors attention runs the kernels of the CUDA card, and allocates what they allocate there."""

from __future__ import annotations

import math
import weakref
from unittest import mock

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.simulate.cuda import attention
from gcbench.simulate.cuda.attention import CudaAttention, math_attention
from gcbench.simulate.cuda.attention_buffers import internal_buffers
from gcbench.simulate.cuda.attention_rules import Choice

BATCH, HEADS, SEQ, DIM = 2, 8, 128, 64


def target(card=None):
    return Target(kind="cuda", name=card or "24GiB", card=cards.find(card) if card else None)


class Ledger(TorchDispatchMode):
    """What operators allocate, in order, and the most bytes alive at one time with the buffers inside operators."""

    def __init__(self, on=None):
        super().__init__()
        self.on = on
        self.taken = []
        self.inside = []
        self.calls = []
        self.live = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.__name__.split(".")[0], kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.note(func, value.untyped_storage())
        if self.on is not None:
            inside = internal_buffers(func, args, kwargs or {}, self.on)
            self.inside += [(buffer.name, buffer.nbytes) for buffer in inside]
            self.peak = max(self.peak, self.live + sum(buffer.nbytes for buffer in inside))
        return result

    def note(self, func, storage):
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.taken.append((func.__name__.split(".")[0], nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)

        def released(reference):
            del self.alive[key]
            self.live -= nbytes

        self.alive[key] = weakref.ref(storage, released)

    def of_attention(self):
        return [(name, nbytes) for name, nbytes in self.taken if "attention" in name and nbytes]

    def named(self, name):
        return [nbytes for taken, nbytes in self.taken if taken == name]


def projected(heads=HEADS, dim=DIM, seq=SEQ, dtype=torch.bfloat16, batch=BATCH):
    """As a projection leaves it: (batch, seq, heads, dim) in memory, seen as (batch, heads, seq, dim)."""
    return torch.randn(batch, seq, heads, dim, dtype=dtype).transpose(1, 2).detach().requires_grad_()


def attend(card, *, kv_heads=HEADS, dim=DIM, seq=SEQ, dtype=torch.bfloat16, backward=True, mask=None, **kwargs):
    """One call on fake tensors, forward and backward; returns the mode and the ledger."""
    with FakeTensorMode():
        query, key, value = (projected(heads, dim, seq, dtype) for heads in (HEADS, kv_heads, kv_heads))
        grad = torch.zeros(BATCH, seq, HEADS, dim, dtype=dtype).transpose(1, 2)
        mask = mask() if mask else None
        with Ledger(on=target(card)) as ledger, CudaAttention(target(card)) as mode:
            out = functional.scaled_dot_product_attention(query, key, value, mask, **kwargs)
            assert out.shape == query.shape
            if backward:
                out.backward(grad)
                assert key.grad.shape == key.shape
    return mode, ledger


FLASH, FLASH_BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
EFFICIENT, CUDNN = "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"
OUT = BATCH * HEADS * SEQ * DIM * 2
SCORES = BATCH * HEADS * SEQ * SEQ * 4
ROWS = BATCH * HEADS * SEQ * 4


def test_flash_allocates_its_output_the_lse_and_three_gradients():
    """The trap: the CPU's kernel saves another lse and another layout. 16 and 8 bytes are the random state."""
    mode, ledger = attend("a100-80gb", is_causal=True)
    assert mode.chosen == {"flash": 1}
    assert mode.reasons == {}
    assert ledger.of_attention() == [
        *((FLASH, nbytes) for nbytes in (OUT, ROWS, 16, 8)),
        *((FLASH_BACKWARD, OUT) for _ in range(3)),
    ]
    assert len([nbytes for _, nbytes in ledger.taken if nbytes]) == 7


def test_flash_does_not_repeat_grouped_heads():
    """The trap: heads repeated before the call cost four times the keys and values, and gradients to match."""
    _, ledger = attend("a100-80gb", kv_heads=2, enable_gqa=True)
    assert [nbytes for name, nbytes in ledger.of_attention() if name == FLASH_BACKWARD] == [OUT, OUT // 4, OUT // 4]
    assert not ledger.named("clone")


def test_cudnn_allocates_what_flash_allocates():
    mode, ledger = attend("h200", is_causal=True, kv_heads=2, enable_gqa=True)
    assert mode.chosen == {"cudnn": 1}
    forward = [nbytes for name, nbytes in ledger.of_attention() if name == CUDNN]
    assert sorted(forward) == [8, 8, ROWS, OUT]


def test_math_allocates_the_scores():
    """The traps: half is computed in fp32; the mask is added in place, which a dispatch mode prevents in the
    composite; dropout keeps one byte an element, not four.
    """
    mode, ledger = attend("t4", is_causal=True, dropout_p=0.1)
    assert mode.chosen == {"math": 1}
    assert ledger.named("bmm")[0] == SCORES
    assert ledger.named("add") == []
    assert ledger.named("native_dropout") == [SCORES, SCORES // 4]
    assert ledger.named("_safe_softmax") == [SCORES]
    assert ledger.inside[:3] == [("masked", SCORES // 4), ("masked_rows", ROWS // 4), ("zero", 4)]
    assert ledger.inside[3:] == [("grad * output", SCORES)]


def test_math_repeats_grouped_heads():
    """The trap: an fp32 Llama on an A100. Memory-efficient attention does not support grouped heads."""
    mode, ledger = attend("a100-80gb", dtype=torch.float32, kv_heads=2, enable_gqa=True)
    assert mode.chosen == {"math": 1}
    assert mode.reasons == {"flash": {"float32": 1}, "efficient": {"8 query heads on 2 key heads": 1}}
    assert ledger.named("clone")[:2] == [2 * OUT, 2 * OUT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "boolean", "float"])
def test_math_is_pytorchs_math(kind, kv_heads, dtype):
    """Against `_scaled_dot_product_attention_math` on real tensors: the same values, gradients and blocks.

    Blocks are compared as a multiset, and their peak: one pair is released in the other order. Numbers of up to 64
    bytes are scalars, which a CUDA card never sees.
    """
    torch.manual_seed(0)
    tensors = [projected(heads, 16, 32, dtype) for heads in (4, kv_heads, kv_heads)]
    allowed = torch.rand(BATCH, 1, 32, 32) > 0.2
    mask = {"causal": None, "boolean": allowed, "float": torch.where(allowed, 0.0, -1.0).to(dtype)}[kind]
    grad = torch.randn(BATCH, 4, 32, 16, dtype=dtype)

    def original():
        with sdpa_kernel(SDPBackend.MATH):
            out = functional.scaled_dot_product_attention(*tensors, mask, is_causal=mask is None, enable_gqa=True)
        return out, *torch.autograd.grad(out, tensors, grad)

    def ours():
        out = math_attention(*tensors, mask, 0.0, mask is None, None, True)
        return out, *torch.autograd.grad(out, tensors, grad)

    for theirs, mine in zip(original(), ours(), strict=True):
        assert torch.equal(theirs, mine)
        assert theirs.stride() == mine.stride()
    (their_blocks, their_peak), (blocks, peak) = blocks_of(original), blocks_of(ours)
    assert sorted(blocks) == sorted(their_blocks)
    assert abs(peak - their_peak) <= 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_math_frees_its_tensors_in_pytorchs_order(dtype):
    """As in a checkpointed layer, whose forward pass saves nothing: C++ destroys its variables last to first."""
    tensors = [projected(heads, 16, 32, dtype) for heads in (4, 2, 2)]

    def original():
        with sdpa_kernel(SDPBackend.MATH):
            functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        theirs, ours = (
            [nbytes for nbytes in blocks_of(run)[0] if nbytes < 0]
            for run in (original, lambda: math_attention(*tensors, None, 0.0, True, None, True))
        )
    assert ours == theirs


@pytest.fixture(autouse=True)
def ledgers_are_of_the_trace(monkeypatch):
    monkeypatch.setattr(attention, "_OF_THE_TRACE", (*attention._OF_THE_TRACE, Ledger))


class Listing(TorchDispatchMode):
    """Notes the operators that reach it, as selective checkpointing's mode sees them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_under_a_policy_math_adds_the_mask_out_of_place_as_pytorchs_does():
    """The trap: an addition in place changes a product that the policy saves, and the cell is refused."""
    tensors = [projected(heads, 16, 32, torch.float32) for heads in (4, 2, 2)]
    with sdpa_kernel(SDPBackend.MATH), Listing() as theirs:
        functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    with Listing() as ours:
        math_attention(*tensors, None, 0.0, True, None, True)
    for listing in (theirs, ours):
        assert "aten.add.Tensor" in listing.names and "aten.add_.Tensor" not in listing.names


def blocks_of(run):
    """Allocations and releases of more than 64 bytes, and the peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return [size for size in sizes if abs(size) > 64], peak


def test_flash_pads_head_dimensions():
    """The trap: the scale is that of 20, not of the 24 that the kernel sees."""
    _, ledger = attend("a100-80gb", dim=20)
    padded = BATCH * HEADS * SEQ * 24 * 2
    assert ledger.named("constant_pad_nd")[:3] == [padded] * 3
    assert ledger.of_attention()[0] == (FLASH, padded)
    scales = [kwargs["scale"] for name, kwargs in ledger.calls if name == FLASH]
    assert scales == [pytest.approx(1 / math.sqrt(20))]


def test_a_boolean_mask_becomes_numbers_with_padded_rows():
    """The trap: rows of 100 are copied to 104, once for all heads; the expansion to them is a view."""
    mode, ledger = attend("a100-80gb", seq=100, mask=lambda: torch.ones(BATCH, 1, 100, 100, dtype=torch.bool))
    assert mode.chosen == {"efficient": 1}
    assert mode.reasons == {"flash": {"an explicit mask": 1}}
    assert ledger.named("where") == [BATCH * 100 * 100 * 2]
    assert ledger.named("constant_pad_nd") == [BATCH * 100 * 104 * 2]
    rounded_lse = BATCH * HEADS * 128 * 4
    assert (EFFICIENT, rounded_lse) in ledger.of_attention()


def test_an_aligned_mask_is_not_copied():
    _, ledger = attend("a100-80gb", mask=lambda: torch.zeros(SEQ, SEQ, dtype=torch.bfloat16))
    assert ledger.named("constant_pad_nd") == []


def test_the_lse_is_left_out_without_gradients():
    with torch.no_grad():
        _, ledger = attend("a100-80gb", dtype=torch.float32, backward=False)
    assert ledger.of_attention() == [(EFFICIENT, 2 * OUT), (EFFICIENT, 8), (EFFICIENT, 8)]


def test_autocast_comes_before_the_rules():
    """The trap: the rules applied above autocast. fp32 tensors would take the memory-efficient kernel; and the fp32
    products inside math would be cast back to half.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mode, ledger = attend("a100-80gb", dtype=torch.float32, backward=False)
        assert mode.chosen == {"flash": 1}
        assert ledger.named("_to_copy") == [OUT] * 3
        _, ledger = attend("t4", dtype=torch.float32, backward=False)
        assert ledger.named("bmm")[0] == SCORES
        assert torch.is_autocast_enabled("cpu")


def test_recomputation_runs_the_same_kernel():
    """The trap: a checkpointed layer runs a second time inside the backward pass, where function modes are off."""
    with FakeTensorMode(), CudaAttention(target("a100-80gb")) as mode:
        query = projected()
        out = checkpoint(functional.scaled_dot_product_attention, query, query, query, use_reentrant=False)
        assert mode.chosen == {"flash": 1}
        out.sum().backward()
    assert mode.chosen == {"flash": 2}


def test_multi_head_attention_runs_it_too():
    """The trap: a function mode handles the call of torch's module, and is off for what that calls in turn."""
    before = functional.scaled_dot_product_attention
    with FakeTensorMode(), CudaAttention(target("h200")) as mode:
        module = torch.nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, dtype=torch.bfloat16)
        tokens = torch.zeros(BATCH, SEQ, HEADS * DIM, dtype=torch.bfloat16)
        module(tokens, tokens, tokens, need_weights=False)[0].sum().backward()
    assert mode.chosen == {"cudnn": 1}
    assert functional.scaled_dot_product_attention is before


@pytest.mark.parametrize(
    ("family", "card", "dtype", "changes", "kernel"),
    [
        ("llama", "a100-80gb", torch.bfloat16, {}, "flash"),
        ("llama", "h200", torch.bfloat16, {}, "cudnn"),
        ("llama", "t4", torch.bfloat16, {}, "math"),
        ("llama", "a100-80gb", torch.float32, {}, "math"),
        ("llama", "a100-80gb", torch.float32, {"num_key_value_heads": 4}, "efficient"),
        ("gpt2", "a100-80gb", torch.bfloat16, {}, "flash"),
        ("gpt2", "h200", torch.bfloat16, {}, "flash"),
        ("gpt2", "h200", torch.bfloat16, {"attn_pdrop": 0.0}, "cudnn"),
        ("gpt2", "v100-16gb", torch.float16, {}, "efficient"),
    ],
)
def test_models_run_the_kernel_of_the_card(family, card, dtype, changes, kernel):
    """The traps: gpt2's dropout sends a CPU to math, and the mask that transformers builds for tracers sends
    everything to the memory-efficient kernel.
    """
    settings = {**tiny.CONFIGS[family], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.num_hidden_layers = 1
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *args, **kwargs: None),
        FakeTensorMode(),
        CudaAttention(target(card)) as mode,
    ):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).train()
        tokens = torch.zeros(2, 64, dtype=torch.int64)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert mode.chosen == {kernel: 1}


@pytest.mark.parametrize("masked", [True, False])
def test_math_has_the_peak_that_was_measured_elsewhere(masked, monkeypatch):
    """2.176 GiB, with a boolean mask as with causal, for (1, 32, 2048, 128) in bf16, in intel/torch-xpu-ops#2390.

    Their script held the inputs and a boolean mask of (2048, 2048), and matrix products on CUDA take one workspace of
    8,519,680 bytes in each of the two threads. The traps: 0.5 GiB for the product inside the softmax's backward pass,
    and 0.5 GiB less for the mask added in place.
    """
    monkeypatch.setattr(attention, "choose", lambda call, gpu: Choice(kernel="math"))
    card = target("a100-80gb")
    with FakeTensorMode(), Ledger(on=card) as ledger, CudaAttention(card):
        tensors = [torch.zeros(1, 32, 2048, 128, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        mask = torch.ones(1, 1, 2048, 2048, dtype=torch.bool)
        out = functional.scaled_dot_product_attention(*tensors, mask if masked else None, is_causal=not masked)
        out.float().pow(2).mean().backward()
    assert (ledger.peak + 2 * 8_519_680) / 2**30 == pytest.approx(2.176, abs=0.0005)
