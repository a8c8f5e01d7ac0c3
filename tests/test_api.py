"""`gcbench.apply` and `gcbench.remove` on models of a user's own: as measured while on, and as if never on after."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ROOT
from processes import PROCESS_TIMEOUT_S
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from toys import Toy
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

import gcbench
from gcbench import api, checkpointing, training
from gcbench.devices import open_device
from gcbench.segments import NotASegment

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = (0, 1, 2, 3)
RECOMPUTED = {
    "off": (),
    "per-layer": ALL,
    "every:2": (0, 2),
    "first:3": (0, 1, 2),
    "last:1": (3,),
    "segment:2": ALL,
    "segment:3": ALL,
    "selective:matmul": ALL,
    "every:2+selective:attention": (0, 2),
    "segment:2+selective:matmul": ALL,
    "reentrant": ALL,
}
LLAMA_LIKE = {name: value for name, value in tiny.CONFIGS["llama"].items() if name != "model_type"}
LLAMA_LIKE["pad_token_id"] = 0
GEMMA3 = {
    "text_config": {"head_dim": 8, "sliding_window": 16, **LLAMA_LIKE},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 250,
    "eoi_token_index": 251,
    "image_token_index": 252,
}


def config_of(family, **changes):
    values = {**tiny.CONFIGS[family], **changes}
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def build(family="llama", **changes):
    """In train(), and without a cache, as with one the attention of gpt2 rounds otherwise."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **{"use_cache": False, **changes})).train()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """gpt2 has dropout, whose masks a recomputation has to draw again."""
    return build(request.param)


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(2, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


class Calls(Counter):
    """How often each layer's part has run, by (phase, number): what really runs, whoever counts.

    A layer's own hooks are outside of what is checkpointed, those of its parts are not.
    """

    def __init__(self, model):
        super().__init__()
        self.phase = "forward"
        self.hooks = []
        for number, layer in enumerate(checkpointing.checkpointable_layers(model)):
            part = list(layer.children())[-1]
            self.hooks.append(part.register_forward_pre_hook(lambda *call, number=number: self.note(number)))

    def note(self, number):
        self[self.phase, number] += 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()


def step(model, inputs, calls=None):
    """The gradients of one pass of a user's own loop, dropout the same in each."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**inputs).loss
    if calls is not None:
        calls.phase = "backward"
    loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def runs_again(model, inputs):
    """The layers that a backward pass runs again; each must do so once."""
    with Calls(model) as calls:
        step(model, inputs, calls)
    assert set(calls.values()) == {1}
    return tuple(sorted(number for phase, number in calls if phase == "backward"))


