"""The buffers inside attention's kernels, computed by hand from their sources."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import ROOT

from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.simulate.cuda.attention_buffers import internal_buffers

FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"


def target(card=None):
    return Target(kind="cuda", name=card or "24GiB", card=cards.find(card) if card else None)


def buffers(op, *args, card="a100-80gb", **kwargs):
    found = internal_buffers(getattr(torch.ops.aten, op).default, args, kwargs, target(card))
    assert all(buffer.source for buffer in found)
    return {buffer.name: buffer.nbytes for buffer in found}


def meta(*shape, dtype=torch.bfloat16):
    """(batch, heads, seq, dim), laid out as (batch, seq, heads, dim)."""
    batch, heads, seq, dim = shape
    return torch.empty(batch, seq, heads, dim, dtype=dtype, device="meta").transpose(1, 2)


def test_flash_backward_accumulates_in_fp32():
    """By hand from `mha_bwd`: 100 queries round to 128, a head dimension of 80 to 96, one of 160 to 192."""
    for dim, rounded in ((80, 96), (160, 192)):
        query, key = meta(2, 8, 100, dim), meta(2, 2, 100, dim)
        found = buffers(f"{FLASH}_backward", query, query, key, key, query, None, None, None, 100, 100, 0.0, True)
        assert found == {
            "softmax_d": 2 * 8 * 128 * 4,
            "dq_accum": 2 * 128 * 8 * rounded * 4,
            "dk_expanded": 2 * 100 * 8 * dim * 2,
            "dv_expanded": 2 * 100 * 8 * dim * 2,
        }


def test_flash_backward_copies_a_gradient_in_another_layout():
    query = meta(2, 8, 128, 64)
    other = torch.empty(2, 8, 128, 64, dtype=torch.bfloat16, device="meta")
    found = buffers(f"{FLASH}_backward", other, query, query, query, query, None, None, None, 128, 128, 0.0, True)
    assert found["contiguous grad_out"] == 2 * 8 * 128 * 64 * 2
    assert "contiguous out" not in found
    assert "dk_expanded" not in found


def test_copies_are_made_before_the_gradients():
    """`_flash_attention_backward` and `_efficient_attention_backward` allocate what they return after their copies."""
    query = meta(2, 8, 128, 64)
    other = torch.empty(2, 8, 128, 64, dtype=torch.bfloat16, device="meta")
    flash = (other, query, query, query, other, None, None, None, 128, 128, 0.0, True)
    efficient = (other, query, query, query, None, query, None, None, None, 0.0, [True] * 4, True)
    for op, args, count in ((FLASH, flash, 2), (EFFICIENT, efficient, 1)):
        backward = getattr(torch.ops.aten, f"{op}_backward").default
        found = internal_buffers(backward, args, {}, target("a100-80gb"))
        copies = [buffer for buffer in found if buffer.name.startswith("contiguous")]
        assert len(copies) == count and all(buffer.after_results == 0 for buffer in copies)


def test_flash_backward_of_packed_sequences_has_room_between_them():
    """By hand from `mha_varlen_bwd` of flash-attn's csrc/flash_attn/flash_api.cpp: 128 rows more for each of 3."""
    query, key = (torch.empty(300, heads, 80, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    arguments = (query, query, key, key, query, None, ends, ends, 120, 120, 0.0, True, None, None)
    assert buffers("_flash_attention_backward", *arguments) == {
        "softmax_d": 8 * (300 + 3 * 128) * 4,
        "dq_accum": (300 + 3 * 128) * 8 * 96 * 4,
        "dk_expanded": 300 * 8 * 80 * 2,
        "dv_expanded": 300 * 8 * 80 * 2,
    }
    alone = buffers(
        "_flash_attention_backward", query, query, query, query, query, None, ends, ends, 120, 120, 0.0, True
    )
    assert "dk_expanded" not in alone


@pytest.mark.parametrize(
    ("card", "batch", "heads", "seq", "splits"),
    [
        # 108 processors: 216 slots. 16 x 16 blocks are more than 0.8 x 216.
        ("a100-80gb", 1, 16, 1024, 1),
        # 12 x 16 = 192 are, too.
        ("a100-80gb", 1, 12, 1024, 1),
        # 12 x 8 = 96 blocks, 2 key blocks of 256: 0.44 of a wave, or 0.89.
        ("a100-80gb", 1, 12, 512, 2),
        # 132 processors: 264 slots, 192 blocks, 4 key blocks: 0.73, 0.73, not 3, 0.97.
        ("h200", 1, 12, 1024, 4),
    ],
)
def test_flash_forward_splits_keys_when_blocks_are_few(card, batch, heads, seq, splits):
    """The trap: it is not for inference alone. By hand from `num_splits_heuristic`; and dropout never splits.

    Defaults are left out of the arguments, as a dispatch mode gets them.
    """
    query = meta(batch, heads, seq, 64)
    rows = splits * batch * heads * seq * 4
    expected = {"partial lse": rows, "partial out": rows * 64} if splits > 1 else {}
    assert buffers(FLASH, query, query, query, card=card, scale=0.1) == expected
    assert buffers(FLASH, query, query, query, 0.1, card=card) == {"first rng_state": 16}


@pytest.mark.parametrize(
    ("card", "dim", "workspace"),
    [
        # dQ in tiles of 64 x 64 fp32 and a header: 4 of them.
        ("a100-80gb", 64, 4 * (16 + 64 * 64 * 4)),
        # Tiles of 128 x 128: 2.
        ("a100-80gb", 128, 2 * (16 + 128 * 128 * 4)),
        # Too little shared memory: 4 x 2 tiles of 64 x 64; dK and dV in 4 splits (of 200 // 16 = 12) of 64 x 128.
        ("rtx-5090", 128, 8 * (16 + 64 * 64 * 4) + 2 * 4 * 64 * 128 * 4),
        # A kernel for sm86 and sm89 alone: tiles of 128 x 64, 2 x 2.
        ("rtx-4090", 96, 4 * (16 + 128 * 64 * 4)),
    ],
)
def test_efficient_backward_workspace_in_half(card, dim, workspace):
    """By hand from `workspace_size`, for each of 2 x 8 heads of 256 queries and keys."""
    assert efficient_backward(card, meta(2, 8, 256, dim)) == {"delta": 16 * 256 * 4, "workspace": 16 * workspace}


def test_efficient_backward_in_fp32_multiplies_first():
    """The trap: fp32 kernels do not compute delta. The product and its sum are freed before the workspace is allocated,
    but not before the dense copy of the sum, by hand: tiles of 128 x 64 with headers are 2 x 2 for 256 x 128.
    """
    rows = 16 * 256 * 4
    query = meta(2, 8, 256, 128, dtype=torch.float32)
    found = efficient_backward("a100-80gb", query)
    workspace = 16 * 4 * (16 + 128 * 64 * 4)
    assert found == {"grad_out * out": rows * 128, "its sum": rows, "delta": rows, "workspace": workspace}
    rest = (None, query, None, None, None, 0.0, [True, True, True, False])
    op = getattr(torch.ops.aten, f"{EFFICIENT}_backward").default
    in_order = internal_buffers(op, (query,) * 4 + rest, {}, target("a100-80gb"))
    assert [buffer.outlives for buffer in in_order] == [2, 1, 1, None]


def efficient_backward(card, query):
    rest = (None, query, None, None, None, 0.0, [True, True, True, False])
    return buffers(f"{EFFICIENT}_backward", query, query, query, query, *rest, card=card)


def test_efficient_forward_accumulates_only_wide_heads():
    """The trap: fp32 output needs no second copy of itself, and heads up to 128 stay in registers."""
    for dtype, dim, expected in (
        (torch.bfloat16, 128, {}),
        (torch.bfloat16, 264, {"output_accum": 16 * 256 * 264 * 4}),
        (torch.float32, 264, {}),
    ):
        query = meta(2, 8, 256, dim, dtype=dtype)
        assert buffers(EFFICIENT, query, query, query, None, True) == expected


def test_cudnn_backward_workspace_is_one_block_of_all_that_it_needs():
    query, key = meta(2, 8, 256, 64), meta(2, 2, 256, 64)
    full_heads = 16 * 256 * 64 * 2
    rows = 16 * 256 * 4
    alone = buffers(f"{CUDNN}_backward", query, query, query, query, query, card="h200")
    assert alone == {"cuDNN's workspace": rows * 64 + rows + 256}
    grouped = buffers(f"{CUDNN}_backward", query, query, key, key, query, card="h200")
    assert grouped == {"cuDNN's workspace": rows * 64 + rows + 2 * full_heads + 256}


@pytest.mark.parametrize(
    ("case", "shape", "key_heads"),
    [
        ("llama-3.2-1b, off", (2, 32, 1024, 64), 8),
        ("qwen2.5-0.5b, off", (2, 14, 1024, 64), 2),
        ("gemma-3-1b, 12 layers, off", (2, 4, 1024, 256), 1),
        ("gemma-3-1b, 12 layers, off", (2, 4, 1024, 256), 4),  # the layers with a window, whose heads are repeated
    ],
)
def test_cudnn_backward_workspace_is_what_an_h100_allocated(case, shape, key_heads):
    """From the history of its allocator, torch 2.11: one block per layer, freed at once."""
    stored = json.loads((ROOT / "results/reference/plain-loop-nvidia-h100.json").read_text(encoding="utf-8"))
    events = stored["cases"][case]["events"]
    query, key = meta(*shape), meta(shape[0], key_heads, *shape[2:])
    (nbytes,) = buffers(f"{CUDNN}_backward", query, query, key, key, query, card="h100").values()
    assert any(taken == nbytes and given == -nbytes for taken, given in itertools.pairwise(events))


def test_other_operators_have_no_buffers():
    assert internal_buffers(torch.ops.aten.mul.Tensor, (), {}, target("a100-80gb")) == ()
