"""LoRA: the model that peft makes, adapters alone trained, measured and proven like any other workload."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import ROOT
from fixtures_report import outcome, peaks, report, steady, workload

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.records import Lora
from gcbench.measure import take_fingerprint
from gcbench.models import build as models
from gcbench.models.sources import ModelSource
from gcbench.report import compare, sentences
from gcbench.report import report_file as reports
from gcbench.training import step as training

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--batch", 4, "--seq-len", 32, "--rounds", 1, "--steps", 1, "--device", "cpu", "--strategies", "off,per-layer")
R = 4
HIDDEN, KV = 32, 16
LLAMA_ADAPTERS = tiny.NUM_LAYERS * (R * (HIDDEN + HIDDEN) + R * (HIDDEN + KV))
"""Two matrices for each query and each value projection, which is what peft chooses for llama."""


def config_of(family):
    source = ModelSource(name=family, origin="", config=tiny.CONFIGS[family], location="")
    return source, models.build_config(source, layers=None, overrides={})


def build(family, lora, dtype=torch.float32):
    source, config = config_of(family)
    return models.build(source, config, device="cpu", dtype=dtype, attn_implementation=None, seed=0, lora=lora)


def described(model):
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


# The model


@pytest.mark.parametrize("targets", [None, ("k_proj", "mlp.up_proj"), ("all-linear",)])
def test_the_model_is_the_one_inside_what_peft_makes(targets):
    """To the weights: a user's own script with this seed trains the same model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of("llama")[1], dtype=torch.bfloat16)
    chosen = "all-linear" if targets == ("all-linear",) else targets and list(targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(base, LoraConfig(r=R, target_modules=chosen, task_type="CAUSAL_LM")).get_base_model()
    ours = build("llama", Lora(r=R, target_modules=targets), torch.bfloat16)
    assert type(ours) is type(theirs)
    assert described(ours) == described(theirs)
    for (name, mine), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, theirs_), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_fp32_whatever_the_base_is(dtype):
    model = build("llama", Lora(r=R), dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert sum(p.numel() for p in trained) == LLAMA_ADAPTERS


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        *((family, ("all-linear",)) for family in tiny.CHECKPOINTING if family != "mamba"),
        *((family, None) for family in ("llama", "gpt2", "gemma2", "gpt_neox", "opt", "bloom")),
        ("mamba", ("in_proj", "x_proj")),
        ("mixtral", ("w1", "w3")),  # names of before transformers held the experts as one; peft knows them still
        ("llama", ("embed_tokens", "lm_head")),
    ],
)
def test_without_storage_it_is_the_same_model(family, targets):
    """The trap: adapters made on the CPU beside a model on the meta device."""
    lora = Lora(r=R, target_modules=targets)
    meta = models.build_meta(config_of(family)[1], dtype=torch.bfloat16, lora=lora)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert described(meta) == described(build(family, lora, torch.bfloat16))
    assert len(checkpointing.checkpointable_layers(meta)) == tiny.NUM_LAYERS


def test_facts_count_the_adapters_and_what_is_trained():
    source, config = config_of("llama")
    plain, facts = models.facts(source, config, None), models.facts(source, config, None, lora=Lora(r=R))
    assert plain.num_trainable_params == plain.num_params
    assert facts.num_trainable_params == LLAMA_ADAPTERS
    assert facts.num_params == plain.num_params + LLAMA_ADAPTERS


# The step


