"""Small layers in which saving outputs could go wrong: each is right or refused, none is silently wrong."""

from __future__ import annotations

import gc
import operator
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import policy_contexts
from gcbench.checkpointing.policy_contexts import RecomputeMismatch, SavedOutputMutated, SkippedButNeeded
from gcbench.devices.backends.cpu import tensor_bytes
from gcbench.strategies import Plan, Policy

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 8


def hidden_states(size=4):
    torch.manual_seed(0)
    return torch.randn(size, WIDTH, requires_grad=True)


def kept(layer, hidden, *, keep=(), skip=()):
    """The layer's output under a policy."""
    contexts = partial(policy_contexts.contexts, Policy(keep=keep, skip=skip))
    return checkpoint(layer, hidden, use_reentrant=False, context_fn=contexts)


def gradients(output, hidden):
    (found,) = torch.autograd.grad(output.square().sum(), hidden)
    return found


def assert_as_plain(layer, *, keep=(), skip=()):
    hidden = hidden_states()
    found = gradients(kept(layer, hidden, keep=keep, skip=skip), hidden)
    assert type(found) is torch.Tensor
    assert torch.equal(found, gradients(layer(hidden), hidden))


def chain(hidden):
    return hidden.sin().exp().cos().tanh() * 2.0


@pytest.mark.parametrize(
    ("keep", "skip"),
    [
        ((), ("nothing#0",)),
        (("exp#0",), ("nothing#0",)),
        (("exp",), ("nothing",)),
        (("aten::exp#0",), ("aten::nothing#0",)),
        (("exp#0", "cos#0"), ("mul#0",)),  # behind the last one whose output is saved, where nothing runs
    ],
)
def test_saving_outputs_changes_no_gradient(keep, skip):
    assert_as_plain(chain, keep=keep, skip=skip)


def test_operators_count_on_their_own():
    """The trap: one count for all operators, so that `exp#0` is the second call."""
    assert_as_plain(lambda x: (x.sin() + x.sin().sin()).exp(), keep=("exp#0", "sin#2"), skip=("nothing#0",))


# A placeholder where its values are needed


def gated(hidden):
    """A gate without a gradient: autograd saves it as it is."""
    return hidden * (hidden > 0).to(hidden.dtype)


def detaching(hidden):
    """Of which autograd saves the exponential: the sine is only on its way there."""
    return (hidden.sin().detach() * 2.0).exp() * hidden.tanh()


@pytest.mark.parametrize(
    ("layer", "skip"),
    [
        (chain, ("sin#0",)),  # the next call reads it
        (chain, ("sin#0", "exp#0")),  # it is saved by a call that does not run either
        (chain, ("sin", "exp", "cos", "tanh")),  # only the engine would read what is saved
        (gated, ("gt#0",)),
        (gated, ("gt#0", "_to_copy#0")),
        (gated, ("gt#0", "_to_copy#0", "mul#0")),  # saved without a gradient, which no hook of torch's touches
        (detaching, ("sin#0", "mul#0")),
        (detaching, ("sin#0", "mul#0", "exp#0", "mul#1")),
    ],
)
def test_a_skipped_call_that_is_needed_is_refused(layer, skip):
    hidden = hidden_states()
    output = kept(layer, hidden, skip=skip)
    with pytest.raises(SkippedButNeeded, match="made for other layers than these; make it again with gcbench plan"):
        gradients(output, hidden)


def test_a_skipped_call_that_is_not_needed_is_not_missed():
    """By a call that runs, by one that is detached, or only by its shape."""
    assert_as_plain(lambda x: x.sin().sin().exp(), keep=("exp#0", "sin#1"), skip=("nothing#0",))
    assert_as_plain(lambda x: (x * 2.0).sum(-1, keepdim=True).expand(4, 8) * 3.0, skip=("mul", "sum"))
    assert_as_plain(lambda x: (x * 2.0).detach().relu().sum() * 0.0 + x.exp(), keep=("exp",), skip=("mul#0", "relu"))


@pytest.mark.parametrize("compare", ["ge", "le", "gt", "lt"])
def test_a_comparison_with_a_placeholder_is_the_same_comparison(compare):
    """The trap: `plain >= placeholder` is `placeholder <= plain` to Python, and `le` no call of the first run."""
    by_sign = {"ge": operator.ge, "le": operator.le, "gt": operator.gt, "lt": operator.lt}

    def layer(hidden):
        gate = by_sign[compare](hidden.detach(), hidden.sin().detach())
        return hidden.exp() * gate.to(hidden.dtype)

    assert_as_plain(layer, keep=("exp#0", "_to_copy#0"), skip=("sin", "ge", "le", "gt", "lt"))


