"""Workspaces and buffers that a trace cannot see, computed by hand from pytorch's sources."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.simulate.cuda.reductions import Reduction, workspace
from gcbench.simulate.cuda.workspaces import internal_buffers, persistent_terms

BF16, FP32 = torch.bfloat16, torch.float32
MIB = 2**20
# 4096 x 8 KiB; 4096 x 2 KiB and 16 x 8 KiB.
LARGE, SMALL = 32 * MIB, 8_519_680


def target(card=None):
    return Target(kind="cuda", name=card or "24GiB", card=cards.find(card) if card else None)


def of_capability(text):
    card = dataclasses.replace(cards.find("h100"), compute_capability=text)
    return Target(kind="cuda", name=card.name, card=card)


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def buffers(op, *args, card="h100", **kwargs):
    name, _, overload = op.partition(".")
    func = getattr(getattr(torch.ops.aten, name), overload or "default")
    found = internal_buffers(func, args, kwargs, None, target(card))
    assert all(buffer.source and buffer.nbytes for buffer in found)
    assert len({buffer.name for buffer in found}) == len(found)
    return {buffer.name: buffer.nbytes for buffer in found}


@pytest.mark.parametrize(
    ("capability", "version", "nbytes"),
    [
        ("7.5", "2.13.0+cu130", SMALL),
        ("8.0", "2.13.0+cu130", SMALL),
        ("8.9", "2.13.0+cu130", SMALL),
        ("9.0", "2.11.0+cu128", LARGE),
        ("9.0", "2.13.0+cu130", LARGE),
        ("10.0", "2.11.0+cu128", SMALL),
        ("10.0", "2.12.1", LARGE),
        ("12.0", "2.11.0+cu128", SMALL),
        ("12.0", "2.13.0+cu130", LARGE),
        ("11.0", "2.13.0+cu130", SMALL),
        (None, "2.13.0+cu130", SMALL),
    ],
)
def test_cublas_workspaces(capability, version, nbytes, monkeypatch):
    """One for the main thread and one for the backward pass's, which has a handle of its own."""
    monkeypatch.setattr(torch, "__version__", version)
    inside = [term for term in persistent_terms(of_capability(capability)) if term.in_allocator]
    cublas = [term for term in inside if term.name.startswith("cuBLAS workspace")]
    assert [(term.nbytes, term.requested_at) for term in cublas] == [(nbytes, "forward"), (nbytes, "backward")]
    assert all("mm.default" in term.requested_by for term in cublas)
    lt = [term for term in inside if term not in cublas]
    assert [(term.nbytes, term.requested_by) for term in lt] == [(MIB, ("addmm.default",))] * 2 * ("2.11" in version)


def test_without_a_backward_pass_there_is_one_workspace():
    assert [term.requested_at for term in persistent_terms(target("h100"), trains=False)] == ["forward", "forward"]


@pytest.mark.parametrize("card", [card.name for card in cards.cards() if card.vendor == "nvidia"])
def test_every_card_has_a_context_outside_the_allocator(card):
    """In the allocator's figures it would be counted twice when compared with `max_memory_allocated`."""
    terms = persistent_terms(target(card))
    outside = [term for term in terms if not term.in_allocator]
    assert len(outside) == 1
    assert 100 * MIB < outside[0].nbytes < 1024 * MIB
    assert "measured by" in outside[0].source
    assert all("pytorch" in term.source or "http" in term.source or "results/" in term.source for term in terms)
    assert len({term.name for term in terms}) == len(terms)


def test_the_cpu_and_amds_cards_have_no_persistent_terms():
    assert persistent_terms(target("mi300x")) == ()
    assert persistent_terms(Target(kind="cpu", name="cpu")) == ()


def test_embedding_sorts_its_tokens_and_adds_them_in_fp32():
    """8,192 tokens of up to 8,192 kinds: 819 + 8,192 partial segments, each a row in fp32, twice the gradient."""
    tokens = meta(4, 2048, dtype=torch.int64)
    found = buffers("embedding_dense_backward", meta(4, 2048, 4096), tokens, 32_000, -1, False)
    assert found.pop("sums of partial segments") == 9011 * 4096 * 4
    assert found.pop("offsets of partial segments") == 9011 * 8
    assert found.pop("number of segments") == found.pop("number of partial segments") == 8
    assert found.pop("CUB's sort") == 8192 * (8 + 8) + 4607 + 2048  # as an emulated card's allocator has it
    assert found.pop("CUB's selection") == found.pop("CUB's scan") == 1279
    assert set(found.values()) == {8192 * 8}
    assert len(found) == 7


def test_embedding_sorts_before_its_result_is_allocated():
    """The trap: a large gradient finds another free block once the buffers of the sort have theirs."""
    tokens = meta(4, 2048, dtype=torch.int64)
    func = torch.ops.aten.embedding_dense_backward.default
    found = internal_buffers(func, (meta(4, 2048, 4096), tokens, 32_000, -1, False), {}, None, target("h100"))
    first = [(buffer.name, buffer.outlives) for buffer in found if buffer.after_results == 0]
    assert first == [("sorted tokens", None), ("their places", None), ("range", 1), ("CUB's sort", 0)]


