"""Replacing what `gcbench.apply` did warns once, and the count is of what is really recomputed."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from loops import ALL, Calls, Compilable, build, enable, runs_again, state, step
from own_ways import build as build_own
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import Trainer, TrainingArguments

import gcbench

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(5, 200, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs():
    return {"input_ids": IDS[:2], "labels": IDS[:2]}


def messages(caught):
    """The warnings of gcbench."""
    return [str(warning.message) for warning in caught if "gcbench." in str(warning.message)]


def trained(trainer):
    """The layers that a trainer's backward passes recompute, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Calls(trainer.model) as calls:
            trainer.train()
    most = max(calls.values())
    return {number for (_, number), count in calls.items() if count == most > min(2, most)}, messages(caught)


def arguments(kind, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its own default is an old name
        return kind(
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **more,
        )


def sft_trainer(folder, **more):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(256)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w1")
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])
    args = arguments(trl.SFTConfig, folder, bf16=False, **more)
    return lambda model: trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)


def plain_trainer(folder, **more):
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    args = arguments(TrainingArguments, folder, **more)
    return lambda model: Trainer(model, args=args, train_dataset=rows)


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (sft_trainer, {}, "SFTTrainer .*; set gradient_checkpointing=False in SFTConfig$"),
        (sft_trainer, {"gradient_checkpointing": False}, None),
        (plain_trainer, {"gradient_checkpointing": True}, "Trainer .*; set .*gradient_checkpointing=False"),
        (plain_trainer, {}, None),
    ],
)
def test_a_trainer_that_checkpoints_is_named_with_the_setting_that_stops_it(tmp_path, make, more, words):
    model = build()
    applied = gcbench.apply(model, "every:2")
    again, warned = trained(make(tmp_path, **more)(model))
    assert applied.recomputed == again == ({0, 2} if words is None else set(ALL))
    assert len(warned) == (words is not None)
    if words is not None:
        assert re.match(words, warned[0])
        assert "gcbench.apply(model, 'every:2') by its own checkpointing: 4 of 4 layers are recomputed" in warned[0]
        assert "(the plan has 2)" in warned[0]


def test_a_call_after_apply_warns_once_and_remove_restores_all(inputs):
    model = build()
    before = state(model)
    applied = gcbench.apply(model, "last:1")
    step(model, inputs)
    assert applied.recomputed == {3}
    enable(model)
    model.eval()
    step(model, inputs)  # nothing is recomputed, so there is nothing to tell yet
    model.train()
    words = r"^activation_checkpointing_enable\(\) has replaced .*; leave that call out, or .* after it$"
    with pytest.warns(UserWarning, match=words):
        step(model, inputs)
    assert applied.recomputed == set(ALL)
    applied.reset()
    step(model, inputs)
    model.disable_input_require_grads()
    enable(model, every_n_layers=2)
    step(model, inputs)  # warned already
    assert applied.recomputed == set(ALL)
    applied.reset()
    step(model, inputs)
    assert applied.recomputed == {0, 2}
    model.disable_input_require_grads()
    for name in ("_require_grads_hook", "_require_grads_hooks"):
        vars(model).pop(name, None)
    gcbench.remove(model)
    assert state(model) == before


@pytest.mark.parametrize("spec", ["per-layer", "segment:2", "reentrant", "selective:matmul"])
def test_switching_checkpointing_off_after_apply_warns(inputs, spec):
    model = build()
    applied = gcbench.apply(model, spec)
    name = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    getattr(model, f"{name}_checkpointing_disable")()
    with pytest.warns(UserWarning, match=r"switched off since, .* no layer is recomputed \(the plan has 4\); call"):
        step(model, inputs)
    assert applied.recomputed == set()
    gcbench.apply(model, spec)
    assert runs_again(model, inputs) == ALL


def test_off_is_a_plan_as_well(inputs):
    model = build()
    applied = gcbench.apply(model, gcbench.Plan(num_layers=4))
    enable(model)
    with pytest.warns(UserWarning, match=r"gcbench.apply\(model, plan\) by .*: 4 of 4 layers .* \(the plan has 0\)"):
        step(model, inputs)
    assert applied.recomputed == set(ALL)


@pytest.mark.parametrize("spec", ["off", "own"])
def test_a_model_with_only_its_own_checkpointing_warns_too(inputs, spec):
    model = build_own("function", vocab_size=256)
    applied = gcbench.apply(model, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, inputs)
    assert applied.recomputed == (set(ALL) if spec == "own" else set())
    enable(model) if spec == "off" else model.activation_checkpointing_disable()
    applied.reset()
    with pytest.warns(UserWarning, match=r"has replaced .* by its own checkpointing|switched off since"):
        step(model, inputs)
    assert applied.recomputed == (set() if spec == "own" else set(ALL))


def test_a_wrapper_around_layers_warns(inputs):
    """As accelerate's FSDP plugin adds it: layers that the plan does not checkpoint are recomputed."""
    model = build()
    applied = gcbench.apply(model, "every:2")
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    with pytest.warns(UserWarning, match=r"CheckpointWrapper has been put around layers .*; leave activation_check"):
        step(model, inputs)
    assert applied.recomputed == set(ALL)


def test_wrappers_and_copies_warn_too(inputs):
    """The trap: peft 0.18 calls the `forward` of the model inside, which fires none of its hooks."""
    peft = pytest.importorskip("peft")
    model = build()
    applied = gcbench.apply(model, "every:2")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        enable(twin)
        with pytest.warns(UserWarning, match="has replaced"):
            step(twin, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, inputs)
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers by a name that is on its way out
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        step(adapted, inputs)
    assert applied.recomputed == {0, 2}
    enable(adapted)
    with pytest.warns(UserWarning, match="has replaced"):
        step(adapted, inputs)
    assert applied.recomputed == set(ALL)


class LossAlone(Compilable):
    def forward(self, input_ids):
        return self.head(self.norm(self.run(self.embed(input_ids), {}))).sum()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method", "ignore:The .grad attribute")  # the compiler's own
def test_in_a_compiled_model_the_count_is_unknown_rather_than_wrong():
    torch._dynamo.reset()
    model = LossAlone("aaa").train()
    ids = torch.randint(2, 50, (2, 4))
    applied = gcbench.apply(model, "off")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(ids).backward()
    assert applied.recomputed == set()
    for layer in model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    compiled(ids).backward()
    assert applied.recomputed is None
    torch._dynamo.reset()