@pytest.mark.parametrize("strategy", ["off", "per-layer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed", "fp16-mixed"])
def test_adapters_alone_are_trained(precision, strategy):
    """The trap: without gradients for its inputs a checkpointed layer of a frozen model could train nothing."""
    model = build("llama", Lora(r=R), training.parameter_dtype(precision))
    counter = checkpointing.apply(model, strategies.parse(strategy).plan_for(tiny.NUM_LAYERS))
    batch = training.random_batch(model, batch_size=2, seq_len=16, seed=0)
    step = training.TrainingStep(model, batch=batch, precision=precision, optim="adamw_torch", seed=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    prints = []

    def take(phase):
        if phase == "optimizer":
            prints.append(take_fingerprint.take(model, step=0, seed=0))

    step(take)
    while not step.has_optimizer_state:  # fp16's scaler skips its first steps
        step(take)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {p.name for p in prints[-1].parameters} == trained and not prints[-1].missing
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # The second matrices are zeros at first, so the first ones get gradients of zero; weight decay moves them.
    assert {name for name in trained if "lora_B" in name} <= changed <= trained
    assert len(counter.layers) == (tiny.NUM_LAYERS if strategy == "per-layer" else 0)


def test_an_adapted_embedding_is_trained_too():
    """The trap: peft's module in place of the embedding has no `num_embeddings` to draw tokens from."""
    model = build("llama", Lora(r=R, target_modules=("embed_tokens",)))
    batch = training.random_batch(model, batch_size=2, seq_len=16, seed=0)
    training.TrainingStep(model, batch=batch, precision="fp32", optim="sgd", seed=0)()
    assert int(batch.max()) < 256


# The command


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_a_run_with_adapters_is_measured_and_proven(cli, model, tmp_path, precision):
    command = ("run", "-m", model(), *QUICK, "--precision", precision)
    full = cli(*command, "--json")
    result = cli(*command, "--lora-r", R, "--out", tmp_path / "run", "--json")
    assert full.code == result.code == 0, full.err + result.err
    for strategy, recomputed in (("off", 0), ("per-layer", tiny.NUM_LAYERS)):
        row = result.rows[strategy]
        assert row["lora_r"] == R and full.rows[strategy]["lora_r"] is None
        assert row["proof"] == "identical"
        assert row["layers_recomputed"] == row["layers_checkpointed"] == recomputed
        assert row["params_without_grad"] == 0
        for peak in ("peak_allocated_bytes", "peak_optimizer_bytes"):
            assert row[peak] < full.rows[strategy][peak], peak
    assert result.rows["per-layer"]["memory_saved_frac"] > 0
    stored = reports.load(tmp_path / "run")
    assert stored.model.num_trainable_params == LLAMA_ADAPTERS
    assert stored.settings["lora_r"] == R and stored.settings["lora_target_modules"] is None
    assert stored.machine.versions["peft"]
    shown = cli("report", tmp_path / "run")
    assert f"· LoRA r={R} ·" in shown.out


def test_what_lies_below_the_lowest_adapter_is_not_asked_to_be_recomputed(cli, model):
    """The trap: no gradient passes through the first layers, so checkpointing them does nothing; that is no failure."""
    result = cli(
        *("run", "-m", model(), *QUICK, "--strategies", "off,per-layer,every:2", "--lora-r", R),
        *("--lora-target-modules", "layers.2.self_attn.q_proj", "--json"),
    )
    assert result.code == 0, result.err
    assert {row["proof"] for row in result.rows.values()} == {"identical"}
    assert [row["layers_recomputed"] for row in result.rows.values()] == [0, 2, 1]
    assert [row["layers_checkpointed"] for row in result.rows.values()] == [0, 2, 1]
    assert {row["num_layers"] for row in result.rows.values()} == {tiny.NUM_LAYERS}


def test_a_file_can_ask_for_adapters_and_a_run_with_them_is_continued(cli, model, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'model = "{model()}"\nbatch = 1\nseq_len = 8\nstrategies = ["off"]\nrounds = 1\nsteps = 1\ndevice = "cpu"\n'
        f'lora_r = {R}\nlora_target_modules = ["q_proj", "o_proj"]\n'
    )
    result = cli("run", "--config", "run.toml", "--out", "run")
    assert result.code == 0, result.err
    stored = reports.load(tmp_path / "run")
    assert stored.settings["lora_target_modules"] == ["q_proj", "o_proj"]
    assert stored.model.num_trainable_params == tiny.NUM_LAYERS * 2 * R * 2 * HIDDEN
    other = cli("run", "--resume", "--out", "run", "--lora-r", 8)
    other.refused(2, "lora_r 4 is now 8")
    more = cli("run", "--resume", "--out", "run", "--rounds", 2)
    assert more.code == 0, more.err
    assert len(reports.load(tmp_path / "run").outcomes[0].rounds) == 2


def test_the_title_tells_of_adapters():
    assert sentences.title(replace(workload(), lora_r=8)) == (
        "gpt2 · batch 16 × 64 tokens · fp32 · adamw_torch · LoRA r=8 · sdpa · cpu"
    )
    assert "LoRA" not in sentences.title(workload())


def test_runs_of_different_ranks_have_no_cell_in_common():
    """And by name: with --force, one must see which is which."""
    plain, adapted = (
        report(outcome("off", peaks(1, 2, 1), steady(0.1), work=replace(workload(), lora_r=rank))) for rank in (None, 8)
    )
    with pytest.raises(UsageError, match=r"no cell in common.*LoRA r=8"):
        compare.compare(plain, adapted, force=False)
    (change,) = compare.compare(adapted, adapted, force=False).changes
    assert change.lora_r == 8 and "· LoRA r=8 ·" in change.cell


# Bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lora-r", 0), ["--lora-r: 0 is too small; it must be 1 or more"]),
        (("--lora-r", "eight"), ["--lora-r: 'eight' is not a whole number"]),
        (("--lora-target-modules", "q_proj"), ["--lora-target-modules also needs the rank", "--lora-r 8"]),
        (("--lora-r", 4, "--lora-target-modules", "q_proj,,v_proj"), ["has an empty item"]),
        (
            ("--lora-r", 4, "--lora-target-modules", "all-linear,q_proj"),
            ["all-linear means every linear layer", "leave out"],
        ),
        (("--lora-r", 4, "--lora_target_modules", "q_prj"), ["no module 'q_prj'", "did you mean q_proj?", "o_proj"]),
        (("--lora-r", 4, "--lora-target-modules", "q_proj,zzz"), ["no module 'zzz'", "its linear layers are q_proj"]),
        (("--lora-r", 4, "--lora-target-modules", "mlp"), ["no adapter for a LlamaMLP", "linear layers: q_proj"]),
    ],
)
def test_adapters_that_cannot_be_meant(cli, model, tmp_path, flags, said):
    """The trap: peft passes over a misspelt name as long as another one fits."""
    cli("run", "-m", model(), *QUICK, *flags, "--out", tmp_path / "run").refused(2, *said)
    assert not (tmp_path / "run").exists()


def test_a_model_for_which_peft_has_no_default(cli, model):
    command = ("run", "-m", model("mamba"), *QUICK, "--lora-r", 4)
    cli(*command).refused(2, "peft has no default target modules for a mamba model", "--lora-target-modules", "in_proj")
    unsuited = cli(*command, "--lora-target-modules", "all-linear")
    unsuited.refused(2, "'out_proj' is incompatible with Mamba", "use --lora-target-modules in_proj,x_proj,dt_proj")


def test_without_peft(cli_process, model, tmp_path):
    (tmp_path / "path" / "peft").mkdir(parents=True)
    (tmp_path / "path" / "peft" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\")\n")
    env = {"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}
    result = cli_process("run", "-m", model(), *QUICK, "--lora-r", 4, "--out", tmp_path / "run", env=env)
    result.refused(3, "No module named 'peft'", "pip install 'gcbench[lora]'")
    assert not (tmp_path / "run").exists()


def test_what_trains_all_parameters_does_not_need_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert build("llama", None)
    with pytest.raises(UnavailableError, match=r"pip install 'gcbench\[lora\]'"):
        build("llama", Lora(r=R))
