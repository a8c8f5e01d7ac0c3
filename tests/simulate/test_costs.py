"""The work of operators and the time it takes, against sums by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench import strategies
from gcbench.devices.cards import Card, cards, find
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.simulate import costs
from gcbench.simulate.costs import LAUNCH_S, CardFigures, Work, total
from gcbench.simulate.op_work import of_call
from gcbench.simulate.predictor import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16 = 4, 2


class Works(TorchDispatchMode):
    """Collects the work of each operator."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.noted.append(of_call(func, args, kwargs or {}, result))
        return result


def works_of(run):
    with Works() as works:
        run()
    return works.noted


def work_of(run):
    (work,) = works_of(run)
    return work


def seen(work):
    return work.op, work.kind, work.dtype, work.nbytes, work.flops, work.dims


# Work, by hand


def test_products():
    """(m, k) x (k, n): twice m n k operations; both factors and the result, and a bias, once each."""
    a, b, bias = torch.ones(3, 5), torch.ones(5, 7), torch.ones(7)
    read_and_written = 3 * 5 + 5 * 7 + 3 * 7
    assert seen(work_of(lambda: a @ b)) == ("mm", "matmul", "fp32", FP32 * read_and_written, 2 * 105, (1, 3, 7, 5))
    assert seen(work_of(lambda: torch.addmm(bias, a, b))) == (
        *("addmm", "matmul", "fp32", FP32 * (read_and_written + 7), 2 * 105, (1, 3, 7, 5)),
    )
    a, b = a.bfloat16(), b.bfloat16()
    assert seen(work_of(lambda: a @ b)) == ("mm", "matmul", "bf16", BF16 * read_and_written, 2 * 105, (1, 3, 7, 5))


def test_products_of_batches():
    a, b, more = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.ones(2, 3, 7)
    read_and_written = 2 * (3 * 5 + 5 * 7 + 3 * 7)
    assert seen(work_of(lambda: torch.bmm(a, b))) == (
        *("bmm", "matmul", "fp32", FP32 * read_and_written, 2 * 2 * 105, (2, 3, 7, 5)),
    )
    assert seen(work_of(lambda: torch.baddbmm(more, a, b))) == (
        *("baddbmm", "matmul", "fp32", FP32 * (read_and_written + 2 * 3 * 7), 2 * 2 * 105, (2, 3, 7, 5)),
    )


def test_a_transposed_factor_is_the_same_product():
    """The trap: dimensions read from the weight's layout in memory."""
    a, weight = torch.ones(3, 5), torch.ones(7, 5)
    noted = works_of(lambda: a @ weight.t())
    assert [work.kind for work in noted] == ["view", "matmul"]
    assert (noted[1].dims, noted[1].flops) == ((1, 3, 7, 5), 2 * 105)


def test_grouped_products_of_experts():
    """Each token goes through one of the groups, and none through all."""
    tokens, weights = torch.ones(16, 8).bfloat16(), torch.ones(4, 8, 24).bfloat16()
    offsets = torch.tensor([4, 8, 12, 16], dtype=torch.int32)
    work = work_of(lambda: torch._grouped_mm(tokens, weights, offs=offsets))
    assert (work.op, work.kind, work.dims, work.flops) == ("_grouped_mm", "matmul", (1, 16, 24, 8), 2 * 16 * 24 * 8)
    assert work.nbytes == BF16 * (16 * 8 + 4 * 8 * 24 + 16 * 24) + 4 * offsets.element_size()


