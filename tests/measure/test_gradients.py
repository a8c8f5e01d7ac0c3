"""The proof that a setting changes memory and not the gradients: exact on equality, fair on a difference, and alarmed
by a recompute that goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from torch.utils import checkpoint as torch_checkpoint

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.gradient_fingerprint import SKETCH_SIZE, Fingerprint, difference, pack, unpack
from gcbench.core.records import SCHEMA, Cell, Lora, Outcome, Report, Workload
from gcbench.job.describe import DescribeTask
from gcbench.job.describe_worker import describe
from gcbench.measure import take_fingerprint, worker
from gcbench.measure.task import MeasureTask
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.processes.messages import Answer
from gcbench.report import rows as tables
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")


SHAPES = {"embedding.weight": (300, 64), "layer.weight": (64, 256), "layer.bias": (256,), "norm.weight": (64,)}
BEYOND_A_CHUNK = take_fingerprint._CHUNK + 3 * SKETCH_SIZE + 5


class Model(torch.nn.Module):
    """Parameters with the gradients it is given, and nothing else."""

    def __init__(self, grads: dict[str, torch.Tensor | None]) -> None:
        super().__init__()
        for name, grad in grads.items():
            shape = () if grad is None else grad.shape
            dtype = torch.float32 if grad is None else grad.dtype
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
            parameter.grad = grad
            self.register_parameter(name.replace(".", "_"), parameter)


def fingerprint(grads: dict[str, torch.Tensor | None], *, step: int = 0, seed: int = 0) -> Fingerprint:
    return take_fingerprint.take(Model(grads), step=step, seed=seed)


def random_grads(seed: int = 0) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def norm(grads: dict[str, torch.Tensor | None]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values() if g is not None))


# Equality


def test_identical_gradients_have_equal_checksums_and_no_difference():
    ours, theirs = fingerprint(random_grads()), fingerprint(random_grads())
    assert ours == theirs
    assert difference(ours, theirs).relative == 0.0
    assert difference(ours, theirs).worst is None


@pytest.mark.parametrize("bit", [0, 15, 31])
@pytest.mark.parametrize(
    "place", [0, 1, SKETCH_SIZE, take_fingerprint._CHUNK - 1, take_fingerprint._CHUNK, BEYOND_A_CHUNK - 1]
)
def test_one_flipped_bit_changes_the_checksum(place, bit):
    """The trap: a sum of floats, which a last bit does not reach."""
    grad = torch.randn(BEYOND_A_CHUNK, generator=torch.Generator().manual_seed(0))
    before = fingerprint({"w": grad}).checksum
    grad.view(torch.int32)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert fingerprint({"w": grad}).checksum != before


def test_two_elements_that_change_places_change_the_checksum():
    grad = torch.arange(1000, dtype=torch.float32)
    swapped = grad.clone()
    swapped[[3, 700]] = grad[[700, 3]]
    assert fingerprint({"w": grad}).checksum != fingerprint({"w": swapped}).checksum


def test_two_parameters_that_change_places_change_the_checksum():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert fingerprint({"a": a, "b": b}).checksum != fingerprint({"a": b, "b": a}).checksum


def test_zero_and_minus_zero_are_not_bit_identical():
    assert fingerprint({"w": torch.zeros(5)}).checksum != fingerprint({"w": -torch.zeros(5)}).checksum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_read_bit_by_bit(dtype):
    grad = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = fingerprint({"w": grad})
    assert ours == fingerprint({"w": grad.clone()})
    changed = grad.clone()
    changed.view(take_fingerprint._WORDS[dtype.itemsize])[299] ^= 1
    assert fingerprint({"w": changed}).checksum != ours.checksum
    squared = sum(x * x for x in unpack(ours.parameters[0].sketch))
    assert squared == pytest.approx(float(grad.double().square().sum()), rel=0.6)


@pytest.mark.parametrize(
    "layout",
    [
        lambda g: g.t().contiguous().t(),
        lambda g: torch.stack([g, g], dim=-1)[..., 0],
    ],
    ids=["transposed", "strided"],
)
def test_a_gradient_with_gaps_or_another_order_is_read_whole(layout):
    """The trap: `view` on a layout that is not dense, or a read that stops at the storage's length."""
    grad = layout(torch.randn(40, 60, generator=torch.Generator().manual_seed(0)))
    assert not grad.is_contiguous()
    ours = fingerprint({"w": grad})
    assert ours == fingerprint({"w": grad.clone(memory_format=torch.preserve_format)})
    changed = grad.clone(memory_format=torch.preserve_format)
    changed[39, 59] += 1
    found = difference(fingerprint({"w": changed}), ours)
    assert found.relative == pytest.approx(1 / norm({"w": grad}), rel=0.25)


