"""The backward pass recomputes what the strategy says and nothing else: matrix products are counted, to the FLOP.

The expectation comes from single layers run by themselves, without checkpointing, and from three rules of torch
(torch/utils/checkpoint.py and the code that torch's autograd generates):

1. A group that is recomputed runs its operators again in their order, up to the moment at which it has saved as many
   tensors as the first run did (`_recomputation_hook` raises `_StopRecomputationError` there). An operator saves its
   inputs before its kernel runs and its outputs after it. So what is run again are the operators before the last save
   of the group's last layer: the product that ends a layer saves its inputs last of all and is not run again, unless
   something behind it saves too (dropout, a norm). A layer inside a segment is run again to its end.
2. Of those, an operator whose output is kept is not run again.
3. The reentrant variant runs all of a layer again: it builds a new graph, and cannot know what will be needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.strategies import Plan, Policy
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH_SIZE = 2
SEQ_LENS = {"mamba": 4}
"""Of families that loop over the sequence; else 12."""

CASES = {
    **{family: (family, None) for family in tiny.CHECKPOINTING},
    "llama, eager": ("llama", "eager"),
    "gpt2, eager": ("gpt2", "eager"),
}
STRATEGIES = (
    "per-layer",
    "every:2",
    "segment:2",
    "first:1",
    "last:1",
    "selective:matmul",
    "selective:attention",
    "selective:mm#0",
    "every:2+selective:matmul",
    "reentrant",
)
MORE_STRATEGIES = (
    "segment:3",
    "segment:4",
    "last:3",
    "selective:addmm#1/mm#2/bmm",
    "segment:2+selective:matmul",
    "segment:2+selective:mm#7/addmm#5",
    "every:2+reentrant",
)

aten = torch.ops.aten


def flash(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


def flash_backward(grad_out, query, key, value, *args, **kwargs):
    return sdpa_backward_flop_count(grad_out, query, key, value)


def grouped_mm(left, right, *args, out_shape=None, **kwargs):
    """(tokens, in) x (groups, in, out), each token in one group; or (in, tokens) x (tokens, out), one of each group."""
    return mm_flop(left, right[-2:])


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
    aten._grouped_mm: grouped_mm,
}
"""FLOPs of operators that torch's counter does not know."""


@dataclass(frozen=True)
class Product:
    op: object
    flops: int

    @property
    def name(self):
        return str(self.op).removeprefix("aten.")


@dataclass(frozen=True)
class Layer:
    """The products of one forward pass of a layer, in order, and how many of them come before its last save."""

    products: tuple[Product, ...]
    num_before_last_save: int


