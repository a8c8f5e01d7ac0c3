"""`gcbench.apply` on a model that two processes train, with gloo on CPUs: the gradients are those without it.

The processes go through all cases once and write down what they saw; the tests read it.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from processes import PROCESS_TIMEOUT_S

RANKS = 2
ALL = (0, 1, 2, 3)
RECOMPUTED = {
    "per-layer": ALL,
    "every:2+selective:attention": (0, 2),
    "selective:matmul": ALL,
    "reentrant": ALL,
    "segment:2": ALL,
    "segment:4+selective:matmul": ALL,
}
WRAPPED = {
    # gpt2 has dropout, whose masks a recomputation has to draw again.
    ("gpt2", "ddp"): tuple(RECOMPUTED),
    ("gpt2", "fsdp2"): ("per-layer", "every:2+selective:attention", "selective:matmul", "reentrant"),
    ("llama", "fsdp2-mixed"): ("selective:matmul",),
    ("llama", "fsdp2-whole"): ("segment:4+selective:matmul",),
    ("llama", "fsdp2-pairs"): ("segment:2",),
    ("llama", "fsdp2-peft"): ("per-layer", "reentrant"),
    ("llama", "fsdp1"): ("per-layer",),
    ("llama", "fsdp1-whole"): ("segment:2",),
}
"""Family and wrapping -> strategies that work there."""

REFUSED = {
    ("llama", "fsdp2"): ("segment:2", "segment:4+selective:matmul"),
    ("llama", "fsdp2-pairs"): ("segment:4+selective:matmul",),
    ("llama", "fsdp1"): ("segment:2",),
}
"""Strategies with groups whose layers FSDP gathers separately."""


def cases(table):
    return [(*key, spec, when) for key, specs in table.items() for spec in specs for when in ("before", "after")]


def key(*case):
    return " ".join(case)


# What the processes do


def build(family, wrapping):
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = {**tiny.CONFIGS[family], "use_cache": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[values.pop("model_type")](**values)).train()
    return adapted(model) if wrapping.endswith("peft") else model


def adapted(model):
    """With adapters as they are after some steps: in the first, gradients of half of them are zero."""
    import peft
    import torch

    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    return model


def wrapped(model, wrapping):
    import torch
    from torch.distributed import fsdp

    from gcbench.checkpointing.apply import checkpointable_layers

    layers = checkpointable_layers(model)
    kind, _, how = wrapping.partition("-")
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp1":
        policy = None if how == "whole" else fsdp.wrap.ModuleWrapPolicy({type(layers[0])})
        return fsdp.FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    settings = {}
    if how == "mixed":
        settings["mp_policy"] = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "pairs":
        layers = [layers[:2], layers[2:]]
    for layer in [] if how == "whole" else layers:
        fsdp.fully_shard(layer, **settings)
    return fsdp.fully_shard(model, **settings)


@contextmanager
def counted(model):
    """How often a part of each layer runs, by (phase, number)."""
    from gcbench.checkpointing.apply import checkpointable_layers

    calls = SimpleNamespace(phase="forward", runs=Counter())
    hooks = []
    for number, layer in enumerate(checkpointable_layers(model)):

        def note(*call, number=number):
            calls.runs[calls.phase, number] += 1

        hooks.append(list(layer.children())[-1].register_forward_pre_hook(note))
    yield calls
    for hook in hooks:
        hook.remove()


def trained(outer, model, rank, *, steps):
    """The gradients of each step, and the recomputed layers; each must be recomputed once a step."""
    import torch

    ids = torch.randint(2, 200, (2, 8), generator=torch.Generator().manual_seed(rank))
    gradients, again = [], set()
    for seed in range(steps):
        outer.zero_grad()
        torch.manual_seed(seed)
        with counted(model) as calls:
            loss = outer(input_ids=ids, labels=ids).loss
            calls.phase = "backward"
            loss.backward()
        assert set(calls.runs.values()) == {1}, calls.runs
        again |= {number for phase, number in calls.runs if phase == "backward"}
        for param in outer.parameters():
            grad = param.grad
            if grad is not None:
                grad = grad.to_local() if hasattr(grad, "to_local") else grad
                gradients.append(grad.detach().clone())
    assert gradients and any(grad.count_nonzero() for grad in gradients)
    return gradients, sorted(again)


def one_case(family, wrapping, spec, when, rank, off):
    import torch

    import gcbench

    model, applied = build(family, wrapping), None
    try:
        if when == "before":
            applied = gcbench.apply(model, spec)
            outer = wrapped(model, wrapping)
        else:
            outer = wrapped(model, wrapping)
            applied = gcbench.apply(outer, spec)
        gradients, again = trained(outer, model, rank, steps=2)
    except Exception as err:
        watching = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return {"error": f"{type(err).__name__}: {err}", "applied": applied is not None, "watching": watching}
    seen = {"same": same(gradients, off), "again": again, "counted": sorted(applied.recomputed)}
    gcbench.remove(outer)
    gradients, again = trained(outer, model, rank, steps=1)
    return seen | {"same_after": same(gradients, off[: len(gradients)]), "again_after": again}


def same(ours, theirs):
    import torch

    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def order_when_sharded():
    """The layers that `first:2` finds in a model with a vision tower in front, sharded."""
    from test_api_layers import text_only

    import gcbench

    model = wrapped(text_only("gemma3").train(), "fsdp2")
    return [list(group) for group in gcbench.apply(model, "first:2").plan.groups]


def work(rank, folder, answer):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=PROCESS_TIMEOUT_S / 2),
    )
    seen, off = {"order": order_when_sharded()}, {}
    for family, wrapping, spec, when in cases(WRAPPED) + cases(REFUSED):
        if (family, wrapping) not in off:
            model = build(family, wrapping)
            off[family, wrapping], again = trained(wrapped(model, wrapping), model, rank, steps=2)
            assert again == []
        case = (family, wrapping, spec, when)
        seen[key(*case)] = one_case(*case, rank, off[family, wrapping])
    dist.barrier()
    dist.destroy_process_group()
    Path(answer).write_text(json.dumps(seen), encoding="utf-8")


@pytest.fixture(scope="module")
def seen(warm_server, tmp_path_factory):
    """Case -> what each process observed."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    answers = [folder / f"{rank}.json" for rank in range(RANKS)]
    ranks = [context.Process(target=work, args=(rank, folder, answers[rank])) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PROCESS_TIMEOUT_S)
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    assert [process.exitcode for process in ranks] == [0] * RANKS
    return [json.loads(answer.read_text(encoding="utf-8")) for answer in answers]


# What they must have seen


@pytest.mark.parametrize(("family", "wrapping", "spec", "when"), cases(WRAPPED))
def test_gradients_are_unchanged_and_layers_are_recomputed(seen, family, wrapping, spec, when):
    again = list(RECOMPUTED[spec])
    expected = {"same": True, "again": again, "counted": again, "same_after": True, "again_after": []}
    for rank in seen:
        assert rank[key(family, wrapping, spec, when)] == expected


@pytest.mark.parametrize(("family", "wrapping", "spec", "when"), cases(REFUSED))
def test_layers_gathered_apart_are_not_recomputed_as_one(seen, family, wrapping, spec, when):
    """The trap: FSDP fetches the weights of the layer before while it computes, so that a group of two finds them there
    or not, as time will have it."""
    for rank in seen:
        case = rank[key(family, wrapping, spec, when)]
        assert case["error"].startswith("ValueError: layers [0, 1")
        assert "take groups of one layer, such as per-layer" in case["error"]
        assert case["applied"] == (when == "before")
        assert not case["watching"]


def test_the_order_of_layers_is_found_on_a_sharded_model(seen):
    assert [rank["order"] for rank in seen] == [[[3], [4]]] * RANKS
