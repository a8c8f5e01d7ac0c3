"""Calls of operators as text: their form, their interpolation to other sizes, and the same work when replayed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from timed_calls import pointwise, step_of, tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench.operators import call_text
from gcbench.operators.call_text import form
from gcbench.operators.replay import NotReplayable, Replayer
from gcbench.simulate.op_work import CACHED_BYTES, CacheAges, of_call

# Calls as text.


def test_calls_that_differ_in_size_alone_have_one_form():
    def of(batch, heads, tokens):
        transposed = tensor(batch, heads, tokens, 64, strides=(tokens * heads * 64, 64, heads * 64, 1))
        return form(call_text.write("aten::mul.Tensor", [transposed, tensor(batch, 1, tokens, 64)], {}))

    # A single sequence or head too, whose strides do not matter.
    assert of(2, 8, 128) == of(16, 12, 77) == of(1, 8, 128)
    dense = call_text.write("aten::mul.Tensor", [tensor(2, 8, 128, 64), tensor(2, 1, 128, 64)], {})
    assert form(dense) != of(2, 8, 128)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["aten::sum.dim_IntList", [tensor(64, 32), [0]]], ["aten::sum.dim_IntList", [tensor(64, 32), [1]]]),
        (["aten::mul.Tensor", [tensor(64, 32), tensor(32)]], ["aten::mul.Tensor", [tensor(64, 32), tensor(64, 1)]]),
        (["aten::mm", [tensor(64, 32), tensor(32, 8)]], ["aten::mm", [tensor(64, 32), tensor(32, 8, strides=(1, 32))]]),
        (["aten::silu", [tensor(64)]], ["aten::silu", [tensor(64, dtype="bfloat16")]]),
        (["aten::pow.Tensor_Scalar", [tensor(64), 2]], ["aten::pow.Tensor_Scalar", [tensor(64), 3]]),
        (["aten::silu", [tensor(64, 32)]], ["aten::silu", [tensor(64, 32, strides=(64, 1))]]),
    ],
    ids=["dimension", "broadcasting", "layout", "dtype", "exponent", "gaps"],
)
def test_calls_that_run_other_kernels_have_other_forms(one, two):
    assert form(call_text.write(*one, {})) != form(call_text.write(*two, {}))


def test_a_call_is_affine_in_the_batch():
    def at(batch):
        wide = tensor(batch, 16, 4, strides=(64, 1, 16))
        return call_text.write("aten::cat", [[wide, tensor(batch * 16, 4)], -1], {"dim": 1})

    assert call_text.between(at(2), at(4), 5 - 2, 4 - 2) == at(5)
    assert call_text.between(at(2), at(2), 3, 2) == at(2)
    low, high = (call_text.write("aten::div", [tensor(tokens), 1 / tokens], {}) for tokens in (2, 4))
    assert call_text.between(low, high, 3, 2) == call_text.write("aten::div", [tensor(5), 1 / 2], {})
    assert call_text.between(at(2), call_text.write("aten::cat", [[tensor(2)], -1], {"dim": 1}), 3, 2) == ""


# Calls replayed.


class Reads(TorchDispatchMode):
    """Collects the work of every call."""

    def __init__(self):
        super().__init__()
        self.works = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.works.append(of_call(func, args, kwargs or {}, result))
        return result


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"strategy": "per-layer"}),
        ("gpt2", {"precision": "bf16-mixed"}),
        ("mixtral", {}),
        ("gpt_neox", {"optim": "adamw_torch_fused"}),
    ],
)
def test_every_call_of_a_step_can_be_replayed_and_does_the_same_work(tmp_path, family, changes):
    """Indices within bounds, layouts as they were, results in memory of their own: the same bytes and dimensions."""
    replayer = Replayer(torch.device("cpu"), cold_bytes=2**16, most_bytes=2**26)
    works = list(dict.fromkeys(step_of(tmp_path, family, **changes)))
    assert {work.op for work in works if not work.call} <= {"_record_function_enter_new", "_record_function_exit"}
    for work in works:
        if not work.call:
            continue
        made = replayer.make(work.call, work.cold)
        with torch.no_grad(), Reads() as read:
            made()
        [again] = read.works
        assert 0.7 * work.nbytes <= again.nbytes <= 1.3 * work.nbytes, work
        assert form(again.call) == form(work.call)
        assert (again.kind, again.dtype, again.dims, again.is_causal) == (
            work.kind,
            work.dtype,
            work.dims,
            work.is_causal,
        )


def test_arguments_of_a_call_do_not_share_memory_and_cold_ones_are_reused_late():
    replayer = Replayer(torch.device("cpu"), cold_bytes=4 * 4096, most_bytes=2**20)
    call = call_text.write("aten::addcmul_", [tensor(1024), tensor(1024), tensor(1024)], {})
    made = replayer.make(call, 0b110)
    assert len({value.data_ptr() for value in made.args}) == 3
    assert [memory.data_ptr() for memory in made.hot] == [made.args[0].data_ptr()]
    cold = [replayer.make(call, 0b010).args[1].data_ptr() for _ in range(3)]
    assert len(set(cold)) == 3
    hot = [replayer.make(call_text.write("aten::silu", [tensor(512)], {}), 0).args[0].data_ptr() for _ in range(3)]
    assert len(set(hot)) == 1


def test_memory_for_calls_is_bounded():
    replayer = Replayer(torch.device("cpu"), cold_bytes=2**16, most_bytes=2**16)
    for count in range(100, 4000, 100):
        replayer.make(call_text.write("aten::silu", [tensor(count)], {}), 1)
        assert replayer._held_bytes <= 2**16


def test_memory_of_a_call_is_freed_with_it():
    """The trap: held until garbage collection, which ran a card out of 80 GiB."""
    gc.collect()
    gc.disable()
    try:
        replayer = Replayer(torch.device("cpu"), cold_bytes=0, most_bytes=0)
        made = replayer.make(call_text.write("aten::cat", [[tensor(100), tensor(200)]], {}), 0)
        memory = weakref.ref(made.hot[0])
        replayer.make(call_text.write("aten::silu", [tensor(300)], {}), 0)
        assert memory() is not None
        del made
        assert memory() is None
    finally:
        gc.enable()


def test_an_operator_that_this_torch_lacks_is_not_replayable():
    replayer = Replayer(torch.device("cpu"), cold_bytes=0, most_bytes=2**20)
    with pytest.raises(NotReplayable):
        replayer.make(call_text.write("aten::no_such_operator.Tensor", [tensor(4)], {}), 0)
    with pytest.raises(NotReplayable):
        replayer.make(call_text.write("aten::silu", [tensor(4, dtype="float3")], {}), 0)


def test_works_have_their_caller(tmp_path):
    def callers(strategy):
        return {work.caller for work in step_of(tmp_path, "llama", strategy)}

    assert callers("every:2") == {"model", "checkpoint", "recompute", "backward", "optimizer"}
    assert "policy" in callers("every:2+selective:matmul")


def test_what_was_touched_long_ago_is_cold():
    ages = CacheAges()
    small, large = torch.zeros(1), torch.zeros(CACHED_BYTES // 4 + 8)

    def cold(*args):
        with Reads() as read:
            result = torch.add(*args)
        return ages.aged(read.works[0], args, {}, result).cold

    assert cold(small, small) == 0b11  # never seen before
    assert cold(small, small) == 0
    assert cold(small, large) == 0b10
    assert cold(large, small) == 0  # what a call touches, it has touched last
    assert cold(large, large) == 0
    ages.aged(pointwise(CACHED_BYTES), (), {}, None)
    assert cold(small, large) == 0b11
