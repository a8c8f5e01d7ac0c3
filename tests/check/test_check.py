"""`gcbench check`: verdicts on real small steps, each against off, and nothing that one combination does to another."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

from gcbench.check import cases as checks
from gcbench.check import view
from gcbench.check import worker as checker
from gcbench.check.cases import FAILED, IDENTICAL, UNSUPPORTED, WITHIN_NOISE, WRONG, CheckSetting, Combination
from gcbench.check.task import CheckTask, ReferenceRun
from gcbench.checkpointing import apply as checkpointing
from gcbench.core import json_codec
from gcbench.models import sources

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--full-size", "--device", "cpu", "--seq-len", 16, "--no-compile")


def task(folder, combinations, **changes):
    source = sources.resolve(str(folder))
    defaults = {"layers": None, "overrides": {}, "device": "cpu", "full_size": True}
    return CheckTask(
        source=source,
        combinations=tuple(enumerate(combinations)),
        **{**defaults, "batch_size": 2, "seq_len": 16, "seed": 0, **changes},
    )


def results(requested):
    """The results of a child, in this process."""
    events = []
    answer = checker.check(requested, events.append)
    assert answer.refusal is None, answer
    found = [result for result in events if not isinstance(result, ReferenceRun)]
    return {requested.combinations[r.number][1]: r for r in found}


PLAIN = CheckSetting()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2", "bloom"])
def test_every_strategy_has_the_gradients_of_off(model, family):
    """Dropout, experts, two kinds of masks, layers that return tuples."""
    combinations = [Combination(setting=PLAIN, strategy=strategy) for strategy in checks.DEFAULT_STRATEGIES]
    found = results(task(model(family), combinations))
    assert {c.strategy: r.verdict for c, r in found.items()} == dict.fromkeys(checks.DEFAULT_STRATEGIES, IDENTICAL)
    for combination, result in found.items():
        expected = {"every:2": 2, "first:1": 1}.get(combination.strategy, tiny.NUM_LAYERS)
        assert result.layers_expected == result.layers_recomputed == expected, combination
        assert result.grad_rel_diff == result.noise == 0.0
        assert (result.message, result.cause, result.params_without_grad) == (None, None, ())


def test_sharing_a_process_changes_no_answer(model):
    """Each combination alone, all together and all in reverse have the same results, whatever failed before them."""
    settings = [
        PLAIN,
        CheckSetting(tuned=checks.LORA),
        CheckSetting(precision="bf16-mixed"),
        CheckSetting(tuned=checks.FROZEN_BASE),
    ]
    cases = [Combination(setting=s, strategy=name) for name in ("reentrant", "segment:2", "every:2") for s in settings]
    folder = model("gpt2")

    def outcomes(combinations):
        return {
            combination: json_codec.encode(result) | {"number": None, "steps_s": None}
            for combination, result in results(task(folder, combinations)).items()
        }

    together = outcomes(cases)
    assert {result["verdict"] for result in together.values()} == {IDENTICAL, FAILED}
    assert outcomes(list(reversed(cases))) == together
    assert {combination: outcomes([combination])[combination] for combination in cases} == together


def test_a_wrong_recompute_is_called_wrong_with_its_cause(model, monkeypatch):
    """Other dropout masks: the loss is the same and the gradients are not. The cause is named where it is known."""
    real = checkpointing.checkpoint

    def forgetful(*args, **kwargs):
        return real(*args, **kwargs, preserve_rng_state=False)

    monkeypatch.setattr(checkpointing, "checkpoint", forgetful)
    combination = Combination(setting=PLAIN, strategy="per-layer")
    result = results(task(model("gpt2"), [combination]))[combination]
    assert result.verdict == WRONG
    assert 0.05 < result.grad_rel_diff < 1
    assert result.worst_param is not None
    assert "differ from those of off" in result.message


def test_a_layer_that_is_not_recomputed_is_called_wrong(model, monkeypatch):
    real = checkpointing.apply_groups

    def lazy(model, layers, groups, counter):
        return real(model, layers, groups[:-1], counter)

    monkeypatch.setattr(checkpointing, "apply_groups", lazy)
    combination = Combination(setting=PLAIN, strategy="per-layer")
    result = results(task(model("llama"), [combination]))[combination]
    assert (result.verdict, result.message) == (WRONG, "recomputed 3 of 4 layers")


def test_parameters_that_lost_their_gradient_are_named(model):
    """Reentrant below a frozen embedding: no error, no gradient. Known, so its remedy is shown."""
    combination = Combination(setting=CheckSetting(tuned=checks.FROZEN_BASE), strategy="reentrant")
    result = results(task(model("llama"), [combination]))[combination]
    assert result.verdict == WRONG
    assert all(name.startswith(("model.layers.2", "model.layers.3")) for name in result.params_without_grad)
    assert "use_reentrant=False" in result.remedy
    assert result.link.startswith("https://github.com/")


@pytest.mark.parametrize(
    ("family", "strategy", "words"),
    [
        ("llama", "offload", "on a CPU they are there already"),
        ("llama", "every:9", "needs at least 9 layers"),
        ("ctrl", "per-layer", "does not support gradient checkpointing"),
    ],
)
def test_an_impossible_strategy_is_unsupported(model, family, strategy, words):
    combination = Combination(setting=PLAIN, strategy=strategy)
    result = results(task(model(family), [combination]))[combination]
    assert result.verdict == UNSUPPORTED
    assert words in result.message


def test_a_setting_that_fails_without_checkpointing_is_unsupported(model):
    """gemma2 refuses sdpa: the reference fails, so there is nothing to compare a strategy with."""
    combination = Combination(setting=CheckSetting(attn_implementation="flash_attention_2"), strategy="per-layer")
    result = results(task(model("llama"), [combination]))[combination]
    assert result.verdict == UNSUPPORTED
    assert "does not run without checkpointing either" in result.message


def test_compiled_layers_are_compared_within_the_noise_of_their_kernels(model):
    """With dropout: compiled layers draw it as others do, or they would all be wrong."""
    combination = Combination(setting=PLAIN, strategy="per-layer+compile")
    result = results(task(model("gpt2"), [combination]))[combination]
    assert result.verdict in (IDENTICAL, WITHIN_NOISE), result
    assert result.layers_recomputed is None


# Gradients


def gradients(**by_name):
    return checker.Gradients({name: torch.tensor(values) for name, values in by_name.items()}, ())


def test_the_difference_of_gradients_is_that_of_the_textbook():
    ours, theirs = gradients(a=[3.0, 4.0], b=[0.0]), gradients(a=[3.0, 1.0], b=[4.0])
    difference, worst = ours.difference(theirs)
    assert difference == pytest.approx(5 / math.sqrt(26))
    assert worst == "b"
    assert ours.difference(ours) == (0.0, None)
    assert ours.difference(gradients(a=[3.0, 4.0])) == (math.inf, "b")
    assert not gradients(a=[math.nan]).is_finite


# The combinations


def test_by_default_one_thing_differs_at_a_time():
    combinations = checks.combinations()
    assert len(combinations) >= 40
    assert len(set(combinations)) == len(combinations)
    settings = {combination.setting for combination in combinations}
    labels = {setting.label for setting in settings}
    assert {"plain", "bf16", "bf16-mixed", "fp16-mixed", "adafactor", "sgd", "eager", "lora", "frozen-base"} <= labels
    assert {c.strategy for c in combinations if c.setting == PLAIN} == {*checks.DEFAULT_STRATEGIES, *checks.COMPILED}
    assert "offload" in {c.strategy for c in checks.combinations(on_cuda=True)}
    assert not any("compile" in c.strategy for c in checks.combinations(compiled=False))


def test_chosen_values_are_combined_with_each_other():
    combinations = checks.combinations(
        chosen_strategies=["per-layer", "segment:2"], precisions=["bf16", "fp32"], tuned=["lora"], compiled=True
    )
    assert len(combinations) == 4
    assert {(c.strategy, c.setting.precision, c.setting.tuned) for c in combinations} == {
        (strategy, precision, "lora") for strategy in ("per-layer", "segment:2") for precision in ("bf16", "fp32")
    }


# The command


def test_a_check_from_the_command_line(cli, model, tmp_path):
    folder = tmp_path / "check"
    flags = ("--strategies", "off,per-layer,segment:2", "--train", "full,lora", "--optim", "sgd")
    result = cli("check", "-m", model(), *QUICK, *flags, "--json", "--out", folder)
    assert result.code == 0, result.err
    rows = result.document["rows"]
    assert [(row["strategy"], row["tuned"], row["verdict"]) for row in rows] == [
        (strategy, tuned, IDENTICAL) for tuned in ("full", "lora") for strategy in ("per-layer", "segment:2")
    ]
    assert all(row["optim"] == "sgd" and row["layers_recomputed"] == 4 for row in rows)
    assert {path.name for path in folder.iterdir()} == {"check.json", "check.md"}
    stored = json_codec.decode(checks.Check, json.loads((folder / "check.json").read_text()))
    assert [json_codec.encode(row) for row in checks.rows(stored)] == rows
    assert view.markdown(stored) == (folder / "check.md").read_text()
    text = view.plain(stored, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "4 of 4 combinations train with the gradients of off, bit-identical." in text


def test_the_exit_code_is_for_what_a_user_would_run(cli, model):
    """Reentrant is known to fail with LoRA, which is shown and ends with 0; any other failing strategy ends with 1."""
    flags = ("-m", model(), *QUICK, "--train", "lora", "--strategies")
    forgiven = cli("check", *flags, "reentrant")
    assert forgiven.code == 0, forgiven.err
    assert "reentrant with lora" in forgiven.out
    assert "use_reentrant=False" in forgiven.out
    assert "does not fail the check" in forgiven.out


def test_a_wrong_combination_ends_with_one(cli, model, monkeypatch):
    """A family whose layers cannot be recomputed as they are: the child sees the same wrong module as a user would."""
    wrong = checks.CheckResult(number=0, verdict=WRONG, grad_rel_diff=0.3, message="the gradients differ")

    class Children:
        def __init__(self, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

        def run(self, requested, *, on_event, timeout_s):
            from gcbench.core.records import Machine, ModelFacts
            from gcbench.processes.messages import Answer

            if isinstance(requested, CheckTask):
                on_event(wrong)
            facts = ModelFacts(
                model="m",
                model_type="llama",
                num_params=1,
                num_layers=4,
                max_seq_len=None,
                attn_implementation=None,
                checkpointing_refusal=None,
            )
            return Answer(
                machine=Machine(device="cpu", device_name="CPU", device_memory_bytes=None, platform="p"), facts=facts
            )

    from gcbench.check import session as check_session

    monkeypatch.setattr(check_session, "ForkedChildren", Children)
    result = cli("check", "-m", model(), *QUICK, "--strategies", "per-layer", "--precision", "fp32")
    assert result.code == 1
    assert "✗ per-layer with plain" in result.out
    assert "per-layer with plain did not train as off does" in result.err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--strategies", "banana"), 2, "there is no strategy 'banana'"),
        (("--strategies", "reentrant+selective:matmul"), 2, "leave one out"),
        (("--strategies", "selective:matmull/mm"), 2, "no operator 'matmull'"),
        (("--strategies", "off"), 2, "what all others are compared with; name another"),
        (("--precision", "bf17"), 2, "did you mean bf16?"),
        (("--train", "half"), 2, "legal are full, lora, frozen-base"),
        (("--batch", "1,2"), 2, "a check takes one value"),
        (("--optim", ""), 2, "has an empty item"),
        (("--device", "tpu"), 2, "legal are auto, cpu, cuda"),
    ],
)
def test_bad_input_is_one_sentence(cli, model, flags, code, words):
    cli("check", "-m", model(), *QUICK, *flags).refused(code, words)


def test_a_child_that_dies_costs_one_combination():
    """The next child goes on with the others."""
    from gcbench.check import session as check_session
    from gcbench.core.records import Failure, Machine, ModelFacts
    from gcbench.processes.messages import Answer

    facts = ModelFacts(
        model="m",
        model_type="llama",
        num_params=1,
        num_layers=4,
        max_seq_len=None,
        attn_implementation=None,
        checkpointing_refusal=None,
    )

    class Children:
        def run(self, requested, *, on_event, timeout_s):
            if not isinstance(requested, CheckTask):
                return Answer(machine=Machine(device="cpu", device_name="CPU", device_memory_bytes=None, platform="p"))
            for number, combination in requested.combinations:
                if combination.strategy == "segment:2":
                    return Answer(failure=Failure(kind="crash", message="it fell over"))
                on_event(checks.CheckResult(number=number, verdict=IDENTICAL))
            return Answer(facts=facts)

    wanted = check_session.CheckOptions(
        model="m", strategies=("per-layer", "segment:2", "every:2"), precisions=("fp32",)
    )
    done = check_session.run(wanted, source=None, children=Children(), command="check")
    assert [(result.verdict, result.message) for result in done.results] == [
        (IDENTICAL, None),
        (FAILED, "it fell over"),
        (IDENTICAL, None),
    ]
    assert [failure.strategy for failure in done.failures] == ["segment:2"]
