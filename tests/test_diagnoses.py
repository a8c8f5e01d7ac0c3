"""Every known cause is provoked by real code, on models of four layers or toys, and named; done right, it is not.

Simulated, because a CPU does not do it by itself: a quantised base (bitsandbytes), FSDP's casts, a router whose scores
change, and a compiled layer that is recomputed by another graph. Each such test says what stands for what.
"""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch._functorch.config as functorch_config
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from gcbench import diagnoses
from gcbench.diagnoses import Observation, diagnose

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(64).reshape(2, 32)
Step = Callable[[], torch.Tensor]


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Trial:
    """One combination, tried: `step` runs forward and backward and returns the loss, `seen` is what came of it."""

    def __init__(
        self, model: nn.Module, step: Step, off: Trial | None = None, again: set[int] | None = None, **facts: object
    ) -> None:
        model.zero_grad()
        torch.manual_seed(1)
        listener, error, self.loss = Listener(), None, None
        logger = logging.getLogger("transformers")
        transformers_logging.warning_once.cache_clear()
        logger.addHandler(listener)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.loss = step().detach()
        except Exception as err:
            error = err
        finally:
            logger.removeHandler(listener)
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.seen = Observation(
            error_type=type(error).__name__ if error else None,
            error_text=str(error) if error else None,
            layers_recomputed=None if again is None else len(again),
            warnings=(*(str(warning.message) for warning in caught), *listener.texts),
            **{"strategy": "per-layer", **facts},
        )
        if off is not None and error is None:
            difference = relative(self.grads, off.grads)
            self.seen = replace(
                self.seen,
                grad_rel_diff=difference,
                is_wrong=difference > 1e-4,
                loss_identical=torch.equal(self.loss, off.loss),
                params_without_grad=tuple(name for name in off.grads if name not in self.grads),
            )


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    both = ours.keys() & theirs.keys()
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in both]
    return float(sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5 if both else 0.0


def told(trial: Trial | Observation) -> str | None:
    found = diagnose(trial if isinstance(trial, Observation) else trial.seen)
    return None if found is None else found.name


def build(family: str, **changes: object) -> nn.Module:
    config = {**tiny.CONFIGS[family], **changes}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).train()


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpointed(model: nn.Module, **kwargs: object) -> set[int]:
    """Checkpoint every layer; the set fills with the numbers of those that are run again."""
    again: set[int] = set()

    def run(number: int, function: Callable[..., object], *args: object) -> object:
        calls = itertools.count()

        def counted(*inner: object) -> object:
            if next(calls):
                again.add(number)
            return function(*inner)

        return checkpoint(counted, *args, **kwargs)

    for number, layer in enumerate(layers_of(model)):
        layer._gradient_checkpointing_func = partial(run, number)
        layer.gradient_checkpointing = True
    return again


def train(model: nn.Module, **inputs: object) -> Step:
    def step() -> torch.Tensor:
        loss = model(input_ids=IDS, labels=IDS, **{"use_cache": False, **inputs}).loss
        loss.backward()
        return loss

    return step


def train_toy(function: Callable[[torch.Tensor], torch.Tensor], *, times: int = 1) -> Step:
    """`times` steps of the sum of `function` of a batch that has a gradient, shape (4, 8)."""

    def step() -> torch.Tensor:
        for _ in range(times):
            loss = function(torch.randn(4, 8, requires_grad=True)).float().square().sum()
            loss.backward()
        return loss

    return step


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        ).get_base_model()


# The table


def test_every_cause_is_provoked_and_named_by_a_test():
    named = set(re.findall(r'assert told\(\w+\) == "([\w-]+)"', Path(__file__).read_text(encoding="utf-8")))
    names = [diagnosis.name for diagnosis in diagnoses.known()]
    assert set(names) == named
    assert len(names) == len(set(names))
    assert set(names) == set(diagnoses._FITS)