class Products(TorchDispatchMode):
    """Notes each product as it runs."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.num_at_last_save = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in FORMULAS:
            shapes = [arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args]
            self.noted.append(Product(op, FORMULAS[op](*shapes)))
        elif op in flop_registry:
            self.noted.append(Product(op, flop_registry[op](*args, **(kwargs or {}), out_val=out)))
        return out

    def save(self, tensor):
        self.num_at_last_save = len(self.noted)
        return tensor


@cache
def model_of(case):
    family, attn = CASES[case]
    source = ModelSource(name=family, origin="", config=tiny.CONFIGS[family], location="")
    config = models.build_config(source, layers=None, overrides={})
    model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=attn, seed=0)
    return model.train()


def inputs_of(case):
    length = SEQ_LENS.get(case, 12)
    batch = training.random_batch(model_of(case), batch_size=BATCH_SIZE, seq_len=length, seed=0)
    return training.forward_inputs(model_of(case), batch)


@cache
def layers_of(case):
    """Each layer run by itself, on what it gets in the model."""
    model = model_of(case)
    layers, given = checkpointing.checkpointable_layers(model), []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, *taken: given.append(taken), with_kwargs=True) for layer in layers
    ]
    with torch.no_grad():
        model(**inputs_of(case))
    for hook in hooks:
        hook.remove()
    found = []
    for layer, ((hidden, *args), kwargs) in zip(layers, given, strict=True):
        products = Products()
        with torch.autograd.graph.saved_tensors_hooks(products.save, lambda tensor: tensor), products:
            layer(hidden.detach().requires_grad_(), *args, **kwargs)
        found.append(Layer(tuple(products.noted), products.num_at_last_save))
    return tuple(found)


def counted(case, plan):
    """FLOPs of one forward and backward pass of the whole model, by operator."""
    model = model_of(case)
    checkpointing.apply(model, plan)
    try:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            model(**inputs_of(case)).loss.backward()
    finally:
        checkpointing.clear(model)
        model.zero_grad()
    return Counter(counter.get_flop_counts()["Global"])


@cache
def counted_off(case):
    return counted(case, plan_of("off"))


def plan_of(spec):
    return strategies.parse(spec).plan_for(tiny.NUM_LAYERS)


def run_again(layers, plan):
    """FLOPs of what is recomputed, by operator: the three rules."""
    flops = Counter()
    for group, policy in plan.treated():
        products = [product for layer in group for product in layers[layer].products]
        last = layers[group[-1]]
        if not policy.reentrant:
            products = products[: len(products) - len(last.products) + last.num_before_last_save]
        calls = Counter()
        for product in products:
            if not {product.name, f"{product.name}#{calls[product.name]}"} & set(policy.keep):
                flops[product.op] += product.flops
            calls[product.name] += 1
    return flops


def assert_runs_again(case, plan, *, applied=None):
    """Running the model with `applied` costs what `off` costs plus what `plan` recomputes."""
    assert counted(case, applied or plan) == counted_off(case) + run_again(layers_of(case), plan)


@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        *((case, strategy) for case in CASES if case != "gpt2, eager" for strategy in STRATEGIES),
        *((case, strategy) for case in ("llama", "gpt2", "mixtral") for strategy in MORE_STRATEGIES),
    ],
)
def test_the_recomputed_flops_are_those_of_the_strategy(case, strategy):
    """The traps: a layer that is recomputed twice, or not at all; an operator whose output is saved and recomputed
    all the same; a segment that stops before its last layer. None of them changes a gradient."""
    assert_runs_again(case, plan_of(strategy))


def test_each_group_of_a_plan_saves_by_its_own_policy():
    plan = Plan(
        num_layers=tiny.NUM_LAYERS,
        groups=((0,), (1, 2), (3,)),
        policies=(Policy(keep=("mm",)), Policy(keep=("mm#8", "mm#0")), Policy(reentrant=False)),
    )
    for case in ("llama", "mixtral"):
        assert_runs_again(case, plan)
    reentrant = Plan(
        num_layers=tiny.NUM_LAYERS,
        groups=((0,), (2,), (3,)),
        policies=(Policy(reentrant=True), Policy(keep=("mm#6",)), Policy()),
    )
    assert_runs_again("llama", reentrant)


def test_an_operator_is_saved_under_its_full_name():
    """The trap: `aten::mm` passes every check and matches no operator, so that nothing is saved, without an error."""
    plans = [plan_of("selective:mm"), plan_of("selective:aten::mm")]
    plans.append(plans[0].with_policies(keep=("aten::mm",)))
    assert counted("llama", plans[0]) == counted("llama", plans[1]) == counted("llama", plans[2])
    plans = [plans[0].with_policies(keep=(name,)) for name in ("mm#0", "aten::mm#0")]
    assert counted("llama", plans[0]) == counted("llama", plans[1])


# By hand, from shapes alone


def test_a_llama_by_hand():
    """One layer: 2 x tokens x (q, k, v, o; gate, up, down) and attention; down is not recomputed."""
    tokens, length, width, inner, kv_width = BATCH_SIZE * 12, 12, 32, 64, 16
    projections = 2 * tokens * (width * width + 2 * width * kv_width + width * width)
    up, down = 2 * tokens * 2 * width * inner, 2 * tokens * inner * width
    attention = 2 * 2 * BATCH_SIZE * length * length * width
    head = 2 * tokens * width * 256
    off = counted_off("llama")
    assert off[aten.mm] == 3 * (tiny.NUM_LAYERS * (projections + up + down) + head)
    assert off[aten._scaled_dot_product_flash_attention_for_cpu] == tiny.NUM_LAYERS * attention
    for strategy, products, attentions in (
        ("per-layer", 4 * (projections + up), 4),
        ("segment:2", 4 * (projections + up) + 2 * down, 4),
        ("segment:4", 4 * (projections + up) + 3 * down, 4),
        ("reentrant", 4 * (projections + up + down), 4),
        ("every:2", 2 * (projections + up), 2),
        ("last:3", 3 * (projections + up), 3),
        ("selective:attention", 4 * (projections + up), 0),
        ("selective:matmul", 0, 0),
        ("selective:mm", 0, 4),
        ("selective:mm#0", 4 * (projections + up - 2 * tokens * width * width), 4),
        ("segment:2+selective:mm#0", 4 * (projections + up) + 2 * down - 2 * 2 * tokens * width * width, 4),
    ):
        again = counted("llama", plan_of(strategy)) - off
        assert again[aten.mm] == products, strategy
        assert again[aten._scaled_dot_product_flash_attention_for_cpu] == attentions * attention, strategy
        assert set(again) <= {aten.mm, aten._scaled_dot_product_flash_attention_for_cpu}, strategy


def test_dropout_after_the_last_product_has_it_recomputed():
    """GPT-2's dropout saves its mask after the product before it: the whole layer is recomputed, as one of 4 passes."""
    forward = sum(product.flops for layer in layers_of("gpt2") for product in layer.products)
    again = counted("gpt2", plan_of("per-layer")) - counted_off("gpt2")
    assert again.total() == forward
    assert all(layer.num_before_last_save == len(layer.products) for layer in layers_of("gpt2"))