def differing(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def state(model):
    """All that `apply` could leave behind: each module's attributes and hooks, and torch's global settings."""
    tables = ("_parameters", "_buffers", "_modules")
    modules = {
        name: {
            key: sorted(map(repr, value)) if isinstance(value, dict) else value if value is None else id(value)
            for key, value in vars(module).items()
            if key not in tables
        }
        for name, module in model.named_modules()
    }
    caches = [module.config.use_cache for module in model.modules() if hasattr(module, "config")]
    return modules, caches, torch._functorch.config.activation_memory_budget


def enable(model, **kwargs):
    """Transformers' own checkpointing, in the spelling of this version."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False}, **kwargs)


# Applied


@pytest.mark.parametrize("spec", RECOMPUTED)
def test_gradients_stay_and_layers_run_again(model, inputs, spec):
    off = step(model, inputs)
    applied = gcbench.apply(model, spec)
    assert differing(step(model, inputs), off) == []
    assert applied.recomputed == set(RECOMPUTED[spec])
    applied.reset()
    assert applied.recomputed == set()
    assert runs_again(model, inputs) == RECOMPUTED[spec]
    gcbench.remove(model)
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == ()


def test_a_plan_is_taken_as_it_is_and_from_a_file(tmp_path, model, inputs):
    off = step(model, inputs)
    plan = gcbench.Plan(num_layers=4, groups=((1, 2), (3,)), policies=(gcbench.Policy(), gcbench.Policy(keep=("mm",))))
    assert gcbench.apply(model, plan).plan == plan
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == (1, 2, 3)
    file = tmp_path / "Plan.json"
    file.write_text(json.dumps({"groups": [{"layers": [2]}]}), encoding="utf-8")
    assert gcbench.apply(model, f"plan:{file}").plan == gcbench.Plan(num_layers=4, groups=((2,),))
    assert runs_again(model, inputs) == (2,)


def test_one_line_after_from_pretrained(tmp_path, inputs):
    build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    gcbench.apply(model, "per-layer")
    assert not model.training
    assert runs_again(model, inputs) == ()
    assert runs_again(model.train(), inputs) == ALL


def test_operators_are_kept(inputs):
    """The trap: a policy that gets lost recomputes all, with the same gradients and the same counts."""
    model, products = build(), {}

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products[spec] += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    for spec in ("off", "per-layer", "selective:matmul", "segment:2", "segment:2+selective:matmul"):
        products[spec] = 0
        gcbench.apply(model, spec)
        with Products():
            step(model, inputs)
    assert products["off"] < products["per-layer"]
    assert products["segment:2"] == products["per-layer"] + 2  # the last product of a group is not needed again
    assert products["off"] == products["selective:matmul"] == products["segment:2+selective:matmul"]


@pytest.fixture
def offloading(monkeypatch):
    """On a CPU, to memory that is not pinned: the shapes of what was moved."""
    moved = []

    def save_on_host():
        hooks = torch.autograd.graph.save_on_cpu(pin_memory=False)
        moves = hooks.pack_hook
        hooks.pack_hook = lambda tensor: (moved.append(tensor.shape), moves(tensor))[1]
        return hooks

    monkeypatch.setattr(checkpointing, "save_on_host", save_on_host)
    monkeypatch.setattr(api, "unsupported", lambda plan, kind: None)
    return moved


def test_what_is_offloaded_runs_again_from_the_hosts_memory(offloading, model, inputs):
    off = step(model, inputs)
    gcbench.apply(model, "every:2+offload")
    assert differing(step(model, inputs), off) == []
    assert offloading == [(2, 8, 32)] * 2
    assert runs_again(model, inputs) == (0, 2)


def test_nothing_is_recomputed_in_eval(inputs):
    model = build()
    applied = gcbench.apply(model, "per-layer")
    assert runs_again(model.eval(), inputs) == ()
    assert applied.recomputed == set()


def test_no_cache_is_built(inputs):
    """By default a forward pass of a layer that keeps everything fills a cache, which training never reads."""
    model = build(use_cache=True)
    before = state(model)
    assert model(**inputs).past_key_values is not None
    gcbench.apply(model, "every:2")
    assert model(**inputs).past_key_values is None
    gcbench.remove(model)
    assert state(model) == before
    assert model(**inputs).past_key_values is not None


# Removed, and applied again


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")  # the compiler, as it is first imported
@pytest.mark.parametrize("spec", [*RECOMPUTED, "compile", "compile:0.5", "per-layer+compile"])
def test_nothing_is_left_behind(model, spec):
    before = state(model)
    gcbench.apply(model, spec)
    assert state(model) != before
    gcbench.remove(model)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
def test_compiled_layers_and_the_budget_are_set():
    model = build()
    applied = gcbench.apply(model, "compile:0.5")
    assert torch._functorch.config.activation_memory_budget == 0.5
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert applied.recomputed is None
    gcbench.apply(model, "compile:0.25")
    gcbench.remove(model)
    assert torch._functorch.config.activation_memory_budget == 1.0
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_memory_goes_down_and_comes_back():
    """To the byte: the peaks of a step, before, while and after."""
    model = build(vocab_size=64)
    batch = training.random_batch(model, batch_size=2, seq_len=64, seed=0)
    one = training.TrainingStep(model, batch=batch, precision="fp32", optim="sgd", seed=0)

    def peaks():
        with open_device("cpu").probe_memory() as probe:
            one(probe.on_phase)
            one(probe.on_phase)
        found = probe.peaks()
        return found.forward_bytes, found.backward_bytes, found.optimizer_bytes

    before = peaks()
    gcbench.apply(model, "per-layer")
    while_on = peaks()
    gcbench.remove(model)
    assert while_on[0] < before[0] and while_on[1] < before[1]
    assert peaks() == before


@pytest.mark.parametrize("first", ["per-layer", "segment:2", "reentrant", "selective:matmul"])
def test_a_second_strategy_takes_the_place_of_the_first(model, inputs, first):
    """The trap: hooks and layers of the first that stay switched on."""
    before, off = state(model), step(model, inputs)
    gcbench.apply(model, "last:1")
    alone = state(model)
    gcbench.remove(model)
    gcbench.apply(model, first)
    gcbench.apply(model, "last:1")
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == (3,)
    hooks = [{name: vars_["_forward_hooks"] for name, vars_ in found[0].items()} for found in (alone, state(model))]
    assert hooks[0] == hooks[1]
    gcbench.remove(model)
    assert state(model) == before


def test_removing_twice_or_what_was_never_applied_does_nothing(model):
    before = state(model)
    gcbench.remove(model)
    assert state(model) == before
    gcbench.apply(model, "per-layer")
    gcbench.remove(model)
    enable(model)
    enabled = state(model)
    gcbench.remove(model)
    assert state(model) == enabled


@pytest.mark.parametrize("stride", [1, 2])
def test_transformers_own_checkpointing_is_replaced_and_put_back(model, inputs, stride):
    enable(model, every_n_layers=stride)
    before, own = state(model), runs_again(model, inputs)
    assert own == ALL[::stride]
    gcbench.apply(model, "last:1")
    assert runs_again(model, inputs) == (3,)
    gcbench.apply(model, "off")
    assert runs_again(model, inputs) == ()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    gcbench.remove(model)
    assert state(model) == before
    assert runs_again(model, inputs) == own


def test_a_model_that_is_let_go_is_gone():
    for spec in ("per-layer", "segment:2", "reentrant"):
        model = build()
        gcbench.apply(model, spec)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None, spec


@pytest.mark.parametrize("spec", ["every:2", "selective:matmul"])
def test_a_copy_is_a_model_of_its_own(inputs, spec):
    """As an average of the weights is made."""
    model = build()
    before = state(model)
    applied = gcbench.apply(model, spec)
    twin = copy.deepcopy(model)
    assert runs_again(twin, inputs) == RECOMPUTED.get(spec, ALL)
    assert applied.recomputed == set()
    gcbench.remove(twin)
    assert runs_again(twin, inputs) == ()
    assert runs_again(model, inputs) == RECOMPUTED[spec]
    gcbench.remove(model)
    assert state(model) == before


# Wrapped


def peft_model(base):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers by a name that is on its way out
        return peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )


def open_adapters(model):
    """As after some steps: in the first, gradients of half the adapters are zero."""
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)


@pytest.mark.parametrize("spec", ["per-layer", "segment:2+selective:matmul", "reentrant"])
def test_adapters_of_peft(inputs, spec):
    """The trap in `reentrant`: no layer's input asks for gradients where the embedding is frozen, so none get any."""
    model = peft_model(build())
    open_adapters(model)
    before, off = state(model), step(model, inputs)
    assert len(off) == 2 * 2 * tiny.NUM_LAYERS
    gcbench.apply(model, spec)
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == ALL
    gcbench.remove(model)
    assert state(model) == before
    assert differing(step(model, inputs), off) == []


def assert_nothing_is_watched():
    watching = torch._C._autograd._top_saved_tensors_default_hooks(True)
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # the next test shall not suffer
        torch._C._autograd._pop_saved_tensors_default_hooks()
    assert watching is None


class Broken(Exception):
    pass


class Around(torch.nn.Module):
    """Calls the `forward` of the model inside, as peft 0.18 does, and not the model: none of its hooks fire."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner.forward(**inputs)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_forward_pass_cut_short_ends_its_segment_whoever_calls_the_model(inputs, has_head):
    """The trap: it would watch on, and all that is saved for a backward pass later would be part of it."""
    base = (AutoModelForCausalLM if has_head else AutoModel).from_config(config_of("llama")).train()
    layers = checkpointing.checkpointable_layers(base)
    model = Around(base)
    gcbench.apply(model, "segment:4")

    def fail(*call):
        raise Broken

    hook = layers[2].register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        model(input_ids=inputs["input_ids"])
    assert_nothing_is_watched()
    hook.remove()
    model(input_ids=inputs["input_ids"])[0].sum().backward()
    assert_nothing_is_watched()


def test_what_holds_a_model_may_be_taken_away_or_put_around_it(inputs):
    model = build()
    holder = torch.nn.ModuleDict({"policy": model, "head": torch.nn.Linear(2, 2)})
    before = state(model)
    gcbench.apply(holder, "first:1")
    assert runs_again(model, inputs) == (0,)
    gcbench.apply(model, "last:1")
    assert runs_again(model, inputs) == (3,)
    gcbench.remove(holder)
    assert state(model) == before


def test_a_prepared_model(inputs):
    accelerate = pytest.importorskip("accelerate")
    model = build()
    off = step(model, inputs)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="no").prepare(model)
    gcbench.apply(prepared, "every:2")
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == (0, 2)


class Compilable(Toy):
    supports_gradient_checkpointing = True

    def forward(self, input_ids, labels):
        hidden = self.run(self.embed(input_ids), {})
        logits = self.head(self.norm(hidden))
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


SKIPPING = gcbench.Plan(
    num_layers=3, groups=((1,),), policies=(gcbench.Policy(keep=("relu", "addmm#1"), skip=("addmm#0",)),)
)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method", "ignore:The .grad attribute")  # the compiler's own
@pytest.mark.parametrize(
    ("spec", "first", "counted"),
    [
        ("per-layer", "compile", None),
        ("per-layer", "apply", None),
        ("selective:addmm", "apply", None),
        ("segment:3", "compile", {0, 1, 2}),
        ("reentrant", "apply", {0, 1, 2}),
        (SKIPPING, "apply", {1}),
        ("offload", "apply", {0, 1, 2}),
    ],
    ids=["per-layer-late", "per-layer", "selective", "segment-late", "reentrant", "skipping", "offload"],
)
def test_a_compiled_model(offloading, spec, first, counted):
    """The traps: a compiler that cannot see through what counts fails, and makes layers of a segment that do not agree
    with their recomputation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Compilable("aaa").train()
    ids = torch.randint(2, 50, (2, 4))
    inputs = {"input_ids": ids, "labels": ids}
    off = step(model, inputs)
    if first == "apply":
        applied = gcbench.apply(model, spec)
    compiled = torch.compile(model, backend="aot_eager")
    if first == "compile":
        step(compiled, inputs)
        applied = gcbench.apply(compiled, spec)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step(compiled, inputs)
    for name, grad in off.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert applied.recomputed == counted
    gcbench.remove(compiled)
    torch._dynamo.reset()
    assert differing(step(model, inputs), off) == []


# The order of layers


HALF = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}


