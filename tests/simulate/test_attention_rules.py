"""Attention runs the kernel that PyTorch's rules choose, on every kind of card in the catalogue."""

from __future__ import annotations

import pytest

from gcbench.devices import cards
from gcbench.devices.target import Target
from gcbench.simulate.cuda.attention_rules import AttentionCall, Choice, Gpu, Mask, choose, gpu_of

BATCH, HEADS, SEQ, DIM = 2, 8, 128, 64
MASK = Mask(shape=(1, 1, SEQ, SEQ))


def target(card=None):
    return Target(kind="cuda", name=card or "24GiB", card=cards.find(card) if card else None)


def call(dim=DIM, *, kv_heads=HEADS, value_dim=None, keys=SEQ, dtype="bfloat16", **rest):
    return AttentionCall(
        dtype=dtype,
        query=(BATCH, HEADS, SEQ, dim),
        key=(BATCH, kv_heads, keys, dim),
        value=(BATCH, kv_heads, keys, value_dim or dim),
        **rest,
    )


RULES = [
    ("a100-80gb", call(), "flash"),
    ("a100-80gb", call(dtype="float16"), "flash"),
    ("a100-80gb", call(dtype="float32"), "efficient"),
    ("a100-80gb", call(dtype="float64"), "math"),
    ("a100-80gb", call(dropout_p=0.1), "flash"),
    ("a100-80gb", call(mask=MASK), "efficient"),
    ("a100-80gb", call(kv_heads=2, enable_gqa=True), "flash"),
    ("a100-80gb", call(kv_heads=2), "math"),
    ("a100-80gb", call(kv_heads=3, enable_gqa=True), "math"),
    ("a100-80gb", call(kv_heads=2, enable_gqa=True, dtype="float32"), "math"),
    ("a100-80gb", call(kv_heads=2, enable_gqa=True, mask=MASK), "math"),
    ("a100-80gb", call(enable_gqa=True, mask=MASK), "efficient"),
    ("a100-80gb", call(100), "flash"),
    ("a100-80gb", call(100, mask=MASK), "math"),
    ("a100-80gb", call(100, dtype="float32"), "efficient"),
    ("a100-80gb", call(102, dtype="float32"), "math"),
    ("a100-80gb", call(256), "flash"),
    ("a100-80gb", call(264), "efficient"),
    ("a100-80gb", call(192, value_dim=128), "efficient"),
    ("a100-80gb", call(keys=2 * SEQ, is_causal=True), "efficient"),
    ("a100-80gb", call(keys=2 * SEQ), "flash"),
    ("a100-80gb", call(keys=0), "math"),
    ("a100-80gb", call(last_dims_are_dense=False), "math"),
    ("a100-80gb", call(1, last_dims_are_dense=False), "flash"),
    ("a100-80gb", call(mask=Mask(shape=(1, 1, SEQ, SEQ), last_dim_is_dense=False)), "math"),
    ("a100-80gb", call(offsets_bytes=(8, 0, 0)), "flash"),
    ("a100-80gb", call(offsets_bytes=(8, 0, 0), dtype="float32"), "math"),
    ("a100-80gb", call(offsets_bytes=(0, 0, 16), dtype="float32"), "efficient"),
    ("h100", call(), "cudnn"),
    ("h200", call(), "cudnn"),
    ("h100", call(dtype="float32"), "efficient"),
    ("h100", call(dropout_p=0.1), "flash"),
    ("h100", call(dropout_p=0.125), "cudnn"),
    ("h100", call(kv_heads=2, enable_gqa=True, mask=MASK), "cudnn"),
    ("h100", call(mask=Mask(shape=(SEQ, SEQ))), "cudnn"),
    ("h100", call(mask=Mask(shape=(BATCH, HEADS, 1, SEQ))), "cudnn"),
    ("h100", call(mask=Mask(shape=(BATCH, SEQ, SEQ))), "efficient"),
    ("h100", call(mask=Mask(shape=(1, 1, SEQ, SEQ), requires_grad=True)), "efficient"),
    ("h100", call(keys=2 * SEQ, is_causal=True), "cudnn"),
    ("h100", call(keys=1), "flash"),
    ("h100", call(100), "flash"),
    ("h100", call(256), "cudnn"),
    ("b200", call(), "cudnn"),
    ("b200", call(256), "flash"),
    ("b200", call(192, value_dim=128), "cudnn"),
    ("b200", call(192), "flash"),
    ("rtx-4090", call(), "flash"),
    ("rtx-4090", call(192), "flash"),
    ("rtx-4090", call(224), "efficient"),
    ("rtx-4090", call(224, needs_grad=False), "flash"),
    ("rtx-4090", call(256), "flash"),
    ("rtx-4090", call(256, dropout_p=0.1), "efficient"),
    ("rtx-5090", call(), "flash"),
    ("rtx-5090", call(256, dropout_p=0.1), "efficient"),
    ("t4", call(), "math"),
    ("t4", call(dtype="float16"), "efficient"),
    ("t4", call(100, dtype="float16"), "math"),
    ("t4", call(33, dtype="float32"), "efficient"),
    ("v100-16gb", call(), "math"),
    ("v100-16gb", call(dtype="float16", dropout_p=0.1), "efficient"),
    ("mi300x", call(), "flash"),
    ("mi300x", call(512), "flash"),
    ("mi300x", call(dtype="float32"), "efficient"),
    ("mi300x", call(192, value_dim=128), "math"),
    (None, call(), "flash"),
]


@pytest.mark.parametrize(("card", "made", "kernel"), RULES)
def test_the_kernel_is_the_one_that_pytorch_chooses(card, made, kernel):
    """Worked out by hand from sdp_utils.cpp. The traps: grouped heads in fp32, or with a mask, are math on an A100;
    Hopper and Blackwell take cuDNN first, but not with gpt2's dropout of 0.1.
    """
    assert choose(made, gpu_of(target(card))).kernel == kernel


def test_an_older_cudnn_leaves_hopper_to_flash():
    """Wheels for CUDA 12 bring 9.10; 9.15.0 itself has the fault for which cuDNN was deferred."""
    for version, kernel in ((91002, "flash"), (91500, "flash"), (91501, "cudnn")):
        assert choose(call(), Gpu(capability=(9, 0), cudnn_version=version)).kernel == kernel


def test_rejected_kernels_have_a_reason():
    choice = choose(call(100, dropout_p=0.1, mask=MASK), gpu_of(target("h100")))
    assert choice == Choice(
        kernel="math",
        passed_over={
            "cudnn": "dropout 0.1 is no multiple of 1/16",
            "flash": "an explicit mask",
            "efficient": "head dimension 100 is no multiple of 8",
        },
    )
    assert choose(call(), gpu_of(target("a100-80gb"))).passed_over == {}
    assert choose(call(), gpu_of(target("t4"))).passed_over["flash"] == "not built for sm75"