def test_recomputing_all_layers_costs_a_third_of_their_training():
    """Of products, two of a backward pass for each of a forward pass, the share that every estimate starts from."""
    off, again = counted_off("gpt2, eager"), counted("gpt2, eager", plan_of("per-layer"))
    head = 3 * 2 * BATCH_SIZE * 12 * 32 * 256
    assert (again - off).total() * 3 == off.total() - head


# What must not pass


WRONG = {
    "a layer too few": ("per-layer", Plan(num_layers=4, groups=((0,), (1,), (2,)))),
    "no layer at all": ("per-layer", plan_of("off")),
    "another stride": ("every:2", plan_of("every:4")),
    "layers one by one for a segment": ("segment:2", plan_of("per-layer")),
    "segments of another size": ("segment:2", plan_of("segment:4")),
    "the old variant": ("per-layer", plan_of("reentrant")),
    "an operator kept that should run again": ("per-layer", plan_of("selective:mm#3")),
    "an operator run again that should be kept": ("selective:mm", plan_of("per-layer")),
    "another call of the operator": ("selective:mm#0", plan_of("selective:mm#1")),
    "attention run again": ("selective:matmul", plan_of("selective:mm")),
    "the calls counted in each layer of a segment": (
        "segment:2+selective:mm#0",
        plan_of("segment:2+selective:mm#0/mm#7"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_runs_another_plan_is_caught(wrong):
    """This file's own alarm: what is claimed and what is applied differ, and gradients would be the same."""
    claimed, applied = WRONG[wrong]
    with pytest.raises(AssertionError):
        assert_runs_again("llama", plan_of(claimed), applied=applied)


@pytest.mark.parametrize("strategy", ["per-layer", "selective:attention", "segment:2"])
def test_a_layer_that_ignores_its_flag_is_caught(monkeypatch, strategy):
    apply = checkpointing.apply

    def apply_in_vain(model, plan):
        counter = apply(model, plan)
        for layer in checkpointing.checkpointable_layers(model)[2:]:
            layer.gradient_checkpointing = False
        return counter

    counted_off("mixtral")
    monkeypatch.setattr(checkpointing, "apply", apply_in_vain)
    with pytest.raises(AssertionError):
        assert_runs_again("mixtral", plan_of(strategy))
