"""The decision for real models, on this CPU and on catalogue cards; every lever is checked by a prediction."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import planned
import pytest

from gcbench.core.records import Lora
from gcbench.core.units import MIB
from gcbench.devices.cards import find
from gcbench.devices.target import Target
from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import AS_FAST_FRAC
from gcbench.plan.search import planner as search
from gcbench.plan.search.levers import Trial, levers
from gcbench.plan.search.planner import Planner
from gcbench.plan.task import PlanTask
from gcbench.predict.task import CellToPredict
from gcbench.predict.worker import Session
from gcbench.simulate.costs import CardFigures
from gcbench.simulate.predictor import Predictor
from gcbench.simulate.trace.fake_model import NotComposable
from gcbench.strategies import OFF, parse

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LAYERS = 2
FIGURES = CardFigures(None)
"""By launches: more sequences at a time are worth recomputing for."""


def task(target, *, family="llama", specs=(OFF, "per-layer"), **changes):
    return PlanTask(
        **{
            "source": planned.source_of(family),
            "layers": LAYERS,
            "overrides": {},
            "attn_implementation": None,
            "lora": None,
            "precision": "fp32",
            "optim": "adamw_torch",
            "target": target,
            "seq_len": 32,
            "named": tuple((spec, parse(spec).plan_for(LAYERS)) for spec in specs),
            "batch_sizes": None,
            "reserve_frac": 0.0,
            "layers_in_order": None,
            "can_checkpoint": True,
            "device_here": None,
        }
        | changes
    )


def cpu(memory_bytes):
    return Target(kind="cpu", name="cpu", memory_bytes=memory_bytes)


@pytest.fixture(autouse=True)
def few_policies(monkeypatch):
    monkeypatch.setattr(search, "_MOST_POLICIES", 2)


def peak(asked, plan, batch_size):
    """Bytes that count against the target's memory, by a session of its own."""
    return peaks(asked, plan, batch_size)[0]


def peaks(asked, plan, *batch_sizes):
    session, found = Session(asked.as_predictions()), []
    for batch in batch_sizes:
        memory = session.predict(CellToPredict(number=0, batch_size=batch, seq_len=asked.seq_len, plan=plan)).memory
        found.append(memory.process_bytes if asked.target.kind == "cuda" else memory.allocated_bytes)
    return found


def changed(asked, plan, flag):
    """The workload and the plan with a lever's flag applied."""
    name, _, value = flag.removeprefix("--").partition(" ")
    if name == "strategies":
        assert value.endswith("+offload")
        return asked, plan.with_policies(offload=True)
    if name == "expandable-segments":
        return replace(asked, target=replace(asked.target, expandable_segments=True)), plan
    if name == "lora-r":
        return replace(asked, lora=Lora(r=int(value))), plan
    return replace(asked, **{name.replace("-", "_"): value}), plan


def assert_levers(asked, decision, expected, *, of=lambda lever: lever.flag is not None):
    """The levers are `expected`, the best first; each that has a flag is what a prediction with that flag says.

    `of` those that are predicted.
    """
    shown = decision.choice or decision.smallest
    levers = decision.levers
    assert {lever.name for lever in levers} == expected
    assert [lever.peak_bytes for lever in levers] == sorted(lever.peak_bytes for lever in levers)
    for lever in levers:
        assert lever.peak_bytes < 0.995 * shown.peak_bytes
        assert lever.fits == (lever.peak_bytes <= decision.usable_bytes)
        if of(lever):
            assert peak(*changed(asked, shown.plan, lever.flag), shown.batch_size) == lever.peak_bytes, lever


EIGHT_BIT, CHUNKS, FUSED = "an 8-bit AdamW", "a loss computed in 8 chunks", "the fused optimizer"
MIXED_FLAG = "--precision bf16-mixed"
ADAPTERS, MIXED, BF16 = "LoRA adapters of rank 16 instead of full fine-tuning", "mixed precision", "weights in bf16"


