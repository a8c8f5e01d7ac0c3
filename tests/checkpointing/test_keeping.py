"""Policies that save and skip on real models: gradients are bit-identical to those of `off`, and skipped calls do not
run."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import planned
import pytest
import torch
from planned import mixed
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing.policy_contexts import RecomputeMismatch, SavedOutputMutated, SkippedButNeeded
from gcbench.strategies import Plan, Policy
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    *((family, "fp32") for family in planned.FAMILIES if family != "bloom"),
    # The first layer gets bf16 hidden states and the others fp32 ones, so that they call different operators.
    *((family, "bf16") for family in ("gpt2", "mamba")),
    # Each run of a layer casts its weights anew.
    *((family, "bf16-mixed") for family in ("gpt2", "mixtral", "gemma2")),
]


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_every_searched_policy_leaves_the_gradients_unchanged(family, precision):
    """The traps: dropout masks drawn anew; saved outputs changed in place; a different first layer; views that
    autograd regenerates from placeholders; a call on placeholders after the last one that runs."""
    plans = planned.found_plans(family, precision)
    assert sum(any(policy.keep and policy.skip for policy in plan.policies) for plan in plans) >= 2
    for plan in plans:
        planned.assert_as_off(family, plan, precision)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_different_policies_per_layer_leave_the_gradients_unchanged(family):
    """The trap: one layer's saved outputs used for another."""
    rng, plans = random.Random(0), planned.found_plans(family)
    for _ in range(5):
        planned.assert_as_off(family, mixed(rng, plans, planned.LAYERS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_plan_works_at_other_batch_sizes_or_is_refused(family):
    """Policies are searched with four sequences. A single one needs fewer copies, so that calls have other numbers."""
    for plan in planned.found_plans(family)[::2]:
        planned.assert_as_off(family, plan, batch_size=3)
        try:
            planned.assert_as_off(family, plan, batch_size=1)
        except (SkippedButNeeded, RecomputeMismatch) as err:
            assert "made for other layers" in str(err) or "take a strategy" in str(err)


def test_dropout_is_active_in_what_is_compared():
    """The trap: a comparison that holds because nothing random happens."""
    for family in ("gpt2", "opt", "phi"):
        off = planned.trained_off(family)
        again = planned.trained(family)
        model = planned.model_of(family).eval()
        try:
            assert torch.equal(off.loss, again.loss)
            assert not torch.equal(off.loss, planned.trained(family).loss)
        finally:
            model.train()


def test_other_masks_would_be_noticed(monkeypatch):
    """This file's own alarm: a second run that draws other numbers."""
    careless = partial(torch_checkpoint.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(checkpointing, "checkpoint", careless)
    with pytest.raises(AssertionError):
        for plan in planned.found_plans("gpt2"):
            planned.assert_as_off("gpt2", plan)


# What is recomputed

aten = torch.ops.aten


def flash(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def flash_backward(grad_out, query, key, value, *args, **kwargs):
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


def grouped_mm(left, right, *args, **kwargs):
    """(tokens, in) x (groups, in, out), each token in one group; or (in, tokens) x (tokens, out), one of each group."""
    return mm_flop(left.shape, right.shape[-2:])


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
    aten._grouped_mm: grouped_mm,
}
"""FLOPs of operators that torch's counter does not know."""


class Products(TorchDispatchMode):
    """Names each product that computes something, as plans do, with its operations; on the meta device none does."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        first = result[0] if isinstance(result, tuple) else result
        if (op in FORMULAS or op in flop_registry) and first.device.type != "meta":
            name = str(op).removeprefix("aten.")
            formula = FORMULAS.get(op)
            flops = formula(*args) if formula else flop_registry[op](*args, **(kwargs or {}), out_val=result)
            self.noted.append((f"{name}#{self.counts[name]}", flops))
            self.counts[name] += 1
        return result

    @property
    def flops(self):
        return sum(flops for _, flops in self.noted)


def flops_of_training(family, plan):
    with Products() as products:
        planned.trained(family, plan)
    return products.flops


def products_of_layers(family):
    """The products of each layer's forward pass, run by itself on its inputs in the model."""
    model = planned.model_of(family)
    layers, given = checkpointing.checkpointable_layers(model), []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, *taken: given.append(taken), with_kwargs=True) for layer in layers
    ]
    batch = training.random_batch(model, batch_size=planned.BATCH_SIZE, seq_len=planned.seq_len(family), seed=0)
    with torch.no_grad():
        model(**training.forward_inputs(model, batch))
    for hook in hooks:
        hook.remove()
    found = []
    for layer, (args, kwargs) in zip(layers, given, strict=True):
        with torch.no_grad(), Products() as products:
            layer(*args, **kwargs)
        found.append(products.noted)
    return found


def run_again(products, plan):
    """FLOPs of the calls that are neither saved nor skipped, where policies name all that need not run."""
    flops = 0
    for (layer,), policy in plan.treated():
        flops += sum(flops for name, flops in products[layer] if name not in (*policy.keep, *policy.skip))
    return flops


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_what_is_skipped_does_not_run(family):
    """The trap: gradients are right whatever is recomputed; only the time is not saved."""
    products, off = products_of_layers(family), flops_of_training(family, None)
    everything = sum(flops for layer in products for _, flops in layer)
    again = []
    for plan in planned.found_plans(family):
        expected = run_again(products, plan)
        assert flops_of_training(family, plan) == off + expected
        again.append(expected)
    assert min(again) == 0 < max(again) <= everything
    skipped = {name.partition("#")[0] for plan in planned.found_plans(family) for p in plan.policies for name in p.skip}
    assert skipped & {"mm", "addmm", "bmm"}, "nothing that counts was skipped"


QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = (f"mm#{number}" for number in range(7))
TO_QUERY, TO_KEY = (QUERY, "mul#2", "neg#0", "cat#0", "mul#3"), (KEY, "mul#4", "neg#1", "cat#1", "mul#5")
"""From the product to what is added up as the rotated query, `add#1`, and key, `add#2`."""
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("keep", "skip", "names"),
    [
        # A rotated query and key are kept, and what they are made of is skipped.
        (("add#1", "add#2"), (*TO_QUERY, *TO_KEY), (VALUE, OUT, GATE, UP)),
        # The same with a skip list that says nothing of them: they run for nothing.
        (("add#1", "add#2"), ("pow#9",), (QUERY, KEY, VALUE, OUT, GATE, UP)),
        # Attention reads all three in its backward pass; what it led to is kept behind the next product.
        ((ATTENTION, "add#3"), (OUT,), (QUERY, KEY, VALUE, GATE, UP)),
        # By the operator's name, all calls of it but those that are kept.
        (("add#1", "add#2", VALUE, GATE, UP, ATTENTION, "add#3"), ("mm", *TO_QUERY, *TO_KEY), ()),
    ],
)
def test_a_llama_by_hand(keep, skip, names):
    products = products_of_layers("llama")
    plan = Plan(
        num_layers=planned.LAYERS,
        groups=((0,), (1,), (2,)),
        policies=(Policy(keep=keep, skip=skip),) * planned.LAYERS,
    )
    planned.assert_as_off("llama", plan)
    flops = [dict(layer) for layer in products]
    attention = 0 if ATTENTION in keep else sum(layer[f"{ATTENTION}#0"] for layer in flops)
    expected = sum(layer[name] for layer in flops for name in names) + attention
    assert flops_of_training("llama", plan) - flops_of_training("llama", None) == expected