IMPERATIVES = (
    *("Add", "Call", "Compile", "Decide", "Detach", "Enter", "Keep", "Leave"),
    *("Pass", "Replace", "Set", "Upgrade"),
)


@pytest.mark.parametrize("diagnosis", diagnoses.known(), ids=lambda diagnosis: diagnosis.name)
def test_a_cause_reads_as_sentences_with_a_remedy_and_a_thread(diagnosis):
    for sentence in (diagnosis.symptom, diagnosis.cause, diagnosis.remedy):
        assert re.fullmatch(r"[A-Z][^\n]{20,250}\.", sentence), sentence
    assert diagnosis.remedy.split()[0] in IMPERATIVES, diagnosis.remedy
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+", diagnosis.link)


def test_every_entry_says_what_its_thread_tells():
    text = Path(diagnoses.__file__).with_suffix(".toml").read_text(encoding="utf-8")
    assert len(re.findall(r"\n\n# [^\n]+\n\[\[diagnosis\]\]\n", text)) == len(diagnoses.known())


def test_the_table_needs_no_torch():
    code = "import sys; from gcbench import diagnoses; diagnoses.known(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_went_right_has_no_cause(family, frozen, reentrant):
    """The trap: a cause that is told from the settings alone."""
    model = build(family)
    if frozen:
        model = with_lora(model)
        model.enable_input_require_grads()
    off = Trial(model, train(model), strategy="off")
    again = checkpointed(model, use_reentrant=reentrant)
    facts = {"has_dropout": family == "gpt2", "is_moe": family == "mixtral", "frozen_base": frozen}
    trial = Trial(
        model, train(model), off, again, layers_expected=4, num_layers=4, reentrant=reentrant, compiled=True, **facts
    )
    assert trial.seen.layers_recomputed == 4
    assert told(off) is None and told(trial) is None, trial.seen


@pytest.mark.parametrize(
    "seen",
    [
        Observation(),
        Observation(strategy="per-layer", error_type="OutOfMemoryError", error_text="CUDA out of memory.", is_moe=True),
        Observation(strategy="per-layer", error_type="ValueError", error_text="size of tensor", use_cache=True),
        Observation(strategy="per-layer", is_wrong=True, loss_identical=False),
        Observation(strategy="off", is_wrong=True, has_dropout=True, preserve_rng_state=False),
        Observation(strategy="per-layer", is_wrong=True, loss_identical=True, compiled=True, memory_budget=1.0),
        Observation(strategy="per-layer", params_without_grad=("model.layers.3.mlp.up_proj.weight",), num_layers=4),
        Observation(strategy="per-layer", training=False, layers_expected=0, layers_recomputed=0),
    ],
)
def test_what_is_not_known_gets_no_cause(seen):
    """Among them differences in the forward pass, where recomputing is not to blame."""
    assert told(seen) is None


# Gradients that are lost


def test_lora_behind_a_frozen_embedding_and_reentrant_checkpointing():
    model = with_lora(build("llama"))
    off = Trial(model, train(model), strategy="off")
    facts = {"layers_expected": 4, "num_layers": 4, "frozen_base": True, "reentrant": True}
    trial = Trial(model, train(model), off, checkpointed(model, use_reentrant=True), **facts)
    assert "does not require grad" in trial.seen.error_text
    assert told(trial) == "reentrant-frozen-base"
    facts["reentrant"] = False
    assert told(Trial(model, train(model), off, checkpointed(model, use_reentrant=False), **facts)) is None


def test_a_base_that_was_not_prepared_for_training_in_few_bits():
    """Simulated: bitsandbytes needs a GPU. A frozen fp32 model stands for its quantised one, and peft's preparation,
    which is run for real, is told that it is in 4 bits."""
    peft = pytest.importorskip("peft")

    def adapted(*, prepare: bool) -> nn.Module:
        model = build("llama")
        model.is_loaded_in_4bit = True
        if prepare:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its name for activation checkpointing is the old one
                model = peft.prepare_model_for_kbit_training(model)
        model.is_loaded_in_4bit = False  # or peft would look for bitsandbytes
        return with_lora(model)

    facts = {"frozen_base": True, "quantised": True, "reentrant": True, "num_layers": 4}
    for prepare in (False, True):
        model = adapted(prepare=prepare)
        again = checkpointed(model, use_reentrant=True)
        trial = Trial(model, train(model), None, again, **facts)
        if prepare:
            assert told(trial) is None, trial.seen
            assert len(again) == 4
        else:
            assert told(trial) == "quantised-base-unprepared"