def text_only(family):
    if family == "gemma3":
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"](**GEMMA3))
    from transformers.models.mllama import modeling_mllama as mllama

    values = {**LLAMA_LIKE, "num_hidden_layers": 6}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return mllama.MllamaForCausalLM(
        mllama.MllamaTextConfig(**values, cross_attention_layers=[1, 5], rope_parameters=rope)
    )


@pytest.mark.parametrize(
    ("family", "num_layers", "spec", "numbers"),
    [
        ("gemma3", 7, "first:2", (3, 4)),
        ("gemma3", 7, "segment:2", (3, 4, 5, 6)),
        ("gemma3", 7, "every:2", (0, 2, 4, 6)),
        ("mllama", 6, "last:2", (3, 4)),
    ],
)
def test_layers_are_counted_as_training_on_text_runs_them(inputs, family, num_layers, spec, numbers):
    """The traps: layers for images at the front, and in one list with the others. A stride counts all, as in
    transformers."""
    model = text_only(family).train()
    random_state, attention = torch.get_rng_state(), model.config._attn_implementation
    applied = gcbench.apply(model, spec)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.config._attn_implementation == attention
    assert applied.plan.num_layers == num_layers
    assert sum(applied.plan.groups, ()) == numbers
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if family == "gemma3" else {}
    model(**inputs, **types).loss.backward()
    assert applied.recomputed == {number for number in numbers if number > 2 or family != "gemma3"}


