"""PyTorch's own CUDA code on an emulated card. Needs a CUDA build of torch in this environment, and no card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gcbench.core.errors import UnavailableError
from gcbench.devices import cards
from gcbench.emulate.environment import environment

GIB = 1 << 30


def emulated(code: str, *, card: str = "rtx-4090", num_cards: int = 1, ledger: Path | None = None, **env: str) -> Any:
    """Run code that prints one JSON document, in a process that sees the card."""
    try:
        added = environment(cards.find(card), num_cards=num_cards, ledger=ledger)
    except UnavailableError as err:
        pytest.skip(str(err))
    done = subprocess.run(
        [sys.executable, "-c", "import json, torch\n" + code],
        env=os.environ | added | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_allocator_counts_a_step_and_out_of_memory_is_its_own_error() -> None:
    code = """
weight = torch.zeros(1024, 1024, device="cuda", requires_grad=True)
(torch.zeros(512, 1024, device="cuda") @ weight).sum().backward()
free, total = torch.cuda.mem_get_info()
try:
    torch.empty(total, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as err:
    print(json.dumps([torch.cuda.get_device_name(), weight.grad.shape, torch.cuda.memory_allocated() >= 8 << 20,
                      torch.cuda.max_memory_reserved() + free < total, str(err)[:42]]))
"""
    name, shape, has_both, is_within, message = emulated(code)
    assert (name, shape) == ("NVIDIA GeForce RTX 4090", [1024, 1024])
    assert has_both and is_within
    assert message == "CUDA out of memory. Tried to allocate 23.5"


def test_expandable_segments_run_out_at_the_card_s_memory() -> None:
    code = """
held = []
try:
    while True:
        held.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    print(json.dumps([len(held), torch.cuda.memory_reserved()]))
"""
    count, reserved = emulated(code, PYTORCH_ALLOC_CONF="expandable_segments:True")
    assert count == 23
    assert reserved == -(-23 * GIB // (20 << 20)) * (20 << 20)  # memory is mapped 20 MiB at a time


def test_several_cards_have_each_its_memory_and_a_card_too_many_does_not_exist() -> None:
    code = """
kept = [torch.zeros(1 << 20, device=f"cuda:{i}") for i in range(2)]
moved = kept[0].to("cuda:1")
try:
    torch.zeros(1, device="cuda:2")
except RuntimeError as err:
    used = [torch.cuda.memory_allocated(i) for i in range(2)]
    print(json.dumps([torch.cuda.device_count(), *used, str(err)]))
"""
    count, first, second, message = emulated(code, num_cards=2)
    assert (count, first, second) == (2, 4 << 20, 8 << 20)
    assert "invalid device ordinal" in message


def test_questions_to_tensors_have_the_answers_of_a_healthy_run() -> None:
    code = """
x = torch.ones(4, device="cuda")
print(json.dumps([bool((x > 0).all()), bool(torch.isnan(x).any()), x.sum().item(), bool(torch.equal(x, x))]))
"""
    assert emulated(code) == [True, False, 0.0, True]


def test_nvidia_smi_and_nvml_report_what_the_process_holds(tmp_path: Path) -> None:
    code = """
import subprocess
x = torch.zeros(GIB, dtype=torch.uint8, device="cuda")
query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
told = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
free, total = torch.cuda.mem_get_info()
print(json.dumps([told, (total - free) / 2**20]))
""".replace("GIB", str(GIB))
    told, used = emulated(code, ledger=tmp_path / "ledger")
    assert told > 1024
    assert abs(told - used) <= 1


def test_what_cannot_be_emulated_is_an_error_that_says_so() -> None:
    code = """
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        torch.zeros(3, device="cuda")
except RuntimeError as err:
    from gcbench.emulate import activity
    print(json.dumps([str(err), activity.refused(), activity.num_launches() >= 0]))
"""
    message, refused, _ = emulated(code)
    assert "not supported on an emulated card" in message
    assert "cudaStreamBeginCapture" in refused


def test_nothing_of_an_emulation_stays_in_this_process() -> None:
    before = dict(os.environ)
    emulated("print(1)")
    assert dict(os.environ) == before