def test_only_the_last_layer_is_trained():
    """The trap: no error, because the head is trained too, and a loss that goes down."""
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3." in name or "lm_head" in name)
    off = Trial(model, train(model), strategy="off")
    facts = {"num_layers": 4, "frozen_base": True, "reentrant": True}
    trial = Trial(model, train(model), off, checkpointed(model, use_reentrant=True), **facts)
    assert trial.seen.error_text is None and len(trial.seen.params_without_grad) == 9
    assert told(trial) == "last-layer-without-gradient"
    model.enable_input_require_grads()
    assert told(Trial(model, train(model), off, checkpointed(model, use_reentrant=True), **facts)) is None


class Block(GradientCheckpointingLayer):
    """A layer of a toy model, which `function` computes after its projection."""

    def __init__(self, function: Callable[..., torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear = linear()
        self.function = function

    def forward(self, hidden: torch.Tensor, *args: object) -> torch.Tensor:
        return self.function(self.linear(hidden), *args)


def test_hidden_states_passed_by_keyword():
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 8))

    def by_keyword(x: torch.Tensor) -> torch.Tensor:
        first, *blocks, last = model
        hidden = first(x)
        for block in blocks:
            hidden = block(hidden=hidden)
        return last(hidden)

    off = Trial(model, train_toy(by_keyword), strategy="off")
    checkpointed(model, use_reentrant=True)
    trial = Trial(model, train_toy(by_keyword), off, reentrant=True)
    assert trial.seen.error_text is None and "0.weight" in trial.seen.params_without_grad
    assert told(trial) == "reentrant-keyword-inputs"
    assert told(Trial(model, train_toy(model), off, reentrant=True)) is None


