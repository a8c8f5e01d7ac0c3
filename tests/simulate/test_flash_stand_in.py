"""What replaces the package's functions saves and returns what they do: sizes by hand from flash-attn's sources."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gcbench.simulate.cuda import flash_stand_in

BATCH, HEADS, KEY_HEADS, LENGTH = 2, 4, 2, 96


class Attention(torch.nn.Module):
    is_causal = True


def call(head_dim: int, **kwargs: object) -> tuple[torch.Tensor, list[tuple[torch.dtype, tuple[int, ...]]]]:
    """The result, of bf16 inputs that require gradients, and (dtype, shape) of what is saved for the backward pass."""
    saved: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    query, key, value = (
        torch.empty(BATCH, heads, LENGTH, head_dim, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = flash_stand_in._attend(Attention(), query, key, value, **{"attention_mask": None, **kwargs})
    out.sum().backward()
    assert key.grad is not None and key.grad.shape == key.shape
    return out, saved


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode():
        yield


def packed() -> dict[str, object]:
    ends = torch.zeros(5, dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 64, "max_length_k": 64}


def test_sequences_of_one_length_take_the_dense_kernel():
    """By hand from `mha_fwd`: softmax_lse is (batch, heads, queries) in fp32."""
    out, saved = call(64)
    assert out.shape == (BATCH, LENGTH, HEADS, 64)
    assert (torch.float32, (BATCH, HEADS, LENGTH)) in saved


@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (60, 64)])
def test_packed_sequences_take_the_kernel_for_lengths_that_vary(head_dim, padded):
    """By hand from `mha_varlen_fwd`: softmax_lse is (heads, tokens), and heads are padded to a multiple of 8."""
    tokens = BATCH * LENGTH
    out, saved = call(head_dim, **packed())
    assert out.shape == (BATCH, LENGTH, HEADS, head_dim)
    assert (torch.float32, (HEADS, tokens)) in saved
    assert saved.count((torch.bfloat16, (tokens, HEADS, padded))) == 2  # query and out
    assert saved.count((torch.bfloat16, (tokens, KEY_HEADS, padded))) == 2


def test_three_of_the_four_lengths_are_not_enough():
    """transformers asks for all of them before it takes the batch for a packed one."""
    _, saved = call(64, **{**packed(), "max_length_k": None})
    assert (torch.float32, (BATCH, HEADS, LENGTH)) in saved


def test_a_padded_batch_is_taken_apart_and_put_together():
    """By hand from `_upad_input`: the tokens of query, key and value are copies, chosen by int64 indices."""
    tokens = BATCH * LENGTH
    out, saved = call(64, attention_mask=torch.ones(BATCH, LENGTH, dtype=torch.bool))
    assert out.shape == (BATCH, LENGTH, HEADS, 64)
    assert (torch.float32, (HEADS, tokens)) in saved
    assert saved.count((torch.int64, (tokens,))) == 4