def test_no_gradient_is_named():
    prints = fingerprint({"with": torch.ones(3), "without": None})
    assert prints.missing == ("without",)
    assert [p.name for p in prints.parameters] == ["with"]


def test_a_frozen_parameter_is_not_missing():
    model = Model({"trained": torch.ones(3), "frozen": None})
    model.frozen.requires_grad_(False)
    assert take_fingerprint.take(model, step=0, seed=0).missing == ()


def test_a_lost_gradient_is_an_infinite_difference():
    whole, part = fingerprint({"a": torch.ones(3), "b": torch.ones(3)}), fingerprint({"a": torch.ones(3), "b": None})
    assert difference(part, whole).relative == difference(whole, part).relative == math.inf
    assert difference(part, whole).worst == "b"


def test_another_step_cannot_be_compared():
    ours, theirs = fingerprint(random_grads(), step=1), fingerprint(random_grads(), step=0)
    assert ours.checksum != theirs.checksum
    assert difference(ours, theirs).relative == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_never_a_small_difference(value):
    """The trap: comparisons with NaN are false, so `difference > tolerance` lets everything through; and two cells
    whose gradients are all NaN are bit-identical, which proves nothing."""
    good, bad = random_grads(), random_grads()
    bad["layer.bias"][7] = value
    assert fingerprint(good).is_finite and not fingerprint(bad).is_finite
    for a, b in ((good, bad), (bad, good), (bad, bad)):
        found = difference(fingerprint(a), fingerprint(b)).relative
        assert math.isnan(found) or found == math.inf


def test_a_sketch_survives_being_stored():
    values = [0.1, -1e300, 5e-324, math.inf, 0.0]
    assert list(unpack(pack(values))) == values


# The estimate


def noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def low_rank(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape)
    return torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)