def test_keys_that_later_layers_share():
    """As in Gemma 3n: a layer leaves its keys in a dictionary, and no gradient comes back from those that read them."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, reentrant: bool | None) -> torch.Tensor:
            shared: dict[str, torch.Tensor] = {}

            def write(x: torch.Tensor) -> torch.Tensor:
                shared["keys"] = self.first(x)
                return x + shared["keys"].sin()

            def read(x: torch.Tensor) -> torch.Tensor:
                return self.second(x) * shared["keys"]

            for layer in (write, read):
                x = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
            return x.square().mean()

    torch.manual_seed(0)
    model = Shares()

    def step(reentrant: bool | None) -> torch.Tensor:
        loss = model(torch.ones(4, 8, requires_grad=True), reentrant)
        loss.backward()
        return loss

    off = Trial(model, partial(step, None), strategy="off")
    reentrant = Trial(model, partial(step, True), off, reentrant=True)
    assert reentrant.seen.is_wrong
    assert told(reentrant) == "reentrant-shared-state"
    assert told(Trial(model, partial(step, False), off)) is None


def test_kwargs_that_do_not_say_which_variant():
    """The trap: one kwarg of one's own, and transformers no longer fills in use_reentrant=False."""
    model = build("llama")
    off = Trial(model, train(model), strategy="off")
    for kwargs in ({"preserve_rng_state": True}, {"preserve_rng_state": True, "use_reentrant": False}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old name, which is the only one before 5.23
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        trial = Trial(model, train(model), off)
        if "use_reentrant" in kwargs:
            assert told(trial) is None
        else:
            assert told(trial) == "reentrant-by-omission"


def test_a_warning_does_not_hide_wrong_gradients():
    seen = Observation(
        strategy="per-layer",
        is_wrong=True,
        has_dropout=True,
        preserve_rng_state=False,
        warnings=("torch.utils.checkpoint: the use_reentrant parameter should be passed explicitly.",),
    )
    assert told(seen) == "rng-not-preserved"


# Gradients that are wrong


def test_dropout_masks_that_are_drawn_anew():
    model = build("gpt2")
    off = Trial(model, train(model), strategy="off")
    for preserve in (False, True):
        again = checkpointed(model, use_reentrant=False, preserve_rng_state=preserve)
        trial = Trial(model, train(model), off, again, has_dropout=True, preserve_rng_state=preserve)
        assert trial.seen.loss_identical and len(again) == 4
        if preserve:
            assert told(trial) is None
        else:
            assert trial.seen.grad_rel_diff > 0.1
            assert told(trial) == "rng-not-preserved"


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_router_that_picks_other_experts_in_the_recomputation(experts):
    """Simulated: a hook adds noise to the router's input in the recomputation, as kernels that are not deterministic do
    on a GPU to less extent. A loop over experts ends in an error, a grouped product in silence."""
    model = build("mixtral")
    model.set_experts_implementation(experts)
    off = Trial(model, train(model), strategy="off")
    again = checkpointed(model, use_reentrant=False)
    facts = {"is_moe": True, "layers_expected": 4}
    assert told(Trial(model, train(model), off, again, **facts)) is None

    def nudge(calls: Iterator[int], router: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        generator = torch.Generator().manual_seed(0)
        return (args[0] + 3 * torch.randn(args[0].shape, generator=generator),) if next(calls) else None

    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.register_forward_pre_hook(partial(nudge, itertools.count()))
    trial = Trial(model, train(model), off, again, **facts)
    assert trial.seen.is_wrong == (experts == "grouped_mm")
    assert trial.seen.error_type == (None if experts == "grouped_mm" else "CheckpointError")
    assert told(trial) == "moe-router-flips"


def test_a_memory_budget_that_recomputes_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8), nn.Dropout(0.5))
    budgets: dict[float, Trial] = {}
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager_decomp_partition")
        facts = {"strategy": "budget", "compiled": True, "memory_budget": budget, "has_dropout": True}
        with functorch_config.patch(activation_memory_budget=budget):
            budgets[budget] = Trial(model, train_toy(compiled), budgets.get(1.0), **facts)
    torch._dynamo.reset()
    well, trial = budgets[1.0], budgets[0.0]
    assert trial.seen.loss_identical and trial.seen.grad_rel_diff > 0.1
    assert told(trial) == "memory-budget-dropout"
    assert told(well) is None


def test_what_a_hook_sets_for_the_forward_pass_only():
    """The trap: no error, and a loss that is right."""
    model = build("llama")

    def step(*, early: bool) -> torch.Tensor:
        hooks = [layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] / 2,)) for layer in layers_of(model)]
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if early:
            [hook.remove() for hook in hooks]
        loss.backward()
        [hook.remove() for hook in hooks]
        return loss

    off = Trial(model, partial(step, early=True), strategy="off")
    again = checkpointed(model, use_reentrant=False)
    trial = Trial(model, partial(step, early=True), off, again)
    assert trial.seen.loss_identical and trial.seen.is_wrong
    assert told(trial) == "state-gone-in-recompute"
    assert told(Trial(model, partial(step, early=False), off, again)) is None