def test_levers_where_the_optimizer_sets_the_peak():
    """A single short sequence: the optimizer is most of the peak, and the loss none of it."""
    asked = task(cpu(10**9), seq_len=8, batch_sizes=(1,), specs=(OFF,), can_checkpoint=False)
    decision = Planner(asked, FIGURES).decide()
    assert decision.choice.strategy == OFF and decision.choice.peak_phase == "optimizer"
    assert_levers(asked, decision, {EIGHT_BIT, FUSED, ADAPTERS, BF16})
    by_name = {lever.name: lever for lever in decision.levers}
    # Two states of 4 bytes become one byte each and 4 bytes for every 256, where tensors have 4096 elements; the
    # temporaries of adamw_torch are not in an 8-bit step, as they are not in the fused one.
    model = planned.model_of("llama", "fp32", LAYERS)
    quantised = sum(param.numel() for param in model.parameters() if param.numel() >= 4096)
    saved = by_name[FUSED].peak_bytes - by_name[EIGHT_BIT].peak_bytes
    assert saved == pytest.approx(quantised * 2 * (4 - 1 - 4 / 256), rel=0.01)


@pytest.mark.parametrize("exact", [False, True], ids=["few layers traced", "all traced"])
def test_an_8_bit_optimizer_is_the_same_whichever_adamw_is_requested(monkeypatch, exact):
    """The trap: states shrunk in a step that keeps the lists of temporaries of the foreach optimizer."""
    if exact:
        monkeypatch.setattr(Predictor, "_composed", _not_composable)
    found = set()
    for optim in ("adamw_torch", "adamw_torch_fused"):
        asked = task(cpu(10**9), seq_len=8, batch_sizes=(1,), specs=(OFF,), can_checkpoint=False, optim=optim)
        levers = {lever.name: lever for lever in Planner(asked, FIGURES).decide().levers}
        found.add(levers[EIGHT_BIT].peak_bytes)
        if FUSED in levers:
            assert levers[EIGHT_BIT].peak_bytes <= levers[FUSED].peak_bytes
    assert len(found) == 1


def _not_composable(*args):
    raise NotComposable("for the test")


def test_levers_where_the_logits_set_the_peak_and_memory_binds():
    asked = task(cpu(2 * MIB), family="opt", attn_implementation="eager")
    decision = Planner(asked, FIGURES).decide()
    choice = decision.choice
    assert choice.strategy != OFF and decision.binding.startswith("Memory limits the speed")
    assert choice.peak_bytes == peak(asked, choice.plan, choice.batch_size) <= 2 * MIB
    names = {lever.name for lever in decision.levers}
    assert CHUNKS in names and MIXED in names and FUSED not in names
    assert_levers(asked, decision, names, of=lambda lever: lever.flag in ("--attn-implementation sdpa", MIXED_FLAG))
    assert {"fused attention"} <= names
    logits = 32 * 256 * 4 * choice.batch_size
    by_name = {lever.name: lever for lever in decision.levers}
    assert choice.peak_bytes - by_name[CHUNKS].peak_bytes <= 3 * logits


# A card

CARD = find("t4")


def card(memory_bytes):
    return Target(kind="cuda", name=CARD.name, memory_bytes=memory_bytes, card=CARD)


def test_on_a_card_the_memory_of_the_process_has_to_fit(monkeypatch):
    """The traps: allocated memory counted in place of reserved memory, and the context forgotten."""
    monkeypatch.setattr(search, "levers", lambda *args, **kwargs: ())
    wide = task(card(CARD.memory_bytes), family="opt", seq_len=64, precision="bf16-mixed")
    first = Planner(wide, CardFigures(CARD))
    every = parse("per-layer").plan_for(LAYERS)
    top = first.evaluator.candidate("per-layer", every, 512)
    assert top.peak_bytes > top.allocated_bytes + 100 * MIB, "there is no context in it"
    # An allocator may need more for a smaller batch, where other blocks are left over.
    memory = max(first.evaluator.candidate("per-layer", every, batch).peak_bytes for batch in range(480, 513, 4))
    decision = first.limited(memory).decide()
    choice, asked = decision.choice, replace(wide, target=card(memory))
    assert choice.peak_bytes == peak(asked, choice.plan, choice.batch_size) <= memory
    for each in decision.candidates:
        if each.fits:
            assert each.peak_bytes <= memory
            assert each.tokens_per_s * (1 - AS_FAST_FRAC) <= choice.tokens_per_s
    largest = {each.strategy: each.batch_size for each in decision.largest}
    assert largest[SEARCHED] >= largest["per-layer"] >= 512 > largest[OFF]
    fitting, too_large = peaks(asked, every, largest["per-layer"], largest["per-layer"] + 1)
    assert fitting <= memory < too_large
    assert decision.times_from == f"the published rates of {CARD.full_name}"


