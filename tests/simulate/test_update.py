"""The optimizer phase traced for a few parameters and unrolled to all is that traced for all."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from gcbench.simulate.cuda import optimizer
from gcbench.simulate.trace import optimizer_step
from gcbench.simulate.trace.fake_model import CPU_TRACE, TraceMode
from gcbench.simulate.trace.optimizer_step import trace_update

FOREACH = TraceMode(patches=optimizer.foreach_on_cpu, notes_random_state=False)
TRACE_MODES = {"cpu": CPU_TRACE, "foreach": FOREACH}
CASES = [
    ("cpu", "adamw_torch"),
    ("cpu", "adamw_torch_fused"),
    ("cpu", "sgd"),
    ("cpu", "adafactor"),
    ("foreach", "adamw_torch"),
]
"""All that differ: the other optimizers take the same dispatch path on CUDA."""

MATRIX, VECTOR, SCALAR = (24, 16), (24,), (1,)
FP32, BF16 = torch.float32, torch.bfloat16


def parameters(*looks):
    return [torch.empty(*shape, dtype=dtype, device="meta") for shape, dtype in looks]


W, B, HALF_W, HALF_B, S = (MATRIX, FP32), (VECTOR, FP32), (MATRIX, BF16), (VECTOR, BF16), (SCALAR, FP32)

LISTS = {
    "one": [W],
    "one half": [HALF_B],
    "two alike": [W, W],
    "two kinds": [W, B],
    "two dtypes": [W, HALF_W],
    "two dtypes, the other way round": [HALF_W, W],
    "three alike": [W, W, W],
    "odd first": [B, W, W],
    "odd in the middle": [W, B, W],
    "odd last": [W, W, HALF_B],
    "twenty alike": [W] * 20,
    "twenty in turn": [W, B] * 10,
    "twenty as layers with a head": [W, *[W, B, HALF_W, HALF_B] * 4, W, B, S],
    "twenty in two runs": [W] * 10 + [HALF_B] * 10,
    "twenty with one in between": [HALF_W] * 9 + [S] + [HALF_W] * 10,
}


def sizes(traced):
    """Bytes allocated after each event of the two phases."""
    signed = [
        [traced.blocks[event].nbytes if event >= 0 else -traced.blocks[~event].nbytes for event in events]
        for events in (traced.first, traced.later)
    ]
    return [list(accumulate(phase)) for phase in signed]


def assert_unrolled_is_all(params, mode, optim, **kwargs):
    unrolled = trace_update(params, precision="fp32", optim=optim, trace_mode=TRACE_MODES[mode], **kwargs)
    in_full = trace_update(
        params, precision="fp32", optim=optim, trace_mode=TRACE_MODES[mode], every_one=True, **kwargs
    )
    assert unrolled.num_params == in_full.num_params == len(params)
    assert sizes(unrolled) == sizes(in_full)
    # Gradients come first, in the order of the parameters: the rest of the step frees them by that number.
    assert [b.nbytes for b in unrolled.blocks[: len(params)]] == [b.nbytes for b in in_full.blocks[: len(params)]]
    gradients_freed = [[~e for e in events if e < 0 and ~e < len(params)] for events in (unrolled.first, in_full.first)]
    assert gradients_freed[0] == gradients_freed[1]
    assert sorted(gradients_freed[0]) == list(range(len(params)))
    assert sum(unrolled.blocks[n].nbytes for n in unrolled.states) == sum(
        in_full.blocks[n].nbytes for n in in_full.states
    )
    assert not unrolled.is_loop or how_often(unrolled) == how_often(in_full)
    assert traffic(unrolled) == pytest.approx(traffic(in_full), rel=0.01)
    return unrolled


def how_often(traced):
    """Each call for one parameter, with how often it is made, whatever the numbers in it."""
    counts = Counter()
    for work, times in zip(traced.works, traced.times, strict=True):
        if "[[{" not in work.call:  # a list of all
            counts[replace(work, call="")] += times
    return counts


def traffic(traced):
    """Bytes."""
    return sum(times * work.nbytes for work, times in zip(traced.works, traced.times, strict=True))


@pytest.mark.parametrize("looks", LISTS)
@pytest.mark.parametrize(("mode", "optim"), CASES)
def test_the_unrolled_trace_equals_the_trace_of_all(mode, optim, looks):
    """The traps: a loop's variables hold what was assigned for one parameter until the next one's; a foreach operator
    allocates for all before it frees for any; a temporary of one parameter that is larger than the next one's."""
    assert_unrolled_is_all(parameters(*LISTS[looks]), mode, optim)