def one_row(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    change = torch.zeros(shape)
    change[shape[0] // 2] = torch.randn(shape[1:], generator=generator)
    return change


def constant(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("kind", [noise, low_rank, one_row, constant])
def test_the_estimate_is_within_a_quarter_of_the_truth(kind, size, seed):
    """The trap: signs shared by neighbours, under which a difference that is the same everywhere cancels out."""
    generator = torch.Generator().manual_seed(100 + seed)
    grads = random_grads(seed)
    change = {name: size * kind(shape, generator) for name, shape in SHAPES.items()}
    changed = {name: grad + change[name] for name, grad in grads.items()}
    found = difference(fingerprint(changed, seed=seed), fingerprint(grads, seed=seed))
    truth = norm(change) / norm(grads)
    assert found.relative == pytest.approx(truth, rel=0.25)


def test_the_worst_parameter_is_named():
    grads, changed = random_grads(), random_grads()
    changed["layer.bias"] += 3.0
    changed["norm.weight"] += 0.001
    assert difference(fingerprint(changed), fingerprint(grads)).worst == "layer_bias"


def test_a_step_does_not_depend_on_what_was_drawn_before_it(tmp_path):
    """The trap: dropout masks from a generator that a library has used in one process and not in the other."""
    source = sources.resolve(str(tiny.write_model(tmp_path, "gpt2")))
    config = models.build_config(source, layers=None, overrides={})
    found = []
    for drawn in (0, 7):
        model = models.build(source, config, device="cpu", dtype=torch.float32, attn_implementation=None, seed=0)
        batch = training.random_batch(model, batch_size=2, seq_len=16, seed=0)
        step = training.TrainingStep(model, batch=batch, precision="fp32", optim="sgd", seed=0)
        prints: list[Fingerprint] = []

        def take(phase: str, model: torch.nn.Module = model, prints: list[Fingerprint] = prints) -> None:
            if phase == "optimizer":
                prints.append(take_fingerprint.take(model, step=len(prints), seed=0))

        for _ in range(2):
            torch.rand(drawn)
            step(take)
        found.append(prints)
    assert found[0] == found[1]
    assert found[0][0].parameters != found[0][1].parameters


# The alarm, end to end


@pytest.fixture
def measured(tmp_path) -> Callable[..., dict[str, tables.Row]]:
    """`measured("gpt2")` is the table of off and per-layer as a run would make it, measured in this process."""

    def measure(
        family: str, spoil: Callable[[], None] = lambda: None, lora: Lora | None = None
    ) -> dict[str, tables.Row]:
        source = sources.resolve(str(tiny.write_model(tmp_path / family, family)))
        described = describe(DescribeTask(device="cpu", source=source, lora=lora))
        workload = Workload(
            model=source.name, device="cpu", batch_size=2, seq_len=32, precision="fp32", optim="adamw_torch"
        )
        answers: dict[str, Answer] = {}
        outcomes = []
        for strategy in ("off", "per-layer"):
            plan = strategies.parse(strategy).plan_for(tiny.NUM_LAYERS)
            cell = Cell(workload=workload, strategy=strategy)
            if strategy != "off":
                spoil()
            answer = worker.measure(measure_task(cell, source, plan, lora), lambda event: None)
            assert answer.failure is None, answer.failure
            answers[strategy] = answer
            compared = difference(answer.fingerprint, answers["off"].fingerprint)
            result = replace(answer.result, grad_rel_diff=compared.relative, grad_worst_param=compared.worst)
            outcomes.append(Outcome(cell=cell, layers_checkpointed=plan.layers_checkpointed, rounds=(result,)))
        report = Report(
            schema=SCHEMA,
            gcbench_version="0",
            command="",
            created="",
            settings={},
            machine=described.machine,
            model=described.facts,
            outcomes=tuple(outcomes),
        )
        return {row.strategy: row for row in tables.rows(report)}

    return measure


def measure_task(cell: Cell, source: sources.ModelSource, plan: strategies.Plan, lora: Lora | None) -> MeasureTask:
    return MeasureTask(
        cell=cell,
        round=0,
        source=source,
        layers=None,
        overrides={},
        attn_implementation=None,
        plan=plan,
        seed=0,
        warmup=1,
        steps=1,
        least_timed_s=0.0,
        with_memory=True,
        turn=0,
        memory_limit_bytes=None,
        lora=lora,
    )


def test_a_right_recompute_passes(measured):
    rows = measured("gpt2")
    assert rows["per-layer"].proof == "identical"
    assert rows["per-layer"].memory_saved_frac > 0


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_a_recompute_with_other_dropout_masks_is_caught(measured, monkeypatch, lora):
    """The trap: the losses agree to the last digit, and the gradients are another model's.

    With adapters, half of the gradients are zero in the first step, because the second matrices begin at zero.
    """

    def spoil() -> None:
        careless = partial(torch_checkpoint.checkpoint, preserve_rng_state=False)
        monkeypatch.setattr(checkpointing, "checkpoint", careless)

    row = measured("gpt2", spoil, lora)["per-layer"]
    assert row.grad_rel_diff > 0.01
    assert row.proof.startswith("FAILED: the gradients differ from off by")
    assert row.memory_saved_frac is None and row.time_overhead_frac is None
    assert "no saving is shown" in row.message
    assert row.layers_recomputed == tiny.NUM_LAYERS  # all of them, and wrongly: counting alone is no proof


def test_a_layer_that_is_not_recomputed_is_caught(measured, monkeypatch):
    """The trap: a flag that the model's code clears or never reads. Gradients are right, and so is the time."""

    def spoil() -> None:
        apply = checkpointing.apply

        def apply_in_vain(model, plan):
            counter = apply(model, plan)
            for layer in checkpointing.checkpointable_layers(model)[1:]:
                layer.gradient_checkpointing = False
            return counter

        monkeypatch.setattr(checkpointing, "apply", apply_in_vain)

    row = measured("llama", spoil)["per-layer"]
    assert row.grad_rel_diff == 0.0
    assert row.proof.startswith("FAILED: recomputed 1 of 4 layers")
    assert row.memory_saved_frac is None and row.time_overhead_frac is None


def test_a_parameter_that_loses_its_gradient_is_caught(measured, monkeypatch):
    """The reentrant variant's trap: inputs without a gradient, and the layers after them are not trained."""

    def spoil() -> None:
        take = take_fingerprint.take

        def take_without_first(model, **kwargs):
            next(model.parameters()).grad = None
            return take(model, **kwargs)

        monkeypatch.setattr(take_fingerprint, "take", take_without_first)

    row = measured("llama", spoil)["per-layer"]
    assert row.proof.startswith("FAILED: 1 parameter got no gradient")
    assert row.memory_saved_frac is None