@pytest.mark.parametrize(
    ("expandable", "expected"),
    [
        (False, {"expandable segments", "layer inputs offloaded to host memory", ADAPTERS, BF16}),
        (True, {"layer inputs offloaded to host memory", BF16}),
    ],
)
def test_levers_of_a_card(expandable, expected):
    """Expandable segments, and with them layer inputs in host memory. Without expandable segments a lever saves whole
    segments."""
    target = replace(card(CARD.memory_bytes), expandable_segments=expandable)
    asked = task(target, seq_len=64, specs=("per-layer",), can_checkpoint=False, optim="sgd")
    evaluator = Planner(asked, CardFigures(CARD)).evaluator
    plan = asked.named[0][1]
    shown = evaluator.candidate("per-layer", plan, 4096)
    step = evaluator.scaling(plan).traced(4096)
    with Trial(asked, shown) as trial:
        found = levers(asked, evaluator.session, shown, step, trial, usable=evaluator.usable)
    decision = SimpleNamespace(choice=shown, levers=found, usable_bytes=evaluator.usable)
    assert_levers(asked, decision, expected)


def test_levers_of_a_searched_plan_recompute_its_layers_fully():
    """The trap: a policy names calls of operators that adapters change, and the lever is silently lost."""
    asked = task(cpu(2**40), batch_sizes=(4,), specs=(OFF,))
    one = Planner(asked, FIGURES)
    plan = next(each for each in one.mixes.uniform if each.policies)
    shown = one.evaluator.candidate(SEARCHED, plan, 4, traced=True)
    step = one.evaluator.scaling(plan).traced(4)
    with Trial(asked, shown) as trial:
        found = levers(asked, one.evaluator.session, shown, step, trial, usable=None)
    by_name = {lever.name: lever for lever in found}
    lora = by_name[f"{ADAPTERS}, the same layers fully recomputed"]
    assert lora.peak_bytes == peak(replace(asked, lora=Lora(r=16)), replace(plan, policies=()), 4)
    fused = one.evaluator.session.predictor.with_optimizer(step, "adamw_torch_fused", steps_on_device=True)
    assert one.evaluator.session.weighed(fused)[0] == peak(replace(asked, optim="adamw_torch_fused"), plan, 4)


def test_tensors_that_exceed_the_device_need_no_replay_of_the_allocator():
    """The traps: a candidate that fits is reported not to; an exact peak is reported as a lower bound."""
    asked = task(card(64 * MIB + 2**30), seq_len=64, specs=(OFF,))
    evaluator = Planner(asked, CardFigures(CARD)).evaluator
    off = asked.named[0][1]
    sizes = (1, 64, 256, 1024, 4096)
    in_full = [evaluator.candidate(OFF, off, batch) for batch in sizes]
    assert [each.fits for each in in_full][::4] == [True, False]
    brief = Planner(asked, CardFigures(CARD)).evaluator.exact_up_to(1)
    for batch, expected in zip(sizes, in_full, strict=True):
        found = brief.candidate(OFF, off, batch)
        assert found.fits == expected.fits
        if found.peak_bytes != expected.peak_bytes:
            assert asked.target.memory_bytes < found.peak_bytes < expected.peak_bytes
    assert found.peak_bytes != expected.peak_bytes, "of the largest, nothing is replayed"
