"""What happens inside of layers, on layers by hand."""

from __future__ import annotations

import planned
import pytest
import torch
import toys
from layers_by_hand import BATCH_SIZE, FP32, INNER, ROWS, SEQ_LEN, WIDTH, calls_of, mlp, named, needed, reads, toy_of
from torch.nn import functional

from gcbench.plan.policies.layer_calls import inner_calls
from gcbench.plan.policies.layer_policies import uniform_plans
from gcbench.plan.policies.min_cut import Call, frontier
from gcbench.simulate import timeline
from gcbench.simulate.costs import CardFigures
from gcbench.simulate.trace.fake_model import NotComposable

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_small_layer_by_hand():
    """The traps: the input of a product, which is saved through a view; the product behind a relu, of which only the
    relu's output is saved; and the layer's own input, which is no call of it."""
    calls = calls_of(mlp)
    by_name = named(calls)
    assert {name for name in by_name if not by_name[name].is_view} == {
        "addmm#0",
        "relu#0",
        "addmm#1",
        "tanh#0",
        "add#0",
    }
    assert reads(calls, "addmm#0") == set()
    assert reads(calls, "relu#0") == {"addmm#0"}
    assert reads(calls, "addmm#1") == {"relu#0"}
    assert reads(calls, "tanh#0") == {"addmm#1"}
    assert reads(calls, "add#0") == {"tanh#0"}
    assert needed(calls) == {"relu#0", "tanh#0"}
    assert [by_name[name].nbytes for name in ("addmm#0", "relu#0", "addmm#1")] == [
        *(ROWS * INNER * FP32, ROWS * INNER * FP32, ROWS * WIDTH * FP32),
    ]
    assert by_name["addmm#0"].work.flops == 2 * ROWS * WIDTH * INNER
    assert not any(call.is_changed or call.is_random or call.is_in_place for call in calls)


