"""What building a model allocates, and where that leaves its tensors."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from gcbench.core.records import PHASES, Lora
from gcbench.core.units import MIB
from gcbench.devices import target as targets
from gcbench.devices.target import TargetOptions
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.predict.task import PredictTask
from gcbench.predict.worker import Session
from gcbench.simulate import timeline
from gcbench.simulate.allocator.caching_allocator import CachingAllocator, OutOfMemory
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.building import Building, BuildRecorder
from gcbench.simulate.trace.model_blocks import blocks

SIDE = 32


class Masked(torch.nn.Module):
    """A mask between two layers, made of one that is needed for a moment."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(SIDE, SIDE, bias=False)
        self.register_buffer("mask", torch.ones(SIDE, SIDE, dtype=torch.bool).tril())
        self.last = torch.nn.Linear(SIDE, 2 * SIDE, bias=False)


def recorded(make):
    with BuildRecorder() as recorder, torch.device("meta"):
        model = make()
    return model, recorder.building_of(model)


def test_buffers_lie_between_the_parameters_around_them():
    """By hand: the first weight, the ones, the mask, the ones freed, the last weight."""
    model, building = recorded(Masked)
    assert [name for name, _, _ in blocks(model)] == ["first.weight", "last.weight", "mask"]
    first, ones, mask, last = range(4)
    assert building.events == (first, ones, mask, ~ones, last)
    assert building.nbytes == (SIDE * SIDE * 4, SIDE * SIDE, SIDE * SIDE, 2 * SIDE * SIDE * 4)
    assert building.model == (first, last, mask)


def test_a_tensor_that_no_operator_returned_comes_last():
    known = torch.empty(100, device="meta")

    def make():
        model = torch.nn.Module()
        model.register_buffer("known", known)
        model.layer = torch.nn.Linear(2, 2, bias=False)
        return model

    _, building = recorded(make)
    assert building.nbytes[-1] == 400
    assert building.model == (0, len(building.nbytes) - 1)


def moved(model):
    """The sizes of the tensors that `Module.to` moves, in its order; a tied one, which `meta` would part, once."""
    sizes = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                storage = args[0].untyped_storage()
                sizes.setdefault(storage.data_ptr(), storage.nbytes())
            return func(*args, **(kwargs or {}))

    with Watch():
        model.to("meta")
    return list(sizes.values())


@pytest.mark.parametrize("family", [None, "llama", "gpt2"])  # without and with a tied head
def test_a_checkpoint_is_moved_in_the_order_of_torch(family):
    make = Masked if family is None else partial(AutoModelForCausalLM.from_config, tiny_config(family))
    recorder = BuildRecorder()
    with torch.device("meta"):
        meta = make()
    recorder.move(meta)
    building = recorder.building_of(meta)
    assert building.events == tuple(range(len(building.nbytes)))
    assert list(building.nbytes) == moved(make())
    assert len(set(building.nbytes)) > 1


def test_what_is_needed_for_a_moment_leaves_room_for_the_training():
    """By hand: 6 MiB for a moment beside 3 MiB of parameters, both of one segment of 20 MiB; 12 MiB for a moment had
    one of their own, which stays with the cache unless that is emptied."""
    building = Building(nbytes=(3 * MIB, 6 * MIB, 12 * MIB), events=(1, 0, 2, ~2, ~1), model=(0,))
    allocator = CachingAllocator()
    (block,) = building.replay(allocator)
    assert block is not None and block.address == CachingAllocator().malloc(6 * MIB) + 6 * MIB
    assert allocator.reserved_bytes == 32 * MIB
    building.replay_and_settle(settled := CachingAllocator())
    assert settled.reserved_bytes == 20 * MIB
    assert allocator.allocated_bytes == settled.allocated_bytes == 3 * MIB


