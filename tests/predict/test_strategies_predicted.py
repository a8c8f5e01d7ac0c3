"""Every strategy on fake tensors: a step composed of a few layers equals one traced in full, and that a real one."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
import tiny
import torch
import toys
from toys import Toy

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.records import PHASES
from gcbench.devices.backends import open_device
from gcbench.devices.target import Target
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.simulate import timeline
from gcbench.simulate.device_model import device_model_for
from gcbench.simulate.predictor import Predictor
from gcbench.strategies import Plan, Policy
from gcbench.training import step as training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BATCH_SIZE = 2
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRID = {
    "model_type": "granitemoehybrid",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 32,
    **MAMBA2,
    **tiny.LLAMA_LIKE,
    "layer_types": ["mamba", "attention"] * 6,
}
FAMILIES = {
    **{family: tiny.CONFIGS[family] for family in tiny.CHECKPOINTING},
    "granitemoehybrid": HYBRID,
    "lfm2": {"model_type": "lfm2", **tiny.LLAMA_LIKE, "layer_types": ["conv", "full_attention"] * 6},
}
LOOPING = ("mamba", "granitemoehybrid")
"""Families that go through the sequence token by token or chunk by chunk: four tokens are enough for them."""

SPECS = {
    # The last group is smaller than the others.
    "segment:2": 9,
    "segment:2+selective:matmul": 9,
    # One group of all.
    "segment:4": 4,
    "last:3": 7,
    "selective:matmul": 5,
    "selective:mm#1/addmm#1": 5,
    "every:2+selective:attention": 8,
    "reentrant": 5,
}
"""Strategy -> layers of the model it is tried on, of which some are left out (but for one group of all)."""


def config_of(family, layers):
    config = FAMILIES[family]
    if "layer_types" not in config:
        return config
    return {**config, "num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}


def predictor(family, layers, *, exact, **kwargs):
    source = ModelSource(name=family, origin="", config=config_of(family, layers), location="")
    model = models.build_meta(models.build_config(source, layers=layers, overrides={}), dtype=torch.float32)
    return Predictor(model, precision="fp32", exact=exact, **{"optim": "sgd", **kwargs})


def seen(step):
    """What either kind of device sees of a step."""
    return timeline.exact(step.timeline).memory, timeline.cached(step.timeline).memory


def assert_composed_is_full(family, plan, *, leaves_out=True, **kwargs):
    seq_len = 4 if family in LOOPING else 16
    composed, full = (
        predictor(family, plan.num_layers, exact=exact, **kwargs).step(plan, batch_size=BATCH_SIZE, seq_len=seq_len)
        for exact in (False, True)
    )
    assert composed.why_in_full is None
    assert full.layers_traced == plan.num_layers
    assert composed.layers_traced < plan.num_layers or not leaves_out
    few, all_of_them = seen(composed)[0], seen(full)[0]
    for phase in PHASES:
        assert few.of_phase(phase) == all_of_them.of_phase(phase), phase
    assert few == all_of_them
    return composed, full


# Put together or in full


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        *(("llama", spec) for spec in SPECS),
        *(("gpt2", spec) for spec in ("selective:mm#1/addmm#1", "reentrant")),
        *(("mixtral", spec) for spec in ("last:3", "selective:matmul")),
    ],
)
def test_a_few_layers_represent_all(family, spec):
    """The traps: a boundary that is kept by a segment and not by its layers; layers of one segment that do not look
    alike, for the first of them keeps its input; the last segment, which is smaller; a reentrant layer's gradients,
    made by a backward pass inside the backward pass; what is kept for one call of an operator only."""
    plan = strategies.parse(spec).plan_for(SPECS[spec])
    assert_composed_is_full(family, plan, leaves_out=spec != "segment:4")


@pytest.mark.parametrize(
    ("family", "spec", "layers"),
    [
        ("lfm2", "segment:3", 8),
        ("lfm2", "reentrant", 8),
    ],
)
def test_two_kinds_of_layers_in_turn(family, spec, layers):
    """The trap: a segment of three holds two of one kind, and the next two of the other."""
    assert_composed_is_full(family, strategies.parse(spec).plan_for(layers), leaves_out=False)


MIXED = {
    "policies in turn": Plan(
        num_layers=8,
        groups=tuple((layer,) for layer in range(8)),
        policies=(Policy(), Policy(keep=("mm#2", "addmm#2"))) * 4,
    ),
    "segments of all sizes": Plan(
        num_layers=9,
        groups=((0, 1, 2), (3, 4), (5,), (7, 8)),
        policies=(Policy(), Policy(keep=("mm", "addmm")), Policy(), Policy()),
    ),
    "the old variant beside the new": Plan(
        num_layers=8,
        groups=((0,), (1,), (3,), (6,), (7,)),
        policies=(Policy(reentrant=True), Policy(), Policy(reentrant=True), Policy(keep=("mm",)), Policy()),
    ),
}


@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in MIXED), ("gpt2", "policies in turn")])
def test_groups_with_policies_of_their_own(family, name):
    assert_composed_is_full(family, MIXED[name], leaves_out=False)


def random_plan(rng, number):
    """Groups without a pattern, with policies without a pattern."""
    groups, policies, start = [], [], 0
    with_reentrant = rng.random() < 0.3
    while start < number:
        size = 1 if with_reentrant else min(rng.choice([1, 1, 2, 3]), number - start)
        if rng.random() < 0.7:
            groups.append(tuple(range(start, start + size)))
            choices = [Policy(), Policy(), Policy(keep=("addmm",)), Policy(keep=("addmm#1", "tanh"))]
            policies.append(rng.choice([*choices, Policy(reentrant=True)] if with_reentrant else choices))
        start += size
    return Plan(num_layers=number, groups=tuple(groups), policies=tuple(policies))


def regular_plan(rng, number):
    spec = rng.choice(["segment:2", "segment:3", "segment:2+selective:addmm", "reentrant", "last:2+selective:tanh"])
    return strategies.parse(spec).plan_for(number)


def test_any_layers_under_any_plan_compose():
    """The trap: a rule that holds for the plans that have a name, which are all regular."""
    rng = random.Random(0)
    left_out = 0
    for trial in range(8):
        number = rng.randint(3, 9)
        kinds = (rng.choice(["a", "a", "ab", "abc", "".join(rng.choices("abc", k=number))]) * number)[:number]
        plan = (random_plan if trial % 2 else regular_plan)(rng, number)
        optim = rng.choice(["sgd", "adamw_torch"])
        composed, full = (
            toys.predictor(lambda kinds=kinds: Toy(kinds), exact=exact, optim=optim).step(plan, batch_size=2, seq_len=4)
            for exact in (False, True)
        )
        # With the old variant it may be traced in full: right as well, and slower.
        assert composed.why_in_full is None or plan.any_policy("reentrant"), (kinds, plan)
        assert seen(composed) == seen(full), (kinds, plan)
        left_out += number - composed.layers_traced
    assert left_out > 0


@pytest.mark.parametrize("spec", ["segment:2", "last:2+selective:matmul"])
def test_how_many_layers_are_traced_does_not_depend_on_the_depth(spec):
    traced = []
    for layers in (11, 21):
        one = predictor("llama", layers, exact=False)
        traced.append(one.step(strategies.parse(spec).plan_for(layers), batch_size=1, seq_len=8).layers_traced)
    assert traced[0] == traced[1] <= 10


def test_one_predictor_answers_every_strategy_as_a_new_one_would():
    """The traps: a segment that one cell began and the next one ends, functions and flags left on the layers."""
    shared = predictor("gpt2", 4, exact=False)
    for spec in ("segment:2", "selective:matmul", "segment:2"):
        plan = strategies.parse(spec).plan_for(4)
        again = seen(shared.step(plan, batch_size=1, seq_len=8))
        assert again == seen(predictor("gpt2", 4, exact=False).step(plan, batch_size=1, seq_len=8)), spec


@pytest.mark.parametrize(
    ("family", "spec", "layers"),
    [("gpt2", "selective:matmul", 5), ("mixtral", "offload", 5)],
)
def test_behind_cudas_allocator_it_is_the_same(family, spec, layers):
    """Sizes alone are not enough here: what is reserved depends on the order of every event."""
    way = device_model_for(Target(kind="cuda", name="x"))
    composed, full = assert_composed_is_full(
        family,
        strategies.parse(spec).plan_for(layers),
        optim="adamw_torch",
        trace_mode=way.trace_mode,
        resident=way.resident,
        steps_on_device=False,
    )
    assert seen(composed) == seen(full)


def test_what_is_offloaded_is_not_on_the_device():
    """By hand: at the end of the forward pass of 8 layers, 8 inputs of (2 x 16 tokens, 32) are in the host's memory."""
    way = device_model_for(Target(kind="cuda", name="x"))
    kept = {}
    for spec in ("per-layer", "offload", "segment:2", "segment:2+offload"):
        one = predictor(
            "llama",
            8,
            exact=False,
            trace_mode=way.trace_mode,
            resident=way.resident,
            steps_on_device=False,
            optim="sgd",
        )
        line = one.step(strategies.parse(spec).plan_for(8), batch_size=BATCH_SIZE, seq_len=16).timeline
        end = next(end for name, _, end in line.spans() if name == "forward")
        events = [int(event) for event in line.events[:end]]
        kept[spec] = sum(int(line.nbytes[event]) if event >= 0 else -int(line.nbytes[~event]) for event in events)
    boundary = BATCH_SIZE * 16 * 32 * 4
    assert kept["per-layer"] - kept["offload"] == 8 * boundary
    assert kept["segment:2"] - kept["segment:2+offload"] == 4 * boundary