def test_views_take_no_memory_and_lead_to_their_base():
    def forward(layer, hidden):
        one, other = layer.up(hidden).split(INNER // 2, dim=-1)
        return hidden + (one.sin() * other.cos()).sum(-1, keepdim=True)

    calls = calls_of(forward)
    by_name = named(calls)
    assert by_name["split#0"].is_view and by_name["split#0"].nbytes == 0
    assert by_name["split#0"].work.kind == "view"
    assert reads(calls, "sin#0") == reads(calls, "cos#0") == {"addmm#0"}
    assert reads(calls, "mul#0") == {"sin#0", "cos#0"}
    assert needed(calls) == {"addmm#0", "sin#0", "cos#0"}


def test_an_operator_with_several_outputs_is_one_call():
    """The traps: the bytes of the first output alone; needed only if the first output is."""

    def forward(layer, hidden):
        values, places = layer.up(hidden).topk(3, dim=-1)
        return hidden + values.sum(-1, keepdim=True) * places.sum(-1, keepdim=True)

    calls = calls_of(forward)
    by_name = named(calls)
    assert by_name["topk#0"].nbytes == ROWS * 3 * (FP32 + 8)
    assert reads(calls, "sum#0") == reads(calls, "sum#1") == {"topk#0"}
    assert by_name["topk#0"].needed  # its places are: gradients go back there
    assert by_name["sum#1"].needed and not by_name["addmm#0"].needed


def test_tensors_in_a_list_argument_are_read():
    calls = calls_of(lambda layer, hidden: hidden + torch.cat([hidden.sin(), hidden.cos()], dim=-1)[..., :WIDTH])
    assert reads(calls, "cat#0") == {"sin#0", "cos#0"}

    def picking(layer, hidden):
        places = hidden.detach().argmax(-1)
        return hidden + hidden.exp().flatten(0, 1)[places.flatten()].view_as(hidden)

    calls = calls_of(picking)
    assert reads(calls, "index#0") == {"exp#0", "argmax#0"}
    assert "argmax#0" in needed(calls)


# In place


def test_an_output_that_is_written_into_cannot_be_saved_and_is_read_through_the_writer():
    """The trap: the exponential of what was there before the sum."""

    def forward(layer, hidden):
        made = hidden * 3.0
        made += hidden.sin()
        return made.exp()

    calls = calls_of(forward)
    by_name = named(calls)
    assert by_name["mul#0"].is_changed and not by_name["mul#0"].is_in_place
    assert by_name["add_#0"].is_in_place and not by_name["add_#0"].is_view and by_name["add_#0"].nbytes == 0
    assert reads(calls, "add_#0") == {"mul#0", "sin#0"}
    assert reads(calls, "exp#0") == {"add_#0"}
    assert not by_name["sin#0"].is_changed and not by_name["exp#0"].is_changed


def test_a_write_changes_every_output_in_the_storage():
    """The trap: of a tensor that is filled half by half, only the last half taken for what was written into; the plan
    keeps the empty tensor, and each step ends with `SavedOutputMutated`."""

    def forward(layer, hidden):
        made = hidden.new_empty(*hidden.shape[:-1], 2 * WIDTH)
        before = made.sum()
        made[..., :WIDTH] = hidden.sin()
        made[..., WIDTH:] = hidden.cos()
        return hidden + made.exp()[..., :WIDTH].tanh() + before

    calls = calls_of(forward)
    by_name = named(calls)
    assert by_name["new_empty#0"].is_changed
    assert reads(calls, "copy_#1") == {"copy_#0", "cos#0"}
    assert reads(calls, "exp#0") == {"copy_#1"}
    assert not by_name["sum#0"].is_changed
    plans = uniform_plans(toy_of(forward).fake_model, (0, 1, 2), CardFigures(None), seq_len=SEQ_LEN, most=8)
    kept = {name.partition("#")[0] for plan in plans for policy in plan.policies for name in policy.keep}
    assert "exp" in kept and not kept & {"new_empty", "copy_", "slice"}


# Random numbers


def test_calls_that_draw_random_numbers_are_marked():
    """Dropout draws them; attention is marked as if it did, and does with dropout alone."""
    calls = calls_of(lambda layer, hidden: functional.dropout(hidden, 0.1) + torch.rand_like(hidden))
    assert [call.is_random for call in calls if call.name.startswith(("bernoulli_", "native_dropout", "rand"))] == [
        *(True, True),
    ]
    calls = calls_of(lambda layer, hidden: functional.dropout(hidden, 0.0) + hidden.sin())
    assert not any(call.is_random for call in calls)

    def attending(layer, hidden):
        heads = hidden.unsqueeze(1)
        return functional.scaled_dot_product_attention(heads, heads, heads).squeeze(1)

    calls = calls_of(attending)
    (attention,) = [call for call in calls if call.work.kind == "attention"]
    assert not attention.is_random and attention.needed


# Layers that cannot be looked into


def test_a_layer_that_runs_twice_or_never_cannot_be_traced_by_itself():
    class Twice(toys.Toy):
        def run(self, hidden, masks):
            return super().run(super().run(hidden, masks), masks)

    class Never(toys.Toy):
        def run(self, hidden, masks):
            for layer in self.layers[:-1]:
                hidden = layer(hidden, masks)
            return hidden

    for model in (Twice, Never):
        fake_model = toys.predictor(lambda model=model: model("aaa")).fake_model
        with pytest.raises(NotComposable):
            inner_calls(fake_model, (0, 1, 2), batch_size=BATCH_SIZE, seq_len=SEQ_LEN)


def test_tracing_leaves_the_layers_as_they_were():
    one = toys.predictor(toys.Toy)
    plan = toys.plan(6, (0, 3))
    before = one.step(plan, batch_size=2, seq_len=4)
    inner_calls(one.fake_model, (0, 1, 5), batch_size=3, seq_len=4)
    assert not any("forward" in vars(layer) for layer in one.fake_model.layers)
    after = one.step(plan, batch_size=2, seq_len=4)
    assert timeline.exact(after.timeline) == timeline.exact(before.timeline)


# The policies that follow


def test_a_first_layer_with_other_calls_has_policies_of_its_own():
    """The trap: Mamba's first layer gets bf16 hidden states and the others fp32 ones, so that `_to_copy#1` is another
    call; what one skips, the other needs."""
    for plan in planned.found_plans("mamba", "bf16"):
        assert plan.policies[1] == plan.policies[2]
    assert any(plan.policies[0] != plan.policies[1] for plan in planned.found_plans("mamba", "bf16"))
    for plan in planned.found_plans("llama", "bf16"):
        assert len(set(plan.policies)) == 1


def test_every_kind_of_layer_has_policies_of_its_own():
    one = toys.predictor(lambda: toys.Toy("abacab"))
    plans = uniform_plans(one.fake_model, range(6), planned.Traffic(), seq_len=SEQ_LEN, most=4)
    assert 1 < len(plans) <= 4
    for plan in plans:
        assert plan.policies[0] == plan.policies[2] == plan.policies[4]
        assert plan.policies[1] == plan.policies[5]


def test_every_call_that_nothing_needs_is_skipped():
    """All but views and what leads to something saved that is not kept: the second run asks for each kept output once
    more and so goes on to the last, past calls that only led on from there."""
    fake_model = toys.predictor(lambda: toys.Toy("aaa")).fake_model
    calls = inner_calls(fake_model, (0, 1, 2), batch_size=4, seq_len=SEQ_LEN)[1]
    last = uniform_plans(fake_model, range(3), planned.Traffic(), seq_len=SEQ_LEN, most=8)[-1].policies[1]
    assert (set(last.keep), needed(calls) - set(last.keep)) == ({"relu#0", "tanh#0"}, {"mul#0"})
    again = {"mul#0"}
    for call in reversed(calls):
        if call.name in again:
            again |= {calls[number].name for number in call.reads} - set(last.keep)
    assert set(last.skip) == {call.name for call in calls if not call.is_view} - set(last.keep) - again
    assert last.skip


def test_policies_are_those_of_the_frontier_from_the_fewest_bytes_on():
    fake_model = toys.predictor(lambda: toys.Toy("aaa")).fake_model
    calls = inner_calls(fake_model, (0, 1, 2), batch_size=4, seq_len=SEQ_LEN)[1]
    figures = planned.Traffic()
    weighed = [
        Call(
            name=call.name,
            seconds=figures.seconds(call.work),
            nbytes=call.nbytes,
            reads=call.reads,
            needed=call.needed,
            can_keep=not (call.is_view or call.is_in_place),
            must_run=False,
        )
        for call in calls
    ]
    plans = uniform_plans(fake_model, range(3), figures, seq_len=SEQ_LEN, most=8)
    corners = frontier(weighed)
    assert not corners[0].keep and corners[-1].seconds == 0, "which recomputing everything and nothing are as good as"
    expected = [tuple(calls[number].name for number in found.keep) for found in corners[1:-1]]
    assert [plan.policies[1].keep for plan in plans] == expected
    kept = [sum(named(calls)[name].nbytes for name in plan.policies[1].keep) for plan in plans]
    assert kept == sorted(kept)