@pytest.mark.parametrize("mixed", [False, True], ids=["every call", "every second call"])
def test_an_optimizer_that_steps_before_a_shared_layer_is_recomputed(mixed):
    """One layer, called four times. Where only some calls are checkpointed, the others still need the old weights and
    autograd notices; where all are, nobody does."""

    def attempt(off: Trial | None, **kwargs: object) -> Trial:
        shared = linear()
        arrived = {name: torch.zeros_like(p) for name, p in shared.named_parameters()}

        def hook(name: str, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
            arrived[name] += parameter.grad
            optimizer.step()
            parameter.grad = None

        for name, parameter in shared.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(hook, name, torch.optim.SGD([parameter], lr=0.5)))

        def layer(hidden: torch.Tensor) -> torch.Tensor:
            return torch.tanh(shared(hidden))

        def four_times(hidden: torch.Tensor) -> torch.Tensor:
            for call in range(4):
                plain = not kwargs or (mixed and call % 2 == 0)
                hidden = layer(hidden) if plain else checkpoint(layer, hidden, **kwargs)
            return hidden

        facts = {"strategy": "per-layer" if kwargs else "off", "reentrant": kwargs.get("use_reentrant", False)}
        trial = Trial(shared, train_toy(four_times), optim="galore_adamw_layerwise", **facts)
        trial.grads = arrived
        if off is not None and trial.seen.error_text is None:
            difference = relative(arrived, off.grads)
            trial.seen = replace(trial.seen, grad_rel_diff=difference, is_wrong=difference > 1e-4, loss_identical=True)
        return trial

    off = attempt(None)
    trial = attempt(off, use_reentrant=True)
    assert trial.seen.is_wrong != ("modified by an inplace operation" in (trial.seen.error_text or ""))
    assert trial.seen.is_wrong is not mixed
    assert told(trial) == "optimizer-in-backward"
    assert told(off) is None
    assert told(attempt(off, use_reentrant=False)) is None