def test_few_tokens_are_not_sorted():
    gradient, tokens = meta(3072, 64), meta(3072, dtype=torch.int64)
    assert buffers("embedding_dense_backward", gradient, tokens, 32_000, -1, False) == {}
    assert "counts" in buffers("embedding_dense_backward", gradient, tokens, 32_000, -1, True)


def test_few_kinds_of_tokens_are_added_in_one_kernel_since_torch_2_11(monkeypatch):
    """4 kinds: 4 segments, 819 + 4 partial ones, 4 blocks of 128 threads; 823 > 4 x 4."""
    given = "embedding_dense_backward", meta(8192, 128), meta(8192, dtype=torch.int64), 4, -1, False
    found = buffers(*given)
    assert found["gradient in fp32"] == 4 * 128 * 4
    assert found["segments of partial segments"] == 823 * 8
    assert "sums of partial segments" not in found
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    found = buffers(*given)
    assert found["sums of partial segments"] == 823 * 128 * 4
    assert "gradient in fp32" not in found


def test_layer_norm_of_many_narrow_rows():
    """131,072 rows in blocks of 32; a model's rows are fewer, and need no buffer."""
    rows, columns = 131_072, 128
    weight = meta(columns, dtype=FP32)
    row = meta(rows, 1, dtype=FP32)

    def found(rows, columns, wanted):
        x, weight = meta(rows, columns, dtype=FP32), meta(columns, dtype=FP32)
        return buffers("native_layer_norm_backward", x, x, [columns], row, row, weight, weight, wanted)

    both = found(rows, columns, [True, True, True])
    assert both["partial gradients of the weight"] == both["partial gradients of the bias"] == 4096 * columns * 4
    assert set(found(rows, columns, [True, True, False])) >= {"partial gradients of the weight", "partial sums"}
    assert "partial gradients of the bias" not in found(rows, columns, [True, True, False])
    assert found(rows, columns, [True, False, False]) == {}
    assert found(65_536, columns, [True, True, True]) == {}
    assert found(rows, 4096, [True, True, True]) == {}
    x = meta(rows, columns, dtype=FP32)
    rms = buffers("_fused_rms_norm_backward", x, x, [columns], row, weight, [True, True])
    assert rms["partial gradients of the weight"] == 4096 * columns * 4


def test_index_put_sorts_places_before_it_adds():
    tensor, places = meta(50, 8, dtype=FP32), meta(100, dtype=torch.int64)
    found = buffers("_index_put_impl_", tensor, [places], meta(100, 8, dtype=FP32), True)
    assert set(found.values()) == {100 * 8}
    assert len(found) == 6
    one = buffers("index_put", tensor, [None, meta(30, dtype=torch.int64)], meta(1, dtype=FP32), True)
    assert one["expanded values"] == 50 * 30 * 4
    assert buffers("index_put", tensor, [places], meta(100, 8, dtype=FP32), False) == {}
    assert buffers("index_put", tensor, [places], meta(100, 8, dtype=FP32)) == {}


def test_one_long_row_is_sorted_in_second_copies():
    """The chosen experts of all tokens, in one row of int64."""
    found = buffers("sort.stable", meta(8192, dtype=torch.int64), stable=True, dim=0)
    assert found == dict.fromkeys(["places", "second copy of the keys", "second copy of the values"], 8192 * 8)
    assert buffers("sort", meta(4096)) == buffers("sort", meta(2048, 64)) == buffers("sort", meta()) == {}


def test_grouped_products_have_their_arguments_on_the_card():
    """Seven groups: pointers for eight, so that what follows is aligned, strides and shapes for seven."""
    left, right, ends = meta(128, 64), meta(7, 64, 32), meta(7, dtype=torch.int32)
    expected = {"arguments of the groups": 3 * 8 * 8 + 3 * 8 * 7 + 3 * 4 * 7}
    assert buffers("_grouped_mm", left, right, ends) == expected
    assert buffers("_grouped_mm", left.T, meta(128, 32), ends) == expected
    assert buffers("_grouped_mm", left, right, ends, card="a100-80gb") == {}
    assert buffers("_grouped_mm", left.to(FP32), right.to(FP32), ends) == {}