def writing(hidden):
    """Adds in place to what it has made: the sum is saved, and what it was before is not."""
    made = hidden * 3.0
    made += hidden.sin()
    return made.exp() * made


@pytest.mark.parametrize("skip", [("add_#0",), ("add_",), ("sin#0", "add_#0"), ("mul#0", "add_#0"), ("sin#0",)])
def test_a_skipped_write_is_right_or_refused(skip):
    """The trap: a call that writes and is skipped leaves behind a real tensor with the old values."""
    hidden = hidden_states()
    output = kept(writing, hidden, skip=skip)
    try:
        assert torch.equal(gradients(output, hidden), gradients(writing(hidden), hidden))
    except SkippedButNeeded:
        assert skip not in [("add_#0",), ("add_",)]  # nothing is missing: it writes again


def filling(hidden):
    """Fills an empty tensor half by half, as deepseek's keys are."""
    made = hidden.new_empty(4, 2 * WIDTH)
    made[:, :WIDTH] = hidden.sin()
    made[:, WIDTH:] = hidden.cos()
    return made.exp()


@pytest.mark.parametrize("skip", [("sin#0",), ("sin#0", "copy_#0"), ("copy_",), ("new_empty", "sin", "cos", "copy_")])
def test_a_skipped_fill_of_a_half_is_right_or_refused(skip):
    hidden = hidden_states()
    output = kept(filling, hidden, skip=skip)
    try:
        assert torch.equal(gradients(output, hidden), gradients(filling(hidden), hidden))
    except SkippedButNeeded:
        assert "sin#0" in skip or "sin" in skip
    assert_as_plain(filling, keep=("exp#0",), skip=("new_empty", "sin", "cos", "copy_"))


def test_views_that_autograd_regenerates_are_no_mismatch():
    """The trap: after a change in place through a view, autograd makes the view anew, of placeholders with an
    operator and of others without: the second run calls `select` more often than the first one did."""

    def layer(hidden):
        rows = torch.zeros_like(hidden)
        for number in range(4):
            rows[number] = hidden[number].sin()
        return (rows * 2.0).exp() * hidden

    assert_as_plain(layer, keep=("exp#0",), skip=("zeros_like", "sin", "copy_", "mul#0"))


# Saved outputs that are changed


def changing(hidden, *, asks=True):
    product = torch.matmul(hidden.sin(), torch.eye(WIDTH) * 0.5).unsqueeze(0)
    product += 1.0
    return (product.sin() * product).sum(0) if asks else product.sum(0)


@pytest.mark.parametrize("keep", [("mm",), ("mm#0",)])
def test_a_saved_output_changed_in_the_layer_is_refused(keep):
    """The trap: gradients of the changed output instead of the saved one."""
    hidden = hidden_states()
    output = kept(changing, hidden, keep=keep, skip=("nothing#0",))
    with pytest.raises(SavedOutputMutated, match=r"changed in place \(add_\)"):
        gradients(output, hidden)


def test_a_change_that_no_second_run_sees_is_allowed():
    assert_as_plain(partial(changing, asks=False), keep=("mm",), skip=("nothing#0",))


def test_a_saved_output_changed_after_the_layer_is_refused():
    """The trap: a layer returns its saved output, and the next one adds to it in place; without a plan that is fine."""

    def layer(hidden):
        handed_on = hidden * 3.0
        return handed_on, handed_on.exp()

    def train(run):
        hidden = hidden_states()
        handed_on, other = run(hidden)
        handed_on += 1.0
        return gradients(handed_on * other, hidden)

    expected = train(layer)
    assert torch.equal(train(partial(kept, layer, skip=("nothing#0",))), expected)
    with pytest.raises(SavedOutputMutated, match="when the layer had run"):
        train(partial(kept, layer, keep=("mul#0",), skip=("nothing#0",)))


@pytest.mark.parametrize("keep", [("add_#0",), ("add_",)])
def test_a_write_in_place_is_recomputed_even_if_it_is_saved(keep):
    """The trap: its result comes from the store, and its target is not written."""
    assert_as_plain(writing, keep=keep, skip=("nothing#0",))


# Layers that recompute differently


