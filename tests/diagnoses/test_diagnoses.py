"""The table of causes: a test provokes each one, and sound or unknown observations have no cause."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from trials import Trial, build, checkpointed, told, train, with_lora

from gcbench.diagnoses import known_causes
from gcbench.diagnoses.known_causes import Observation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_cause_is_provoked_and_named_by_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_diagnoses_*.py"))
    named = set(re.findall(r'assert told\(\w+\) == "([\w-]+)"', tests))
    names = [diagnosis.name for diagnosis in known_causes.known()]
    assert set(names) == named
    assert len(names) == len(set(names))
    assert set(names) == set(known_causes._FITS)


IMPERATIVES = (
    *("Add", "Call", "Compile", "Compute", "Detach", "Do", "Enter", "Keep"),
    *("Pass", "Replace", "Save", "Set", "Upgrade"),
)


@pytest.mark.parametrize("diagnosis", known_causes.known(), ids=lambda diagnosis: diagnosis.name)
def test_a_cause_reads_as_sentences_with_a_remedy_and_a_thread(diagnosis):
    for sentence in (diagnosis.symptom, diagnosis.cause, diagnosis.remedy):
        assert re.fullmatch(r"[A-Z][^\n]{20,250}\.", sentence), sentence
    assert diagnosis.remedy.split()[0] in IMPERATIVES, diagnosis.remedy
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+", diagnosis.link)


def test_every_entry_summarises_its_thread():
    text = Path(known_causes.__file__).with_suffix(".toml").read_text(encoding="utf-8")
    assert len(re.findall(r"\n\n# [^\n]+\n\[\[diagnosis\]\]\n", text)) == len(known_causes.known())


def test_the_table_needs_no_torch():
    code = (
        "import sys; from gcbench.diagnoses import known_causes; known_causes.known(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_sound_step_has_no_cause(family, frozen, reentrant):
    """The trap: a cause inferred from the settings alone."""
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
def test_an_unknown_problem_has_no_cause(seen):
    """Including differences in the forward pass, which recomputation does not cause."""
    assert told(seen) is None
