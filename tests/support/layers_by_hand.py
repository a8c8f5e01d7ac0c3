"""Models whose layers are written by hand, and the calls inside of them."""

from __future__ import annotations

import toys

from gcbench.plan.policies.layer_calls import inner_calls

BATCH_SIZE, SEQ_LEN = 2, 4
ROWS = BATCH_SIZE * SEQ_LEN
WIDTH, INNER = toys.WIDTH, toys.INNER["a"]
FP32 = 4


def toy_of(forward, kinds="aaa"):
    """A model whose layers do that; `forward` takes the layer and its hidden states."""

    class Layer(toys.Layer):
        def forward(self, hidden_states, masks):
            return forward(self, hidden_states)

    class Toy(toys.Toy):
        layer = Layer

    return toys.predictor(lambda: Toy(kinds))


def calls_of(forward):
    """The calls of the middle one of three layers."""
    fake_model = toy_of(forward).fake_model
    return inner_calls(fake_model, (0, 1, 2), batch_size=BATCH_SIZE, seq_len=SEQ_LEN)[1]


def named(calls):
    assert len({call.name for call in calls}) == len(calls)
    return {call.name: call for call in calls}


def reads(calls, name):
    """The names of the calls that one reads, whatever views lie between."""

    def of(number):
        found = set()
        for earlier in calls[number].reads:
            found |= of(earlier) if calls[earlier].is_view else {calls[earlier].name}
        return found

    return of([call.name for call in calls].index(name))


def needed(calls):
    """The calls whose memory the backward pass reads, directly or through a view."""

    def source(number):
        call = calls[number]
        return {number} if not call.is_view else {part for earlier in call.reads for part in source(earlier)}

    return {calls[part].name for number, call in enumerate(calls) if call.needed for part in source(number)}


def mlp(layer, hidden):
    return hidden + layer.down(layer.up(hidden).relu()).tanh()