class Fickle:
    """Calls another operator when it is recomputed, or one more before it."""

    def __init__(self, how):
        self.how, self.runs = how, 0

    def __call__(self, hidden):
        self.runs += 1
        if self.runs == 2 and self.how == "another":
            return hidden.sin().cos().exp()
        if self.runs == 2 and self.how == "more":
            return (hidden + 0.0).sin().exp().exp()
        return hidden.sin().exp().exp()


@pytest.mark.parametrize("how", ["another", "more"])
def test_a_layer_that_recomputes_differently_is_refused(how):
    """The trap: `exp#0` of the first run taken for that of the second."""
    hidden = hidden_states()
    output = kept(Fickle(how), hidden, keep=("exp#0",), skip=("nothing#0",))
    with pytest.raises(
        RecomputeMismatch, match=r"calls (cos|add)#0 when it is recomputed .+; take a strategy that saves"
    ):
        gradients(output, hidden)


# Passes that are not one forward and one backward


def test_a_second_backward_pass_through_one_graph_is_refused():
    hidden = hidden_states()
    output = kept(chain, hidden, keep=("exp#0",), skip=("sin#0",)).sum()
    output.backward(retain_graph=True)
    first = hidden.grad.clone()
    with pytest.raises(
        RuntimeError, match=r"a second backward pass through one forward pass .+; leave retain_graph out"
    ):
        output.backward()
    assert torch.equal(hidden.grad, first)


def test_a_second_step_is_none_the_worse_for_the_first():
    layer_calls = [kept(chain, hidden_states(), keep=("exp#0",), skip=("sin#0",)) for _ in range(2)]
    assert torch.equal(layer_calls[0], layer_calls[1])
    assert_as_plain(chain, keep=("exp#0",), skip=("nothing",))
    assert_as_plain(chain, keep=("exp#0",), skip=("nothing",))


@pytest.mark.parametrize("with_backward", [True, False])
def test_nothing_stays_alive_after_a_step(with_backward):
    """The trap: saved outputs in a reference cycle, until the garbage collector runs. Each must be freed with its last
    user, in the backward pass, layer by layer."""
    hidden = hidden_states(1024)
    gc.collect()
    gc.disable()
    try:
        before = tensor_bytes()
        output = kept(chain, hidden, keep=("exp#0", "cos#0"), skip=("sin#0",))
        during = tensor_bytes()
        if with_backward:
            gradients(output, hidden)
        del output
        after = tensor_bytes()
    finally:
        gc.enable()
    assert during - before >= 2 * 1024 * WIDTH * 4
    assert after == before


def test_saved_outputs_are_freed_even_if_the_recomputation_fails():
    hidden = hidden_states(1024)
    gc.collect()
    before = tensor_bytes()
    output = kept(chain, hidden, keep=("cos#0",), skip=("sin#0",))
    with pytest.raises(SkippedButNeeded):
        gradients(output, hidden)
    del output
    gc.collect()
    assert tensor_bytes() == before


# Layers that share


class Shared(GradientCheckpointingLayer):
    """Albert's: all layers share their weights."""

    def __init__(self, linear, up):
        super().__init__()
        self.linear, self.up = linear, up

    def forward(self, hidden):
        return hidden + self.up(self.linear(hidden).relu()).tanh()


class Albert(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        torch.manual_seed(0)
        linear, up = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.layers = nn.ModuleList(Shared(linear, up) for _ in range(layers))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize(
    "policy",
    [
        Policy(keep=("_to_copy#1",), skip=("nothing#0",)),
        Policy(keep=("addmm#0",), skip=("_to_copy#0", "_to_copy#1", "_to_copy#2")),
        Policy(keep=("addmm#0", "relu#0", "addmm#1", "tanh#0"), skip=("_to_copy",)),
    ],
)
def test_weights_shared_under_autocast_are_right_or_refused(policy, layers):
    """The trap: autocast casts a weight once and remembers it, so that only the first layer that uses it calls the
    cast, and in the second run others do: `_to_copy#1` is then another tensor."""
    model = Albert().train()

    def train(plan):
        checkpointing.apply(model, plan)
        model.zero_grad()
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(hidden_states())
            output.float().square().sum().backward()
        finally:
            checkpointing.clear(model)
        return [param.grad.clone() for param in model.parameters()]

    expected = train(Plan(num_layers=3))
    plain = Plan(num_layers=3, groups=tuple((layer,) for layer in layers))
    try:
        found = train(plain.with_policies(keep=policy.keep, skip=policy.skip))
    except (RecomputeMismatch, SkippedButNeeded):
        return
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor and torch.equal(one, other)