@pytest.mark.parametrize(
    ("card", "blocks"),
    [
        # Blocks of 32 x 4 threads, each thread for 4 columns: 32 blocks beside each other. 2048 threads: 16 blocks.
        ("h100", 132 * 16 // 32),
        ("a100-80gb", 108 * 16 // 32),
        # 1536 threads, 12 blocks.
        ("rtx-4090", 128 * 12 // 32),
        # 1024 threads, 8 blocks.
        ("t4", 40 * 8 // 32),
    ],
)
def test_column_sums_allocate_partial_results_for_each_thread(card, blocks):
    """The gradient of a bias: partial results as large as the card is wide, 132 MiB for 16 KiB of result."""
    rows, columns = 8192, 4096
    expected = {"partial sums": 4 * columns * blocks * 32 * 4, "semaphores": 32 * 4}
    assert buffers("sum.dim_IntList", meta(rows, columns), [0], True, card=card) == expected
    assert buffers("sum.dim_IntList", meta(4, 2048, columns), [0, 1], True, card=card) == expected
    assert buffers("sum.dim_IntList", meta(4, 2048, columns), [-2, -3], card=card) == expected
    assert buffers("mean.dim", meta(rows, columns), [0], card=card) == expected


def test_sums_that_fill_the_card_need_no_buffer():
    """Rows have a block each, 50,257 columns fill more than the card, and 256 rows are too few to be split."""
    assert buffers("sum.dim_IntList", meta(8192, 4096), [1]) == {}
    assert buffers("sum.dim_IntList", meta(8192, 50_257), [0]) == {}
    assert buffers("sum.dim_IntList", meta(256, 4096), [0]) == {}
    assert buffers("sum.dim_IntList", meta(8192, 4096), [0], card="mi300x") == {}
    assert buffers("sum", meta(0)) == buffers("sum", meta()) == {}


def test_a_sum_over_all_dimensions_has_one_number_per_block():
    """2**20 numbers, 512 threads and 16 each: 128 blocks."""
    expected = {"partial sums": 128 * 4, "semaphores": 4}
    for found in (buffers("sum", meta(1024, 1024, dtype=FP32)), buffers("mean", meta(2**20, dtype=FP32))):
        assert found == expected
    assert buffers("sum.dim_IntList", meta(1024, 1024, dtype=FP32), None) == expected
    assert buffers("sum", meta(2**20, dtype=torch.float64))["partial sums"] == 128 * 8


def test_a_sum_in_another_dtype_casts_first_unless_from_half_to_fp32():
    """Counting labels makes an int64 of each comparison; autocast's fp32 sums of bf16 read bf16."""
    assert buffers("sum", meta(8, 16, dtype=torch.bool)) == {"cast input": 8 * 16 * 8}
    assert buffers("sum", meta(8, 16, dtype=FP32), dtype=torch.float64) == {"cast input": 8 * 16 * 8}
    assert buffers("sum", meta(8, 16), dtype=FP32) == {}


def test_sums_beyond_32_bits_go_part_by_part_into_fp32():
    """8 GiB of bf16; a result in fp32 needs no second one."""
    large = meta(2**20, 4096)
    assert buffers("sum.dim_IntList", large, [0])["result in fp32"] == 4096 * 4
    assert "result in fp32" not in buffers("sum.dim_IntList", large, [0], dtype=FP32)


def test_strides_decide_not_shapes():
    """A transposed matrix summed over its last dimension is a column sum."""
    plain = Reduction(shape=(8192, 4096), strides=(4096, 1), reduced=[0], itemsize=2, acc_itemsize=4)
    turned = dataclasses.replace(plain, shape=(4096, 8192), strides=(1, 4096), reduced=[1])
    odd = dataclasses.replace(plain, offset=1)
    card = {"num_sms": 132, "threads_per_sm": 2048}
    assert workspace(turned, **card) == workspace(plain, **card)
    # No four neighbours can be read at once: 32 x 16 threads, 128 blocks beside each other, 528 fit, 5 for a column.
    assert workspace(odd, **card).partials_bytes == 4096 * 5 * 32 * 4
    view = meta(8192 * 4096 + 1)[1:].view(8192, 4096)
    assert buffers("sum.dim_IntList", view, [0])["partial sums"] == 4096 * 5 * 32 * 4


class Inside(TorchDispatchMode):
    """The buffers inside the operators of a trace, by operator."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for buffer in internal_buffers(func, args, kwargs or {}, result, target("h100")):
            self.found.setdefault(func.__name__.split(".")[0], set()).add(buffer.name)
        return result


def test_operators_are_recognised_as_a_trace_sees_them():
    """A dispatch mode gets no arguments that have their default, and some by name."""
    with FakeTensorMode(), Inside() as inside:
        embedding = torch.nn.Embedding(1000, 256)
        linear = torch.nn.Linear(256, 256)
        hidden = linear(embedding(torch.zeros(4096, dtype=torch.int64)))
        hidden[torch.zeros(10, dtype=torch.int64)].sum().backward()
        torch.zeros(8192, dtype=torch.int64).argsort()
    assert "partial sums" in inside.found["sum"]
    assert "sorted tokens" in inside.found["embedding_dense_backward"]
    assert "their order" in inside.found["index_put"]
    assert "places" in inside.found["sort"]


def test_other_devices_and_operators_have_none():
    x = meta(8192, 4096)
    assert internal_buffers(torch.ops.aten.sum.dim_IntList, (x, [0]), {}, None, Target(kind="cpu", name="cpu")) == ()
    assert internal_buffers(torch.ops.aten.mul.Tensor, (x, x), {}, None, target("h100")) == ()