# As the real step

SLACK_BYTES = 256
"""Single numbers that real operators make and fake ones do not."""


@cache
def measured(family, plan, *, batch_size, seq_len):
    source = ModelSource(name=family, origin="", config=config_of(family, plan.num_layers), location="")
    config = models.build_config(source, layers=plan.num_layers, overrides={})
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
    checkpointing.apply(model, plan)
    batch = training.random_batch(model, batch_size=batch_size, seq_len=seq_len, seed=0)
    step = training.TrainingStep(model, batch=batch, precision="fp32", optim="adamw_torch", seed=0)
    with open_device("cpu").probe_memory() as probe:
        step()
        step(probe.on_phase)
    return probe.peaks()


def assert_same_as_real(family, plan):
    size = {"batch_size": 8, "seq_len": 8 if family in LOOPING else 64}
    one = predictor(family, plan.num_layers, exact=False, optim="adamw_torch")
    fake = timeline.exact(one.step(plan, **size).timeline).memory
    real = measured(family, plan, **size)
    for phase in PHASES:
        assert abs(fake.of_phase(phase) - real.of_phase(phase)) <= SLACK_BYTES, phase
    assert fake.peak_phase == real.peak_phase
    return real


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", "segment:2"),
        ("llama", "last:2"),
        ("llama", "selective:matmul"),
        ("llama", "selective:mm#1"),
        ("llama", "reentrant"),
        ("gpt2", "segment:3"),
        ("gpt2", "every:2+selective:matmul"),
        ("mixtral", "selective:attention"),
        ("mixtral", "segment:2"),
        ("granitemoehybrid", "segment:3"),
        ("bloom", "segment:3"),
        ("opt", "selective:matmul"),
    ],
)
def test_a_prediction_is_the_real_step(family, spec):
    """The traps: the random state kept by each layer, of which a segment keeps one; what an operator's policy keeps
    twice; buffers that the engine adds in place for real tensors only."""
    assert_same_as_real(family, strategies.parse(spec).plan_for(tiny.NUM_LAYERS))


@pytest.mark.parametrize("name", ["segments of all sizes", "the old variant beside the new"])
def test_a_mixed_plan_is_the_real_step(name):
    assert_same_as_real("llama", MIXED[name])


def test_peaks_of_strategies_differ_by_more_than_the_tolerance():
    """The trap: a slack so wide that every strategy fits every prediction."""
    peaks = {
        spec: measured("llama", strategies.parse(spec).plan_for(tiny.NUM_LAYERS), batch_size=8, seq_len=64)
        for spec in ("off", "per-layer", "segment:2", "selective:matmul", "last:2")
    }
    phase_peaks = [(peak.of_phase("forward"), peak.of_phase("backward")) for peak in peaks.values()]
    for one, other in itertools.combinations(phase_peaks, 2):
        assert any(abs(a - b) > SLACK_BYTES for a, b in zip(one, other, strict=True)), peaks
