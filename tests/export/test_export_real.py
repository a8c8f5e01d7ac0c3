"""The libraries run what `gcbench plan --emit` prints for them, and recompute what was planned.

Each program is run unchanged, on a Llama of four layers, with data added. The number of runs of a layer's first module
in a step shows whether the layer was recomputed, and the operators that ran show what was saved: both have to be the
same as when gcbench itself applies the plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from processes import PROCESS_TIMEOUT_S
from test_export import SPECS, arguments, handover, rival, settings
from torch.utils._python_dispatch import TorchDispatchMode

from gcbench import export
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.errors import UsageError
from gcbench.export._handover import SEARCHED, Handover
from gcbench.strategies import Plan, Policy
from gcbench.strategies.plan_file import as_json
from gcbench.training import optimizers

if TYPE_CHECKING:
    from transformers import Trainer  # imports more than other tests want to wait for

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # the Trainer asks for it on a CPU too
    # peft 0.21 reads the old names
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

SEQ_LEN, BATCH_SIZE = 16, 2
PROGRAMS = ("trainer", "trl")
ON_CPU = ("off", "per-layer", "every:2", "first:1", "reentrant", "selective:matmul", "every:2+selective:attention")
"""Without offload, which pins host memory and so needs a GPU."""
MIXED = Plan(
    num_layers=tiny.NUM_LAYERS,
    groups=((0,), (1, 2), (3,)),
    policies=(Policy(keep=("mm#0", "mm#3")), Policy(), Policy(keep=("mm",))),
)
LORA = {"lora_r": 2, "lora_target_modules": ("q_proj", "v_proj")}


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """accelerate keeps its state for the process, and a Trainer changes the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with its tokenizer, as `from_pretrained` finds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("pretrained")
    config = AutoConfig.for_model(**tiny.CHECKPOINTING["llama"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def given(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Handover]:
    """`given("every:2", precision="bf16")`: a handover for the model, in a folder where programs may write."""
    monkeypatch.chdir(tmp_path)

    def make(strategy: str, plan: Plan | None = None, **changes: object) -> Handover:
        choice = rival(strategy, plan=plan, batch_size=BATCH_SIZE)
        changes = {"precision": "fp32", "hub_id": str(folder), "seq_len": SEQ_LEN, **changes}
        return handover(choice, **changes)

    return make


class _Operators(TorchDispatchMode):
    """Counts the operators that really run: those whose outputs were saved do not run when recomputing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() != "aten::detach":  # of a plan's own bookkeeping
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[tuple[Counter[int], Counter[str]]]:
    """How often each layer begins, and each operator runs, in the context."""
    runs: Counter[int] = Counter()
    hooks = []
    for number, layer in enumerate(checkpointing.checkpointable_layers(model)):
        note = lambda *call, number=number: runs.update([number])  # noqa: E731
        hooks.append(layer.input_layernorm.register_forward_pre_hook(note))
    with _Operators() as operators:
        yield runs, operators.calls
    for hook in hooks:
        hook.remove()


def as_planned(plan: Plan) -> dict[int, int]:
    """How often each layer begins in one step."""
    recomputed = {layer for group in plan.groups for layer in group}
    return {layer: 2 if layer in recomputed else 1 for layer in range(plan.num_layers)}


def trainer_of(text: str) -> Trainer:
    """Runs a program up to its trainer."""
    rows = [{"input_ids": list(range(2, SEQ_LEN + 2)), "labels": list(range(2, SEQ_LEN + 2))}] * BATCH_SIZE
    dataset = pytest.importorskip("datasets").Dataset.from_list(rows) if "from trl" in text else rows
    names: dict[str, object] = {"dataset": dataset}
    exec(compile(text, "<emitted>", "exec"), names)
    trainer: Trainer = names["trainer"]
    trainer.args.max_steps = 1
    trainer.args.save_strategy = "no"
    return trainer


def one_step(trainer: Trainer) -> tuple[Counter[int], Counter[str]]:
    with watched(trainer.model) as counts:
        trainer.train()
    return counts


@pytest.fixture(params=PROGRAMS)
def target(request: pytest.FixtureRequest) -> str:
    if request.param == "trl":
        pytest.importorskip("trl")
    return request.param


# transformers and trl


@pytest.mark.parametrize("spec", ON_CPU)
def test_a_trainer_recomputes_and_saves_what_was_planned(target, spec, given):
    """The trap: a setting that the trainer accepts and ignores, as trl does with its own `selective` and LoRA."""
    emitted = export.emit(target, given(spec))
    plan = emitted.expressed.plan
    assert emitted.notice is None
    trainer = trainer_of(emitted.text)
    runs, operators = one_step(trainer)
    assert runs == as_planned(plan)
    trainer.save_model("saved")  # its arguments among the rest

    by_gcbench = trainer_of(export.emit(target, given("off")).text)
    checkpointing.apply(by_gcbench.model, plan)
    assert (runs, operators) == one_step(by_gcbench)


def test_operators_saved_with_lora_are_saved_in_a_trainer(target, given):
    emitted = export.emit(target, given("every:2+selective:attention", **LORA))
    trainer = trainer_of(emitted.text)
    runs, operators = one_step(trainer)
    assert runs == as_planned(emitted.expressed.plan)
    assert operators["aten::_scaled_dot_product_flash_attention_for_cpu"] == tiny.NUM_LAYERS
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained and all("q_proj.lora" in name or "v_proj.lora" in name for name in trained)


@pytest.mark.parametrize("spec", ["every:2+offload", "every:2+selective:matmul+offload"])
def test_offload_reaches_each_layer(target, spec, given, monkeypatch):
    """Where memory is pinned, a note is made."""
    asked: list[object] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.save_on_cpu",
        lambda *, pin_memory, **how: asked.append(pin_memory) or nullcontext(),
    )
    emitted = export.emit(target, given(spec))
    runs, _ = one_step(trainer_of(emitted.text))
    assert runs == as_planned(emitted.expressed.plan)
    assert asked == [True, True]


@pytest.mark.parametrize("spec", ["off", "every:2", "every:2+selective:matmul"])
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_old_spelling_has_the_same_effect(target, spec, given):
    """As the text says: `gradient_checkpointing` in place of `activation_checkpointing`."""
    emitted = export.emit(target, given(spec))
    old = emitted.text.replace("activation_checkpointing", "gradient_checkpointing")
    assert old != emitted.text
    assert one_step(trainer_of(old))[0] == as_planned(emitted.expressed.plan)


@pytest.mark.parametrize(
    ("precision", "dtype", "mixed"),
    [("fp32", torch.float32, "no"), ("bf16", torch.bfloat16, "no"), ("bf16-mixed", torch.float32, "bf16")],
)
def test_the_workload_reaches_a_trainer(target, precision, dtype, mixed, given):
    text = export.emit(target, given("per-layer", precision=precision, attn_implementation="eager")).text
    trainer = trainer_of(text.replace("bf16=True", "bf16=True, use_cpu=True"))  # or it insists on a GPU
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    assert trainer.accelerator.mixed_precision == mixed
    assert trainer.args.per_device_train_batch_size == BATCH_SIZE
    assert trainer.model.config._attn_implementation == "eager"
    assert getattr(trainer.args, "max_length", SEQ_LEN) == SEQ_LEN


@pytest.mark.parametrize("optim", optimizers.names())
def test_the_optimizer_is_the_one_that_gcbench_measures(target, optim, given):
    trainer = trainer_of(export.emit(target, given("per-layer", optim=optim)).text)
    theirs = trainer.create_optimizer()
    ours = optimizers.build(optim, [torch.nn.Parameter(torch.zeros(1))])
    assert type(theirs) is type(ours)
    for name in ("fused", "foreach", "momentum", "scale_parameter", "relative_step", "warmup_init"):
        assert theirs.defaults.get(name) == ours.defaults.get(name), name


# Python


def run_python(text: str, num_layers: int) -> Counter[int]:
    """Runs a program with one batch, and counts how often each layer begins."""
    names: dict[str, object] = {}
    counts: list[Counter[int]] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        ids = torch.arange(BATCH_SIZE * SEQ_LEN).reshape(BATCH_SIZE, SEQ_LEN)
        with watched(names["model"]) as (runs, _):
            counts.append(runs)
            yield {"input_ids": ids, "labels": ids}

    names["batches"] = batches()
    exec(compile(text, "<emitted>", "exec"), names)
    return counts[0]


@pytest.mark.parametrize("spec", [*ON_CPU, "segment:2", "last:1", "selective:mm#0"])
def test_a_plain_loop_recomputes_what_was_planned(spec, given):
    emitted = export.emit("python", given(spec))
    assert run_python(emitted.text, tiny.NUM_LAYERS) == as_planned(emitted.expressed.plan)


@pytest.mark.parametrize("plan_file", ["mixed.json", None])
def test_a_searched_plan_is_applied_from_its_file_or_from_the_text(plan_file, given):
    made = given(SEARCHED, plan=MIXED, plan_file=plan_file)
    if plan_file:
        Path(plan_file).write_text(json.dumps(as_json(MIXED)), encoding="utf-8")
    assert run_python(export.emit("python", made).text, tiny.NUM_LAYERS) == as_planned(MIXED)


@pytest.mark.parametrize(
    ("optim", "precision"), [*zip(optimizers.names(), ("bf16", "bf16-mixed", "fp16-mixed", "fp32"), strict=True)]
)
def test_a_plain_loop_runs_with_every_optimizer(optim, precision, given):
    emitted = export.emit("python", given("every:2", optim=optim, precision=precision, **LORA))
    assert run_python(emitted.text, tiny.NUM_LAYERS) == as_planned(emitted.expressed.plan)


# accelerate


@pytest.fixture(scope="module")
def fsdp_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """For each setting, what a step under accelerate's FSDP did."""
    folder = tmp_path_factory.mktemp("fsdp")
    configs = {"off": ("off", "fp32"), "per-layer": ("per-layer", "fp32"), "offload": ("offload", "fp32")}
    configs["mixed"] = ("per-layer", "bf16-mixed")
    for name, (spec, precision) in configs.items():
        text = export.emit("accelerate-fsdp", handover(spec, precision=precision)).text
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    script = Path(__file__).parents[1] / "data" / "export_fsdp_step.py"
    done = subprocess.run(
        [sys.executable, str(script), *(str(folder / f"{name}.yaml") for name in configs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return {Path(name).stem: said for name, said in json.loads(done.stdout.splitlines()[-1]).items()}


def test_fsdp_recomputes_all_layers_or_none(fsdp_steps):
    for name, said in fsdp_steps.items():
        assert said["is_fsdp2"], name
        assert said["runs"] == {str(layer): 1 if name == "off" else 2 for layer in range(4)}, name
        assert said["offloads"] is (name == "offload"), name
        assert said["mixed_precision"] == ("bf16" if name == "mixed" else "no"), name
    assert all(fsdp_steps[name]["apart"]["0.0"] == 0.0 for name in ("off", "per-layer", "offload"))


def test_fsdp_is_wrong_with_dropout_as_the_text_says(fsdp_steps):
    """accelerate 1.15 does not restore the random state; once it does, the warning is to be removed."""
    assert fsdp_steps["off"]["apart"]["0.5"] == 0.0
    assert fsdp_steps["per-layer"]["apart"]["0.5"] > 0.1
    assert "dropout" in export.emit("accelerate-fsdp", handover("per-layer")).text


# Tools that pin other versions: where one is installed after all, it reads what is emitted for it


def every_text(target: str) -> Iterator[str]:
    for spec in SPECS:
        for changes in ({}, {**LORA}, {"precision": "fp32"}):
            with suppress(UsageError):
                yield export.emit(target, handover(spec, **changes)).text


@pytest.mark.filterwarnings("ignore")  # what another library says of itself
def test_axolotl_reads_it():
    schema = pytest.importorskip("axolotl.utils.schemas.config", exc_type=ImportError)
    for text in every_text("axolotl"):
        said = settings(text)
        more = {"datasets": [{"path": "data", "type": "alpaca"}], "learning_rate": 1e-5, "num_epochs": 1}
        read = schema.AxolotlInputConfig(**said, **more).model_dump(exclude_none=True)
        assert {name: read[name] for name in said if name != "selective_checkpointing"} == {
            name: value for name, value in said.items() if name != "selective_checkpointing"
        }
        if "selective_checkpointing" in said:
            assert read["selective_checkpointing"]["save"] == said["selective_checkpointing"]["save"]


@pytest.mark.filterwarnings("ignore")
def test_llama_factory_reads_it(monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    hparams = pytest.importorskip("llamafactory.hparams", exc_type=ImportError)
    from transformers import HfArgumentParser

    parser = HfArgumentParser([hparams.ModelArguments, hparams.DataArguments, hparams.FinetuningArguments])
    trained = {"do_train", "per_device_train_batch_size", "optim", "bf16", "fp16"}
    for text in every_text("llama-factory"):
        said = settings(text)
        model, data, tuning = parser.parse_dict({name: said[name] for name in said if name not in trained})
        assert data.cutoff_len == 2048
        assert model.disable_gradient_checkpointing is said["disable_gradient_checkpointing"]
        assert model.use_reentrant_gc is said.get("use_reentrant_gc", True)
        assert tuning.pure_bf16 is said.get("pure_bf16", False)


@pytest.mark.filterwarnings("ignore")
def test_torchtitan_reads_it():
    config = pytest.importorskip("torchtitan.config", exc_type=ImportError)
    pytest.importorskip("torchtitan.experiments.transformers_modeling_backend.config_registry", exc_type=ImportError)
    for text in every_text("torchtitan"):
        words = arguments(text)
        read = config.ConfigManager().parse_args(words[words.index("torchtitan.train") + 1 :])
        mode = next(word.partition(":")[2] for word in words if word.startswith("activation-checkpoint:"))
        policies = {"none": "NoneType", "full": "FullAC.Config", "memory-budget": "MemoryBudgetAC.Config"}
        assert type(read.activation_checkpoint).__qualname__ == policies[mode]
        assert read.training.seq_len == 2048 and read.hf_model == "meta-llama/Llama-3.2-1B"
        assert read.compile.enable is ("--compile.enable" in words)