def attention(is_causal, dtype=torch.float32):
    """The works of attention's two passes; 2 sequences, 4 heads, 6 queries for 10 keys (or 6 for 6), of size 8."""
    keys = 6 if is_causal else 10
    query = torch.ones(2, 4, 6, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.ones(2, 4, keys, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    made = []
    forward = works_of(lambda: made.append(scaled_dot_product_attention(query, key, value, is_causal=is_causal)))
    backward = works_of(lambda: made[0].sum().backward())
    return [work for work in (*forward, *backward) if work.kind == "attention"]


def test_attention():
    """Two products of (queries, keys) with the head's size between them forward; five backward."""
    forward, backward = attention(False)
    flops = 2 * (2 * 2 * 4 * 6 * 10 * 8)
    assert (forward.flops, forward.dims, forward.is_causal) == (flops, (2, 4, 6, 10, 8), False)
    assert (backward.flops, backward.dims) == (flops * 5 // 2, (2, 4, 6, 10, 8))
    each = 2 * 4 * 8
    assert forward.nbytes == FP32 * (each * 6 + 2 * each * 10 + each * 6 + 2 * 4 * 6)
    assert (forward.op, backward.op) == (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )


def test_causal_attention_is_half_of_it():
    forward, backward = attention(True)
    flops = 2 * (2 * 2 * 4 * 6 * 6 * 8) // 2
    assert (forward.flops, forward.is_causal) == (flops, True)
    assert (backward.flops, backward.is_causal) == (flops * 5 // 2, True)


def test_pointwise_operators():
    a, row = torch.ones(3, 5), torch.ones(5)
    assert seen(work_of(lambda: a + a)) == ("add", "pointwise", "fp32", FP32 * 3 * 15, 0, ())
    assert seen(work_of(lambda: a.add_(row))) == ("add_", "pointwise", "fp32", FP32 * (15 + 5 + 15), 0, ())
    assert seen(work_of(lambda: a.bfloat16())) == ("_to_copy", "pointwise", "fp32", (FP32 + BF16) * 15, 0, ())
    assert seen(work_of(lambda: torch.zeros(4))) == ("zeros", "pointwise", "fp32", FP32 * 4, 0, ())


def test_a_list_of_tensors_is_read_whole():
    parts = [torch.ones(3, 5), torch.ones(4, 5)]
    assert work_of(lambda: torch.cat(parts)).nbytes == FP32 * 2 * 7 * 5


def test_a_broadcast_tensor_is_read_once():
    """The trap: a row that is broadcast over a thousand others counted as a thousand rows."""
    row = torch.ones(1, 5).expand(1000, 5)
    assert work_of(lambda: row + 1.0).nbytes == FP32 * (5 + 5000)


@pytest.mark.parametrize(
    "look",
    [
        lambda a: a.view(15),
        lambda a: a.t(),
        lambda a: a[1:],
        lambda a: a.expand(2, 3, 5),
        lambda a: a.split(1),
        lambda a: a.detach(),
    ],
)
def test_views_move_nothing(look):
    a = torch.ones(3, 5)
    assert [(work.kind, work.nbytes, work.flops) for work in works_of(lambda: look(a))] == [("view", 0, 0)]


def test_writing_into_a_tensor_is_no_view():
    """The trap: it returns its argument, as a view does."""
    a = torch.ones(3, 5)
    assert work_of(lambda: a.mul_(2.0)).kind == "pointwise"


# A card's figures, by hand

CARD = Card(
    name="x",
    memory_bytes=1,
    compute_capability="8.6",
    bandwidth_bytes_per_s=1e12,
    matmul_flops={"fp32": 10e12, "bf16": 100e12},
)


LARGE = (1, 2**17, 2**17, 2**20)
"""Rows, columns and depth of a product so large that only the share of large products remains."""
LONG = (1, 1, 10**9, 10**9, 64)
"""Attention so long that it reaches its full rate."""


def work(kind="pointwise", *, dtype="bf16", nbytes=0, flops=0, dims=None, op="x"):
    dims = dims or {"matmul": LARGE, "attention": LONG}.get(kind, ())
    return Work(op=op, kind=kind, dtype=dtype, nbytes=nbytes, flops=flops, dims=dims)


def test_traffic_products_and_attention():
    """Of the bandwidth 85 % and of that 80 % in eager mode; of the products 80 %, and of those 95 % for a large one."""
    figures = CardFigures(CARD)
    assert figures.seconds(work(nbytes=10**9)) == pytest.approx(1e9 / (0.8 * 0.85e12))
    assert figures.seconds(work("matmul", flops=10**12)) == pytest.approx(1e12 / (0.95 * 80e12), rel=1e-3)
    assert figures.seconds(work("matmul", dtype="fp32", flops=10**12)) == pytest.approx(1e12 / (0.95 * 8e12), rel=1e-3)
    assert figures.seconds(work("attention", flops=10**12)) == pytest.approx(1e12 / 80e12 / 0.85)


def test_arithmetic_and_traffic_of_a_product_overlap_in_part():
    """The root of the sum of squares: never below the longer of both, never above their sum."""
    figures = CardFigures(CARD)
    compute, traffic = 1e12 / (0.95 * 80e12), 1e10 / 0.85e12
    both = figures.seconds(work("matmul", flops=10**12, nbytes=10**10))
    assert both == pytest.approx((compute**2 + traffic**2) ** 0.5, rel=1e-3)
    assert max(compute, traffic) < both < compute + traffic


def test_nothing_is_faster_than_a_launch_and_a_view_launches_nothing():
    figures = CardFigures(CARD)
    for kind in ("pointwise", "matmul", "attention"):
        assert figures.seconds(work(kind, nbytes=8, flops=8)) == LAUNCH_S
    assert figures.seconds(work("view")) == 0.0
    assert figures.seconds(work(op="empty_like", nbytes=10**9)) == 0.0


def test_python_launches_every_call_and_a_policy_slowest():
    figures = CardFigures(CARD)

    def host(caller, kind="pointwise"):
        return figures.host_s(Work(op="x", kind=kind, dtype="bf16", nbytes=1, caller=caller))

    assert 0 < host("model", "view") < host("model")
    assert host("policy") > host("checkpoint") > host("backward") > 0


def test_measured_rates_take_precedence_over_the_datasheet():
    """Of one precision; the others stay at their share of the datasheet."""
    card = Card(
        name="x",
        memory_bytes=1,
        bandwidth_bytes_per_s=1e12,
        achievable_bandwidth_bytes_per_s=0.9e12,
        matmul_flops={"fp32": 10e12, "bf16": 100e12},
        achievable_matmul_flops={"bf16": 70e12},
    )
    figures = CardFigures(card)
    assert figures.bandwidth == 0.9e12
    assert figures.matmul_rate("bf16") == 70e12
    assert figures.matmul_rate("fp32") == pytest.approx(8e12)


def test_a_precision_that_is_not_published_runs_as_fp32():
    """bf16 on a V100, which has no tensor cores for it; and a table without fp32 still answers."""
    assert CardFigures(find("v100-32gb")).matmul_rate("bf16") == CardFigures(find("v100-32gb")).matmul_rate("fp32")
    only = Card(name="x", memory_bytes=1, bandwidth_bytes_per_s=1e12, matmul_flops={"fp16": 50e12})
    assert CardFigures(only).matmul_rate("bf16") == pytest.approx(40e12)


def test_attention_by_generation():
    found = {}
    for capability in ("7.5", "8.0", "9.0", None, "gfx942", "99.0"):
        card = Card(
            name="x",
            memory_bytes=1,
            compute_capability=capability,
            bandwidth_bytes_per_s=1e12,
            matmul_flops={"bf16": 100e12},
        )
        found[capability] = 1e12 / 80e12 / CardFigures(card).seconds(work("attention", flops=10**12))
    expected = {"7.5": 0.5, "8.0": 0.67, "9.0": 0.4, None: 0.5, "gfx942": 0.5, "99.0": 0.5}
    assert found == pytest.approx(expected)


UNKNOWN = {
    "no card": None,
    "memory alone": Card(name="y", memory_bytes=2**34),
    "no bandwidth": Card(name="y", memory_bytes=2**34, matmul_flops={"bf16": 1e12}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_card_has_the_rates_of_an_a100(name):
    """The traps: a division by a bandwidth of 0, and times of 0 without figures."""
    figures, a100 = CardFigures(UNKNOWN[name]), costs._UNKNOWN_CARD
    assert figures.seconds(work(nbytes=10**9)) == pytest.approx(1e9 / (0.8 * 0.85 * a100.bandwidth_bytes_per_s))
    assert figures.seconds(work("matmul", flops=10**12)) == pytest.approx(1e12 / (0.95 * 0.8 * 312e12), rel=1e-3)
    assert not figures.is_known


def test_figures_name_their_source():
    assert CardFigures(find("h100-sxm")).source == f"the published rates of {find('h100-sxm').full_name}"
    assert "A100" in CardFigures(None).source and "not known" in CardFigures(None).source
    assert CardFigures(UNKNOWN["memory alone"]).source == CardFigures(None).source


def test_every_card_of_the_catalogue_has_positive_times():
    for card in cards():
        figures = CardFigures(card)
        for kind in ("pointwise", "matmul", "attention"):
            for dtype in ("fp32", "bf16", "fp16", "int64", "none"):
                assert 0 < figures.seconds(work(kind, dtype=dtype, nbytes=10**9, flops=10**12)) < 10


def test_a_total_counts_equal_works_as_often_as_they_occur():
    figures = CardFigures(CARD)
    one, other = work(nbytes=10**9), work("matmul", flops=10**12)
    assert total([one, other, one], figures) == pytest.approx(2 * figures.seconds(one) + figures.seconds(other))
    assert total([], figures) == 0.0


# A step

SLOW = CardFigures(
    Card(name="slow", memory_bytes=1, bandwidth_bytes_per_s=1e9, matmul_flops={"fp32": 1e10}, compute_capability="8.0")
)
"""So slow that launches do not matter."""


def predictor_of(*, exact=False):
    source = ModelSource(name="llama", origin="", config=tiny.CONFIGS["llama"], location="")
    meta = models.build_meta(models.build_config(source, layers=3, overrides={}), dtype=torch.float32)
    return Predictor(meta, precision="fp32", optim="adamw_torch", exact=exact)


@pytest.fixture(scope="module")
def predictor():
    return predictor_of()


def seconds(predictor, spec, *, batch_size=2, figures=SLOW):
    plan = strategies.parse(spec).plan_for(3)
    return predictor.step(plan, batch_size=batch_size, seq_len=16).seconds(figures)


def test_a_step_takes_longer_with_more_sequences_and_with_more_recomputed(predictor):
    off, again, part = (seconds(predictor, spec) for spec in ("off", "per-layer", "first:1"))
    assert off < part < again < 1.5 * off
    assert again - off == pytest.approx(3 * (part - off), rel=0.01)
    assert seconds(predictor, "off", batch_size=4) > 1.3 * off
    by_launches = CardFigures(None)
    assert seconds(predictor, "per-layer", figures=by_launches) > seconds(predictor, "off", figures=by_launches)


def test_the_optimizer_is_part_of_a_step(predictor):
    """Whether a step was traced in a few layers or in full; the update of all parameters, not of those traced."""
    step = predictor.step(strategies.parse("off").plan_for(3), batch_size=2, seq_len=16)
    passes = sum(total(works, SLOW) for _, works in step.works)
    update = step.seconds(SLOW) - passes
    num_params = sum(param.numel() for param in predictor.fake_model.parameters)
    # Gradient, weight and two states are read, and all but the gradient written: 7 numbers of 4 bytes, at least.
    assert update > 7 * FP32 * num_params / SLOW.bandwidth
    full = predictor_of(exact=True).step(strategies.parse("off").plan_for(3), batch_size=2, seq_len=16)
    assert full.seconds(SLOW) == pytest.approx(step.seconds(SLOW), rel=0.01)