def test_the_caches_of_all_parts_are_put_back():
    model = text_only("gemma3")
    texts = [model.config.get_text_config(), model.model.language_model.config]
    texts[0].use_cache = True
    gcbench.apply(model, "per-layer")
    assert [config.use_cache for config in texts] == [False, False]
    gcbench.remove(model)
    assert [config.use_cache for config in texts] == [True, True]


@pytest.mark.parametrize(("spec", "groups"), [("segment:2", ((0, 1), (2, 3))), ("last:1", ((3,),))])
def test_both_halves_of_an_encoder_and_decoder(inputs, spec, groups):
    """Their layers lie in two lists: the order is looked up, and groups are watched through what holds both."""
    torch.manual_seed(0)
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in HALF.items()}
    model = BartForConditionalGeneration(BartConfig(vocab_size=256, d_model=32, use_cache=False, **sizes)).train()
    off = step(model, inputs)
    assert gcbench.apply(model, spec).plan.groups == groups
    assert differing(step(model, inputs), off) == []
    assert runs_again(model, inputs) == sum(groups, ())


def test_an_ordinary_model_is_not_run_to_learn_its_order(monkeypatch, model):
    looks = []

    def fail(*call):
        looks.append(call)
        raise Broken

    monkeypatch.setattr(api, "_order_of_twin", fail)
    for spec in ("first:2", "segment:2", "per-layer"):
        assert gcbench.apply(model, spec).plan.num_layers == 4
    assert looks == []
    monkeypatch.setattr(api, "_are_alike_in_one_list", lambda *call: False)
    assert gcbench.apply(model, "first:2").plan.groups == ((0,), (1,))  # in `modules()` order where no look is possible
    assert len(looks) == 1


