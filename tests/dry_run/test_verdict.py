"""Fitting, not fitting, the script's own failures and the limits of the emulation are told apart."""

from __future__ import annotations

import pytest
from dry_runs import CARD, ended, error, observed, out_of_memory

from gcbench.dry_run.records import Read
from gcbench.dry_run.verdict import judge


def test_it_fits_with_what_the_process_takes_beside_the_allocator():
    found = judge(ended(observed()), CARD, 1)
    assert (found.ending, found.exit_code) == ("fits", 0)
    assert "2.41 GiB of 23.53 GiB" in found.sentence and "21.12 GiB" in found.sentence


def test_memory_that_ran_out_does_not_fit():
    failure = error("OutOfMemoryError", "CUDA out of memory", is_out_of_memory=True)
    seen = observed(out_of_memory=(out_of_memory(),), num_out_of_memory=1, failure=failure)
    found = judge(ended(seen, exit_code=1), CARD, 1)
    assert (found.ending, found.exit_code) == ("does not fit", 1)
    assert "in the backward phase of step 4: 3.00 GiB more" in found.sentence


def test_an_error_that_was_raised_from_out_of_memory_does_not_fit():
    """The trap: accelerate raises a RuntimeError of its own when no batch size is left."""
    chained = error("RuntimeError", "No executable batch size found, reached zero.")
    seen = observed(out_of_memory=(out_of_memory(),), num_out_of_memory=9, failure=chained)
    assert judge(ended(seen, exit_code=1), CARD, 1).ending == "does not fit"


def test_a_caught_error_fits_only_if_training_went_on():
    went_on = observed(out_of_memory=(out_of_memory(done_steps=1),), num_out_of_memory=1)
    found = judge(ended(went_on), CARD, 1)
    assert found.exit_code == 0 and "memory ran out once before, and the script went on" in found.sentence
    gave_up = observed(out_of_memory=(out_of_memory(done_steps=3),), num_out_of_memory=1)
    assert judge(ended(gave_up), CARD, 1).exit_code == 1
    assert judge(ended(gave_up, exit_code=7), CARD, 1).ending == "does not fit"


def test_the_scripts_own_failure_passes_its_exit_code_on():
    found = judge(ended(observed(failure=error("KeyError", "'text'")), exit_code=1), CARD, 1)
    assert (found.ending, found.exit_code) == ("script failed", 1)
    assert "the script itself failed with exit code 1: KeyError at /home/me/train.py:7" in found.sentence
    assert judge(ended(observed(), exit_code=42), CARD, 1).exit_code == 42
    assert judge(ended(exit_code=5), CARD, 1).exit_code == 5


def test_a_failure_after_reading_values_says_that_they_may_be_the_cause():
    read = Read(file="/home/me/t.py", line=1, kind="tolist", answer="zeros", count=1, library=None, condition=None)
    seen = observed(failure=error("RuntimeError", "sum of probabilities <= 0"), reads=(read,))
    found = judge(ended(seen, exit_code=1), CARD, 1)
    assert found.ending == "script failed" and "it had read values from the card" in found.sentence


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (error("AcceleratorError", "CUDA error: invalid device ordinal"), "add --num-devices 2"),
        (error("RuntimeError", "operation failed", files=("/x/torch/cuda/graphs.py",)), "torch.cuda.graph"),
        (error("DistBackendError", "NCCL error in: x.cpp"), "--nproc-per-node 1"),
        (error("ImportError", "flash_attn_2_cuda.so: undefined symbol: _Z"), 'attn_implementation="sdpa"'),
        (error("RuntimeError", "whatever", libraries=("bitsandbytes",)), "optim=adamw_torch"),
        (error("RuntimeError", "CUDA error: operation not supported"), "cannot serve a call at /home/me/train.py:7"),
    ],
)
def test_a_limit_of_the_emulation_is_named_with_what_to_leave_out(failure, words):
    found = judge(ended(observed(failure=failure), exit_code=1), CARD, 1)
    assert (found.ending, found.exit_code) == ("not emulated", 3)
    assert words in found.sentence


def test_an_error_within_pytorch_is_not_blamed_on_an_extension_that_called_it():
    failure = error("RuntimeError", "shapes cannot be multiplied", libraries=("torch", "bitsandbytes"))
    assert judge(ended(observed(failure=failure), exit_code=1), CARD, 1).ending == "script failed"


def test_a_crash_names_the_extension_in_whose_code_it_was():
    stacks = 'Fatal Python error: Segmentation fault\n  File "/v/site-packages/mamba_ssm/ops.py", line 3 in f\n'
    found = judge(ended(observed(), exit_code=-11, stacks=stacks), CARD, 1)
    assert found.ending == "not emulated" and "mamba_ssm" in found.sentence and "SIGSEGV" in found.sentence
    killed = judge(ended(observed(), exit_code=-9), CARD, 1)
    assert (killed.ending, killed.exit_code) == ("script failed", 137)


def test_what_was_not_seen_is_not_judged():
    assert "imported torch" in judge(ended(), CARD, 1).sentence
    unused = judge(ended(observed(by_card={})), CARD, 1)
    assert unused.exit_code == 3 and "never used the card, and took 3 steps on the CPU" in unused.sentence


def test_an_interruption_is_told_with_what_was_seen():
    found = judge(ended(observed(), exit_code=-2, was_interrupted=True), CARD, 1)
    assert (found.exit_code, found.sentence) == (130, "interrupted; 3 steps finished before that")
