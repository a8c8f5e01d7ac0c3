"""Segments: what they save, and that no tensor is left afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from segmented import BATCH_SIZE, SEQ_LEN, WIDTH, apply, build, gradients, inputs_of
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("one_thread", "no_hook_reaches_the_next_test")


class Live(TorchDispatchMode):
    """The live storages that operators have allocated, without those of the model and its inputs."""

    def __init__(self, model, inputs):
        super().__init__()
        self.alive = {}
        old = [*model.parameters(), *model.buffers(), *inputs.values()]
        self.old = {tensor.untyped_storage()._cdata for tensor in old if isinstance(tensor, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.note(value.untyped_storage())
        return out

    def note(self, storage):
        key = storage._cdata
        if key not in self.old and key not in self.alive:
            self.alive[key] = (weakref.ref(storage, lambda reference: self.alive.pop(key)), storage.nbytes())

    @property
    def nbytes(self):
        return sum(nbytes for _, nbytes in self.alive.values())


@pytest.fixture
def no_collector():
    """Tensors in reference cycles stay until the collector runs, which in a real run may be after the peak."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def kept_bytes(family, spec, *, layers):
    """The live storages at the end of the forward pass."""
    model = build(family, layers=layers)
    inputs = inputs_of(model)
    apply(model, spec)
    with Live(model, inputs) as live:
        loss = model(**inputs).loss
    assert loss.requires_grad
    return live.nbytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom", "gemma2"])
def test_a_segment_saves_one_layer_input_for_all_its_layers(no_collector, family):
    """To the byte: 7 layers, so 7 inputs one by one, 4 in twos, 3 in threes and 1 as a whole."""
    boundary = BATCH_SIZE * SEQ_LEN * WIDTH * 4
    kept = {spec: kept_bytes(family, spec, layers=7) for spec in ("off", "per-layer", "segment:2", "segment:3")}
    kept["segment:7"] = kept_bytes(family, "segment:7", layers=7)
    assert kept["off"] > kept["per-layer"]
    assert kept["per-layer"] - kept["segment:2"] == 3 * boundary
    assert kept["per-layer"] - kept["segment:3"] == 4 * boundary
    assert kept["per-layer"] - kept["segment:7"] == 6 * boundary


def test_a_segment_saves_what_its_policy_names(no_collector):
    """One product of (2 x 8 tokens, 64) in each layer of three, whether or not they are one segment."""
    product = BATCH_SIZE * SEQ_LEN * 64 * 4
    kept = {spec: kept_bytes("llama", spec, layers=3) for spec in ("segment:3", "per-layer")}
    assert kept_bytes("llama", "segment:3+selective:mm#4/mm#11/mm#18", layers=3) - kept["segment:3"] == 3 * product
    assert kept_bytes("llama", "segment:3+selective:mm#4", layers=3) - kept["segment:3"] == product
    assert kept_bytes("llama", "selective:mm#4", layers=3) - kept["per-layer"] == 3 * product


@pytest.mark.parametrize("spec", ["segment:2", "segment:3", "segment:3+selective:matmul"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_no_tensor_is_left_after_a_step(no_collector, family, spec):
    """The trap: calls noted for the recomputation, with their masks and hidden states, alive until the next step or, in
    a cycle, until the collector comes."""
    model = build(family)
    apply(model, spec)
    inputs = inputs_of(model)
    model(**inputs).loss.backward()  # what a model makes once and keeps
    model.zero_grad()
    with Live(model, inputs) as live:
        loss = model(**inputs).loss
        assert live.nbytes > 0
        loss.backward()
        del loss
        assert live.nbytes == sum(param.grad.nbytes for param in model.parameters())
        model.zero_grad()
    assert live.nbytes == 0


@pytest.mark.parametrize("spec", ["per-layer", "segment:2", "segment:4+selective:matmul"])
def test_no_tensor_is_left_after_a_discarded_forward_pass(no_collector, spec):
    model = build("gpt2")
    apply(model, spec)
    inputs = inputs_of(model)
    model(**inputs)
    with Live(model, inputs) as live:
        loss = model(**inputs).loss
        del loss
    assert live.nbytes == 0


@pytest.mark.parametrize("spec", ["segment:2", "segment:3", "segment:2+selective:matmul"])
def test_a_deleted_model_is_freed(no_collector, spec):
    """The trap: a segment refers to its layers' bound methods, and its layers to the segment."""
    model = build("llama")
    apply(model, spec)
    gradients(model, inputs_of(model))
    gc.enable()  # a module and its functions may be a cycle; what is global is none
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
