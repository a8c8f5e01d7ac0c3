"""What a trace for CUDA allocates, in the order in which an H100 did: its allocator's history is the reference.

The traps: results in the order in which an operator returns them, buffers given back in the order in which they were
taken, a workspace that is there before anything asks for it, and what transformers allocates to look for packed
sequences, which fake tensors do not do by themselves.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT

from gcbench.core.records import Lora
from gcbench.devices.target import TargetOptions, resolve_target
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.simulate.device_model import device_model_for
from gcbench.simulate.predictor import Predictor
from gcbench.strategies import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_BYTES = 1 << 20
"""Below this, transformers' versions differ: the record is of 5.17, which built its rotary tables in another order."""


def recorded(case):
    stored = json.loads((ROOT / "results/reference/plain-loop-nvidia-h100.json").read_text(encoding="utf-8"))
    return stored["cases"][case]


def traced(case):
    """The measured step's allocations in bytes, negative for frees, as predicted for an H100."""
    device = device_model_for(resolve_target(TargetOptions(device="h100"), None))
    mixed = case.get("mixed", False)
    dtype = torch.float32 if mixed else torch.bfloat16
    model = models.build_meta(
        models.build_config(sources.resolve(case["model"]), layers=case.get("layers"), overrides=case.get("set", {})),
        lora=Lora(r=case["lora_r"]) if "lora_r" in case else None,
        dtype=dtype,
        trust_remote_code=False,
    )
    predictor = Predictor(
        model,
        precision="bf16-mixed" if mixed else "bf16",
        optim="adamw_torch",
        trace_mode=device.trace_mode,
        resident=device.resident,
        steps_on_device=False,
    )
    num_layers = len(predictor.fake_model.layers)
    stride, start = case.get("every"), case.get("start", 0)
    chosen = [layer for layer in range(num_layers) if stride and (layer - start) % stride == 0]
    plan = Plan(num_layers=num_layers, groups=tuple((layer,) for layer in chosen))
    line = predictor.step(plan, batch_size=case["batch"], seq_len=case["seq"]).timeline
    events = line.events[line.marks[0][0] :].tolist()
    return [int(line.nbytes[event]) if event >= 0 else -int(line.nbytes[~event]) for event in events]


@pytest.mark.parametrize("case", ["llama-3.2-1b, off", "qwen3-1.7b, LoRA, off", "gemma-3-1b, 12 layers, off"])
def test_a_step_allocates_what_an_h100_did_in_the_same_order(case):
    truth = recorded(case)
    here = [nbytes for nbytes in traced(truth) if abs(nbytes) > SMALL_BYTES]
    there = [nbytes for nbytes in truth["events"] if abs(nbytes) > SMALL_BYTES]
    assert here == there


def test_workspaces_are_requested_by_the_first_matrix_product():
    """Of each pass, once its result is there; cuBLASLt's by the first product with a bias, before torch 2.12."""
    device = device_model_for(resolve_target(TargetOptions(device="h100"), None))
    model = models.build_meta(
        models.build_config(sources.resolve("qwen2.5-0.5b"), layers=2, overrides={}),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    step = Predictor(model, precision="bf16", optim="sgd", trace_mode=device.trace_mode, resident=device.resident).step(
        Plan(num_layers=2, groups=()), batch_size=1, seq_len=64
    )
    line = step.timeline
    blocks = len(line.nbytes)
    asked = [
        number for number in range(blocks) if (step.assembly.block(number).op or "").startswith("cuBLAS workspace")
    ]
    assert len(asked) == 2
    for number in asked:
        (at,) = (line.events == number).nonzero()[0].tolist()
        assert step.assembly.block(int(line.events[at - 1])).op in ("mm.default", "bmm.default", "addmm.default")