# Mistakes


class Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.policy, self.reference = build(), build()


@pytest.mark.parametrize(
    ("make", "strategy", "error", "words"),
    [
        (build, "per-leyer", ValueError, r"no strategy 'per-leyer'; did you mean per-layer\?"),
        (build, "every:9", ValueError, "every:9 needs at least 9 layers and the model has 4; take"),
        (build, "selective:mn", ValueError, r"^torch .* has no operator 'mn'; near names: min"),
        (build, 3, TypeError, "3 is no strategy; give one by name, like 'per-layer', or a gcbench.Plan"),
        (build, None, TypeError, "None is no strategy; give"),
        (build, gcbench.Plan(num_layers=3), ValueError, "plan is for 3 layers and LlamaForCausalLM has 4; make one"),
        (
            build,
            gcbench.Plan(num_layers=4, groups=((0,),), policies=(gcbench.Policy(keep=("nothing_like_it",)),)),
            ValueError,
            "has no operator 'nothing_like_it'; write",
        ),
        (build, "plan:nowhere.json", ValueError, "nowhere.json cannot be read .*; give"),
        (lambda: build("ctrl"), "per-layer", ValueError, "CTRLLMHeadModel does not support .*; train it without"),
        (lambda: torch.nn.Linear(2, 2), "off", ValueError, "Linear does not support .*; train it without"),
        (Several, "off", ValueError, r"holds several models \(LlamaForCausalLM and LlamaForCausalLM\); give the one"),
        (lambda: "llama", "off", TypeError, "'llama' is no model; give"),
    ],
)
def test_mistakes_are_told_with_what_to_do(make, strategy, error, words):
    with pytest.raises(error, match=words) as told:
        gcbench.apply(make(), strategy)
    assert ";" in str(told.value) and "--" not in str(told.value)


def test_offload_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="on a CPU it is there already; leave it out"):
        gcbench.apply(build(), "offload")


def test_layers_that_torch_would_recompute_as_well_are_refused():
    model = build()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    with pytest.raises(ValueError, match="recomputed twice; leave activation checkpointing out of the FSDP settings"):
        gcbench.apply(model, "per-layer")


def test_a_mistake_changes_nothing(model, inputs):
    gcbench.apply(model, "every:2")
    before = state(model)
    for wrong in ("every:9", "first:9", "nonsense", gcbench.Plan(num_layers=9), "selective:mn"):
        with pytest.raises(ValueError):
            gcbench.apply(model, wrong)
    assert state(model) == before
    assert runs_again(model, inputs) == (0, 2)


class Scaling(Compilable):
    def run(self, hidden, masks):
        for layer in self.layers:
            hidden = layer(hidden, masks) * 2
        return hidden


def test_a_group_that_does_not_run_as_one_says_what_to_take(inputs):
    model = Scaling("aa").train()
    gcbench.apply(model, "segment:2")
    ids = inputs["input_ids"] % 50
    with pytest.raises(NotASegment, match="between the layers of a group; take groups of one layer, such as per-layer"):
        model(ids, ids)
    assert_nothing_is_watched()


# Imported


def test_only_what_trains_imports_torch():
    probe = (
        "import sys, gcbench\n"
        "assert gcbench.Plan(num_layers=1, groups=((0,),), policies=(gcbench.Policy(),)).layers_checkpointed == 1\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert {'apply', 'remove', 'Plan', 'Policy'} <= set(gcbench.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, timeout=PROCESS_TIMEOUT_S)
    assert gcbench.apply is api.apply and gcbench.remove is api.remove
    with pytest.raises(AttributeError, match="module 'gcbench' has no attribute 'appply'"):
        _ = gcbench.appply


def test_transformers_own_function_still_checkpoints_by_the_same_switch():
    """What `apply` relies on: a flag and a function of each layer, which `enable` sets too."""
    model = build()
    enable(model)
    assert {layer._gradient_checkpointing_func.func for layer in model.model.layers} == {checkpoint}