def test_a_step_goes_on_from_where_the_building_ended():
    """By hand: 11 MiB are taken from the 12 that the building left, where a step alone would ask for 12 more."""
    step = Timeline(
        nbytes=np.array([3 * MIB, 11 * MIB]),
        events=np.array([0, 1, ~1]),
        marks=tuple(zip((1, 2, 3), PHASES, strict=True)),
    )
    building = Building(nbytes=(3 * MIB, 12 * MIB), events=(1, 0, ~1), model=(0,))
    assert building.begins([3 * MIB]) and not building.begins([MIB])
    peak = timeline.cached(step, model_blocks=building.replay).memory
    assert peak.allocated_bytes == timeline.cached(step).memory.allocated_bytes + MIB  # the block is not split
    with pytest.raises(OutOfMemory):
        timeline.cached(step, limit_bytes=14 * MIB, model_blocks=building.replay)


def tiny_config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**tiny.LLAMA_LIKE, **changes})


def built(config, *, initialises, lora=None):
    with BuildRecorder() as recorder:
        if initialises:
            with models.initialising_on_meta():
                model = models.build_meta(config, lora=lora, dtype=torch.bfloat16)
        else:
            model = models.build_meta(config, lora=lora, dtype=torch.bfloat16)
    return model, recorder.building_of(model)


def test_weights_are_initialised_for_what_that_allocates():
    """GPT-Neo makes its masks anew: per layer two temporary ones of ones and their lower triangle."""
    config = AutoConfig.for_model(
        "gpt_neo",
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    )
    mask = 64 * 64
    counts = []
    for initialises in (False, True):
        model, building = built(config, initialises=initialises)
        counts.append(sum(nbytes == mask for nbytes in building.nbytes))
        assert sum(nbytes for _, nbytes, _ in blocks(model)) == sum(building.nbytes[n] for n in building.model)
    assert counts[1] >= counts[0] + 4


def test_initialisation_that_asks_for_values_is_left_out(monkeypatch):
    from transformers import LlamaForCausalLM

    def reads(model, module):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", reads)
    model, _ = built(tiny_config("llama"), initialises=True)
    assert len(blocks(model)) > 10


def test_adapters_are_made_in_the_models_precision_and_then_cast():
    """peft moves them to the model's device in its dtype, and casts each to fp32 once all are there."""
    model, building = built(tiny_config("llama"), initialises=True, lora=Lora(r=8, target_modules=("q_proj",)))
    adapters = [nbytes for name, nbytes, _ in blocks(model) if "lora_" in name]
    assert adapters == [8 * 32 * 4] * 8
    halves = [n for n, nbytes in enumerate(building.nbytes) if nbytes == 8 * 32 * 2 and ~n in building.events]
    assert len(halves) == 8
    last_half = max(building.events.index(n) for n in halves)
    assert all(building.events.index(~n) > last_half for n in halves)


@pytest.mark.parametrize("lora", [None, Lora(r=8, target_modules=("c_attn",))])
def test_pretrained_weights_leave_no_gaps_and_adapters_follow_them(model, lora):
    """The head that is made before it is tied is the largest gap of a model that is built on the card."""
    made, loaded = (session(model("gpt2"), lora, pretrained).building for pretrained in (False, True))
    sizes = [made.nbytes[n] for n in made.model]
    assert sorted(sizes) == sorted(loaded.nbytes[n] for n in loaded.model)
    head = max(sizes)
    assert head in {made.nbytes[~event] for event in made.events if event < 0}
    freed = [loaded.nbytes[~event] for event in loaded.events if event < 0]
    assert bool(freed) == (lora is not None) and head not in freed
    base = len([n for n in loaded.events if n >= 0 and n in loaded.model])
    assert loaded.events[: base - 4 * 2 * bool(lora)] == tuple(range(base - 4 * 2 * bool(lora)))


def session(name, lora, pretrained):
    """A session that predicts a model for a card."""
    return Session(
        PredictTask(
            source=sources.resolve(str(name)),
            layers=None,
            overrides={},
            attn_implementation=None,
            lora=lora,
            precision="bf16",
            optim="adamw_torch",
            target=targets.resolve_target(TargetOptions(device="t4"), None),
            cells=(),
            explain=False,
            exact=False,
            pretrained=pretrained,
        )
    )