def test_running_statistics_move_twice():
    """The trap: loss and gradients are identical, and what the model evaluates with is not."""

    def attempt(function: Callable[..., torch.Tensor], off: Trial | None = None) -> tuple[Trial, dict[str, object]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        trial = Trial(model, train_toy(partial(function, model)), off)
        return trial, dict(model.named_buffers())

    off, before = attempt(lambda model, x: model(x))
    trial, after = attempt(lambda model, x: checkpoint(model, x, use_reentrant=False), off)
    well, same = attempt(lambda model, x: model[1:](checkpoint(model[0], x, use_reentrant=False)), off)
    for each, buffers in ((trial, after), (well, same)):
        differ = any(not torch.equal(buffers[name], before[name]) for name in before)
        each.seen = replace(each.seen, buffers_differ=differ)
    assert trial.seen.grad_rel_diff == 0.0
    assert told(trial) == "statistics-updated-twice"
    assert told(well) is None


# Nothing gained


def test_a_model_in_eval_mode_recomputes_nothing():
    model = build("llama")
    off = Trial(model, train(model), strategy="off")
    again = checkpointed(model, use_reentrant=False)
    facts = {"layers_expected": 4, "num_layers": 4}
    assert told(Trial(model, train(model), off, again, training=model.training, **facts)) is None
    again.clear()
    model.eval()
    trial = Trial(model, train(model), off, again, training=model.training, **facts)
    assert trial.seen.layers_recomputed == 0
    assert told(trial) == "eval-mode"


@pytest.mark.parametrize("strategy", ["off", "per-layer"])
def test_a_cache_that_training_builds(strategy):
    model = build("llama")
    if strategy != "off":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old name, which is the only one before 5.23
            model.gradient_checkpointing_enable()
    trial = Trial(model, train(model, use_cache=True), strategy=strategy, use_cache=True)
    assert trial.seen.warned_of("incompatible with gradient checkpointing") == (strategy != "off")
    assert (model(input_ids=IDS, use_cache=True).past_key_values is not None) == (strategy == "off")
    assert told(trial) == "cache-left-on"
    assert told(Trial(model, train(model), strategy=strategy)) is None


# Errors


def test_trained_parameters_in_fp16():
    def step(model: nn.Module) -> torch.Tensor:
        scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(model.parameters())
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return loss

    model = build("llama")
    assert told(Trial(model, partial(step, model), precision="fp16-mixed")) is None
    trial = Trial(model.half(), partial(step, model), precision="fp16-mixed")
    assert trial.seen.error_type == "ValueError"
    assert told(trial) == "fp16-weights-with-scaler"


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    if not distributed.is_available():
        pytest.skip("this torch has no distributed package")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_and_a_backward_pass_inside_the_backward_pass():
    for reentrant in (True, False):
        model = build("llama")
        checkpointed(model, use_reentrant=reentrant)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        trial = Trial(parallel, train(parallel), reentrant=reentrant)
        if reentrant:
            assert told(trial) == "ddp-marked-twice"
        else:
            assert told(trial) is None, trial.seen


def test_gradients_asked_for_by_name():
    layer = linear()

    def step(*, reentrant: bool) -> torch.Tensor:
        x = torch.randn(4, 8, requires_grad=True)
        loss = checkpoint(layer, x, use_reentrant=reentrant).square().sum()
        torch.autograd.grad(loss, x)
        return loss

    trial = Trial(layer, partial(step, reentrant=True), reentrant=True)
    assert told(trial) == "reentrant-with-autograd-grad"
    assert told(Trial(layer, partial(step, reentrant=False))) is None


def test_tensors_in_a_tuple():
    outer, model = linear(), nn.Sequential(Block(lambda hidden, pair: hidden * pair[0]), Block())

    def step(x: torch.Tensor) -> torch.Tensor:
        pair = (torch.tanh(outer(x)),)
        return model[1](model[0](model[0](x, pair), pair))

    checkpointed(model, use_reentrant=True)
    trial = Trial(model, train_toy(step), reentrant=True)
    assert told(trial) == "reentrant-nested-inputs"
    checkpointed(model, use_reentrant=False)
    assert told(Trial(model, train_toy(step))) is None


def test_a_state_that_keeps_its_graph_from_step_to_step():
    class Recurrent(nn.Module):
        def __init__(self, *, detach: bool) -> None:
            super().__init__()
            self.block, self.state, self.detach = Block(), torch.zeros(4, 8), detach

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.block(x + self.state)
            self.state = out.detach() if self.detach else out
            return out

    trials = {}
    for detach in (False, True):
        model = Recurrent(detach=detach)
        checkpointed(model, use_reentrant=False)
        trials[detach] = Trial(model, train_toy(model, times=2))
    trial = trials[False]
    assert told(trial) == "graph-kept-between-steps"
    assert told(trials[True]) is None


def test_a_kept_output_that_is_changed_in_place():
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    layer = linear()

    def step(activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: activation(layer(x)).sin(), x, use_reentrant=False, context_fn=contexts)

    trial = Trial(layer, train_toy(partial(step, torch.relu_)), strategy="selective")
    assert told(trial) == "selective-kept-then-mutated"
    assert told(Trial(layer, train_toy(partial(step, torch.relu)), strategy="selective")) is None


def test_a_cast_that_autocast_had_in_its_cache():
    """The trap: it makes no difference whether the policy keeps casts."""
    layer = linear()
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    run = partial(checkpoint, lambda x: layer(x).sin(), use_reentrant=False, context_fn=contexts)

    def twice(x: torch.Tensor, *, cache: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            return run(run(x))

    facts = {"strategy": "selective", "precision": "bf16-mixed"}
    trial = Trial(layer, train_toy(partial(twice, cache=True)), **facts)
    assert told(trial) == "selective-autocast-cache"
    assert told(Trial(layer, train_toy(partial(twice, cache=False)), **facts)) is None


def test_autocast_that_is_off_in_the_recomputation():
    model, autocast = nn.Sequential(linear(), nn.GELU(), linear()), {"enabled": True}

    def layer(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
            return model(x)

    def step(*, switch: bool) -> torch.Tensor:
        autocast["enabled"] = True
        loss = checkpoint(layer, torch.randn(4, 8), use_reentrant=False).float().sum()
        autocast["enabled"] = not switch
        loss.backward()
        return loss

    trial = Trial(model, partial(step, switch=True), precision="bf16-mixed")
    assert trial.seen.error_type == "CheckpointError"
    assert told(trial) == "autocast-differs"
    assert told(Trial(model, partial(step, switch=False), precision="bf16-mixed")) is None


def test_a_cast_of_inputs_that_the_recomputation_skips():
    """Simulated: FSDP2 casts again from PyTorch 2.13 on. A cast in the first pass only stands for it."""
    model = nn.Sequential(linear(), nn.GELU(), linear()).bfloat16()
    trials = {}
    for skip in (True, False):
        calls = itertools.count()

        def layer(x: torch.Tensor, skip: bool = skip, calls: Iterator[int] = calls) -> torch.Tensor:
            scaled = x if next(calls) and skip else x.bfloat16()
            return model((scaled * scaled).bfloat16())

        step = train_toy(lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False))
        trials[skip] = Trial(model, step, sharded=True, precision="bf16-mixed")
    trial = trials[True]
    assert trial.seen.error_type == "CheckpointError"
    assert told(trial) == "sharded-cast-skipped"
    assert told(trials[False]) is None


def test_a_layer_that_takes_another_branch():
    layer, training_step = linear(), {"number": 0}

    def forward(*, counting: bool, x: torch.Tensor) -> torch.Tensor:
        training_step["number"] += counting
        hidden = layer(x).sin()
        return hidden.exp().sin() if training_step["number"] % 2 else hidden.cos()

    def step(*, counting: bool) -> Step:
        training_step["number"] = 0
        return train_toy(lambda x: checkpoint(lambda x: forward(counting=counting, x=x), x, use_reentrant=False))

    trial = Trial(layer, step(counting=True))
    assert "A different number of tensors was saved" in trial.seen.error_text
    assert told(trial) == "recompute-took-another-branch"
    assert told(Trial(layer, step(counting=False))) is None


def test_a_compiled_layer_that_another_graph_recomputes():
    """Simulated: that the recomputation runs without any graph stands for one that picks another graph."""
    torch._dynamo.reset()
    model = nn.Sequential(linear(), nn.GELU(), linear(), nn.Tanh())
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")

    def step(*, stance: str) -> torch.Tensor:
        loss = checkpoint(compiled, torch.randn(4, 8), use_reentrant=False).sum()
        with torch.compiler.set_stance(stance):
            loss.backward()
        return loss

    trial = Trial(model, partial(step, stance="force_eager"), compiled=True)
    assert trial.seen.error_type == "CheckpointError"
    assert told(trial) == "compiled-recompute-differs"
    assert told(Trial(model, partial(step, stance="default"), compiled=True)) is None
    torch._dynamo.reset()


@pytest.mark.parametrize("own", [False, True], ids=["transformers", "own code"])
def test_a_cache_that_the_recomputation_fills_again(own):
    """transformers drops the cache itself where its own checkpointing is on, so a user's `checkpoint` around its layers
    is what still does this; or a cache of one's own, where torch sees sizes double that it saved."""
    if own:
        model, kept = linear(), [torch.zeros(0, 8)]

        def attend(x: torch.Tensor, *, use_cache: bool) -> torch.Tensor:
            keys = torch.cat([kept[0], model(x)]) if use_cache else model(x)
            kept[0] = keys.detach()
            return torch.softmax(x @ keys.T, -1) @ keys

        def step(*, use_cache: bool) -> Step:
            return train_toy(lambda x: checkpoint(partial(attend, use_cache=use_cache), x, use_reentrant=False))

    else:
        model = build("llama")
        model.set_attn_implementation("eager")
        for layer in layers_of(model):
            forward = layer.forward
            layer.forward = lambda hidden, forward=forward, **kwargs: checkpoint(
                partial(forward, **kwargs), hidden, use_reentrant=False
            )

        def step(*, use_cache: bool) -> Step:
            return train(model, use_cache=use_cache)

    trial = Trial(model, step(use_cache=True), use_cache=True)
    assert trial.seen.error_type == ("CheckpointError" if own else "RuntimeError")
    assert told(trial) == "cache-grows-in-recompute"
    assert told(Trial(model, step(use_cache=False))) is None
