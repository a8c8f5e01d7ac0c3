"""Synthetic predictions: cells with chosen peaks, levers and terms, as `gcbench predict` would have stored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fixtures_report import CHECKPOINTED, peaks, report, workload

from gcbench.core.memory_peaks import MemoryPeaks
from gcbench.core.prediction import Curve, Explanation, LayerShare, Lever, Prediction, Share, Term
from gcbench.core.records import Cell, Failure, FailureKind, Machine, ModelFacts, Outcome, Report, Workload
from gcbench.core.units import GIB, MIB

LAYERS = 12
CARD = workload(model="some-llama", device="example-card", batch=2, seq=4096, precision="bf16")
LOSS = "loss and logits, backward"
CONTEXT = Term(name="CUDA context", nbytes=400 * MIB, in_allocator=False, source="measured by others: example.org/1")
WORKSPACE = Term(name="cuBLAS workspace", nbytes=8 * MIB, in_allocator=True, source="CublasHandlePool.cpp")
UNTRACEABLE: tuple[FailureKind, str] = (
    "unsupported",
    "its code reads values of tensors; measure it with gcbench run",
)


def curve(memory: MemoryPeaks, standing: int, *, points: int = 60) -> Curve:
    """Kept activations that grow to the highest of the passes and fall again, on what stands there all the time."""
    half, end = points // 3, points - points // 6
    up = memory.backward_bytes - standing
    rise = [up * point // half for point in range(half)]
    fall = [up * (end - point) // (end - half) for point in range(half, end)]
    above = max(memory.optimizer_bytes - standing, 0)
    return Curve(
        kinds=("parameters", "kept activations", "temporaries"),
        nbytes=(
            (standing,) * points,
            (*rise, *fall, *[0] * (points - end)),
            (*[0] * end, *[above] * (points - end)),
        ),
        phases=(("forward", 0), ("backward", half), ("optimizer", end)),
    )


def prediction(
    memory: MemoryPeaks,
    *,
    limit: float | None = None,
    shares: Mapping[str, float] | None = None,
    kept: Sequence[tuple[int, int, float]] = (),
    levers: Mapping[str, float] | None = None,
    part: str = LOSS,
    op: str | None = "_log_softmax_backward_data",
    attention: Mapping[str, int] | None = None,
    terms: tuple[Term, ...] = (),
    layers_traced: int = 3,
    why_in_full: str | None = None,
    retries: int | None = None,
    standing: float = 1000,
) -> Prediction:
    """Sizes in MiB; without `shares`, all of the peak is of the logits."""
    needed = memory.allocated_bytes if memory.process_bytes is None else memory.process_bytes
    bound = None if limit is None else int(limit * MIB)
    return Prediction(
        memory=memory,
        limit_bytes=bound,
        spare_bytes=None if bound is None else bound - needed,
        num_alloc_retries=retries,
        terms=terms,
        attention=dict(attention or {}),
        layers_traced=layers_traced,
        why_in_full=why_in_full,
        explanation=Explanation(
            op=op,
            layer=None,
            part=part,
            shares=tuple(
                Share(kind=kind, nbytes=int(size * MIB))
                for kind, size in (shares or {"logits and loss": memory.allocated_bytes / MIB}).items()
            ),
            kept=tuple(LayerShare(first=first, last=last, nbytes=int(size * MIB)) for first, last, size in kept),
            levers=tuple(Lever(name=name, peak_bytes=int(peak * MIB)) for name, peak in (levers or {}).items()),
        ),
        curve=curve(memory, int(standing * MIB)),
    )


def cell(
    strategy: str,
    said: Prediction | None,
    *,
    work: Workload = CARD,
    checkpointed: int | None = None,
    failure: tuple[FailureKind, str] | None = None,
) -> Outcome:
    """An outcome as `forecast` makes it: `oom` where headroom is negative."""
    if said is not None and said.spare_bytes is not None and said.spare_bytes < 0:
        failure = ("oom", "needs more than there is")
    return Outcome(
        cell=Cell(workload=work, strategy=strategy),
        layers_checkpointed=CHECKPOINTED.get(strategy, LAYERS) if checkpointed is None else checkpointed,
        failure=Failure(kind=failure[0], message=failure[1]) if failure else None,
        prediction=said,
    )


def predicted_report(*outcomes: Outcome, explain: bool = False, **changes: object) -> Report:
    """A report of these predictions."""
    first = outcomes[0].cell.workload if outcomes else CARD
    on_cpu = first.device == "cpu"
    values: dict[str, object] = {
        "source": "predicted",
        "command": f"gcbench predict --model {first.model} --device {first.device}",
        "settings": {"model": first.model, "explain": explain},
        "machine": Machine(
            device=first.device,
            device_name="Example CPU" if on_cpu else "Example Card 24 GB",
            device_memory_bytes=(16 if on_cpu else 24) * GIB,
            platform="Linux-6.1-x86_64",
            versions={"python": "3.11.4", "torch": "2.13.0", "transformers": "5.23.0"},
        ),
        "model": ModelFacts(
            model=first.model,
            model_type="llama",
            num_params=1_235_814_400,
            num_layers=LAYERS,
            max_seq_len=8192,
            attn_implementation="sdpa",
            checkpointing_refusal=None,
        ),
    }
    return report(*outcomes, **(values | changes))


def card_report(*, explain: bool = False, work: Workload = CARD) -> Report:
    """A card of 24 GiB: `off` does not fit, `every:4` hardly, and one strategy could not be predicted."""
    common = {"limit": 24 * 1024, "attention": {"flash": 20}, "terms": (CONTEXT, WORKSPACE), "standing": 7000}
    chunks, every = "a loss computed in 8 chunks", "checkpointing every layer"
    return predicted_report(
        cell(
            "off",
            prediction(
                peaks(30_000, 32_800, 11_800, reserved=35_000, process=35_400),
                shares={"kept activations": 13_700, "logits and loss": 12_000, "optimizer state": 7_084, "buffers": 16},
                kept=[(0, 11, 1100)],
                levers={chunks: 22_300, every: 19_750},
                **common,
            ),
            work=work,
        ),
        cell(
            "per-layer",
            prediction(
                peaks(17_000, 19_750, 11_800, reserved=20_000, process=20_400),
                shares={"logits and loss": 12_000, "optimizer state": 7_200, "boundaries": 550},
                kept=[(0, 11, 32)],
                levers={chunks: 12_000},
                **common,
            ),
            work=work,
        ),
        cell(
            "every:4",
            prediction(
                peaks(21_000, 23_000, 11_800, reserved=23_900, process=24_300),
                shares={"logits and loss": 12_000, "optimizer state": 7_200, "kept activations": 3_800},
                kept=[(start + first, start + last, size) for start in (0, 4, 8) for first, last, size in _EVERY_4],
                levers={chunks: 13_000, every: 19_750},
                layers_traced=LAYERS,
                **common,
            ),
            work=work,
        ),
        cell("every:2", None, work=work, failure=UNTRACEABLE),
        explain=explain,
    )


_EVERY_4 = ((0, 0, 32.0), (1, 3, 850.0))


def cpu_report(*, explain: bool = False) -> Report:
    """A CPU without a bound, two batch sizes; in the smaller one no strategy saves anything."""
    small = workload(model="gpt2", batch=1, seq=64)
    large = workload(model="gpt2", batch=8, seq=256)
    in_update = {
        "part": "optimizer step",
        "op": "_foreach_sqrt",
        "shares": {"optimizer state": 1000, "temporaries": 500},
    }
    every = "checkpointing every layer"
    return predicted_report(
        cell("off", prediction(peaks(900, 1100, 1500), levers={every: 1500}, standing=500, **in_update), work=small),
        cell("per-layer", prediction(peaks(700, 800, 1500), standing=500, **in_update), work=small),
        cell("off", prediction(peaks(5000, 5600, 1500), levers={every: 2700}, standing=500), work=large),
        cell("per-layer", prediction(peaks(2000, 2700, 1500), standing=500), work=large),
        cell("every:2", prediction(peaks(2100, 2710, 1500), levers={every: 2700}, standing=500), work=large),
        explain=explain,
    )