def test_the_counter_counts_as_torch_does():
    """This file's own alarm: the same operations as `torch.utils.flop_counter`, where nothing is skipped."""

    def raw(formula):
        def flops(*args, out_val=None, **kwargs):
            return formula(*args)

        flops._get_raw = True  # tensors, not their shapes
        return flops

    custom = {op: raw(formula) for op, formula in FORMULAS.items()}
    plan = Plan(num_layers=planned.LAYERS, groups=((0,), (1,), (2,)))
    for each in (None, plan):
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            planned.trained("llama", each)
        assert counter.get_total_flops() == flops_of_training("llama", each)


# Wrong skip lists


@pytest.mark.parametrize(
    ("family", "skip"),
    [
        ("llama", ("silu#0",)),  # read by the product after it
        ("llama", ("rsqrt#0",)),  # saved
        ("llama", ("mm#0",)),  # rotated, then saved
        ("llama", ("mm",)),
        ("llama", (f"{ATTENTION}#0",)),
        ("gpt2", ("addmm#0",)),
        ("gpt2", ("_safe_softmax",)),
        ("mixtral", ("topk",)),
        ("mixtral", ("_grouped_mm#0",)),
    ],
)
def test_a_wrong_skip_list_is_refused(family, skip):
    """A needed call is skipped: an error in every case, never a wrong gradient."""
    plan = Plan(num_layers=planned.LAYERS, groups=((1,),), policies=(Policy(skip=skip),))
    with pytest.raises(SkippedButNeeded, match=r"the plan skips what .+ needs, .+; make it again with gcbench plan"):
        planned.trained(family, plan)
    planned.assert_as_off(family, planned.found_plans(family)[0])  # and the model is none the worse for it


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_any_skip_list_is_right_or_refused(family):
    """Whatever a plan says, gradients are those of `off` or there are none."""
    rng, refused = random.Random(0), 0
    plan = planned.found_plans(family)[-1]
    layer = 2
    names = [name for policy in (plan.policies[layer],) for name in (*policy.keep, *policy.skip)]
    for _ in range(8):
        keep = tuple(name for name in names if rng.random() < 0.4)
        skip = tuple(name for name in names if name not in keep and rng.random() < 0.3)
        policy = Policy(keep=keep, skip=skip or ("sin",))
        try:
            planned.assert_as_off(family, Plan(num_layers=planned.LAYERS, groups=((layer,),), policies=(policy,)))
        except (SkippedButNeeded, SavedOutputMutated):
            refused += 1
    assert refused > 0