@pytest.mark.parametrize(("mode", "optim"), CASES)
def test_any_order_of_any_parameters_unrolls(mode, optim):
    rng = random.Random(optim)
    for _ in range(4):
        looks = [rng.choice([W, B, HALF_W, HALF_B]) for _ in range(rng.randint(4, 16))]
        assert_unrolled_is_all(parameters(*looks), mode, optim)


def test_the_order_of_the_parameters_counts():
    """Fails where unrolling goes by kind: then both lists would hold the same at every event."""
    layers, runs = parameters(*[W, B] * 5), parameters(*[W] * 5, *[B] * 5)
    in_layers = assert_unrolled_is_all(layers, "cpu", "adamw_torch")
    in_runs = assert_unrolled_is_all(runs, "cpu", "adamw_torch")
    assert sizes(in_layers) != sizes(in_runs)


def test_a_transposed_parameter_is_one_of_its_own():
    """The trap: equal shapes with other strides, for which a foreach operator leaves its fast route."""
    matrix, transposed = torch.empty(24, 16, device="meta"), torch.empty(16, 24, device="meta").t()
    for mode in TRACE_MODES:
        assert_unrolled_is_all([matrix, transposed, matrix, matrix, transposed, matrix], mode, "adamw_torch")


def test_adam_keeps_two_tensors_and_a_counter_for_each_parameter():
    """By hand: twice the parameter, and 4 bytes."""
    traced = assert_unrolled_is_all(parameters(W, B, W), "cpu", "adamw_torch")
    kept = sorted(traced.blocks[n].nbytes for n in traced.states)
    assert kept == sorted([4, 4, 4, *[24 * 16 * 4] * 4, *[24 * 4] * 2])


def test_counters_in_host_memory_do_not_count():
    traced = assert_unrolled_is_all(parameters(W, B, W), "foreach", "adamw_torch", steps_on_device=False)
    assert sorted(traced.blocks[n].nbytes for n in traced.states) == sorted([*[24 * 16 * 4] * 4, *[24 * 4] * 2])


def test_plain_sgd_keeps_nothing():
    assert assert_unrolled_is_all(parameters(W, B), "cpu", "sgd").states == ()


def test_later_phases_create_no_states():
    """The trap: the states of the first phase allocated again in each one."""
    traced = trace_update(parameters(W, W, B), precision="fp32", optim="adamw_torch")
    first, later = sizes(traced)
    gradients = sum(block.nbytes for block in traced.blocks[:3])
    assert first[-1] == 2 * gradients + 3 * 4 - gradients
    assert later[-1] == -gradients


def test_foreach_allocates_more_at_once_than_a_loop():
    """The reason for a trace mode of its own: its temporaries are those of all parameters together."""
    peaks = {
        mode: max(
            sizes(
                trace_update(parameters(*[W] * 20), precision="fp32", optim="adamw_torch", trace_mode=TRACE_MODES[mode])
            )[1]
        )
        for mode in TRACE_MODES
    }
    assert peaks["foreach"] > 5 * peaks["cpu"]


def test_tracing_does_not_grow_with_the_number_of_layers(monkeypatch):
    """What the module is for: hundreds of parameters at milliseconds each."""
    traced = []
    real = optimizer_step.Update

    def counting(params, **kwargs):
        traced.append(len(params))
        return real(params, **kwargs)

    monkeypatch.setattr(optimizer_step, "Update", counting)
    for layers in (6, 60):
        trace_update(parameters(W, *[W, B, HALF_W] * layers, W), precision="fp32", optim="sgd")
    assert traced[0] == traced[1] < 10
