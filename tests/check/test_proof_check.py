"""What `gcbench check` finds of models that draw random numbers: right, wrong, or nothing that could be shown."""

from __future__ import annotations

import math

import drawing
import pytest

from gcbench.check import worker as checker
from gcbench.check.cases import IDENTICAL, NOT_REPEATABLE, WITHIN_NOISE, WRONG, CheckSetting, Combination
from gcbench.check.task import CheckTask, ReferenceRun
from gcbench.models import sources

pytestmark = pytest.mark.usefixtures("one_thread")


def results(folder, *strategies, precision="fp32"):
    """Strategy -> its result, in this process."""
    setting = CheckSetting(precision=precision)
    combinations = [Combination(setting=setting, strategy=strategy) for strategy in strategies]
    events = []
    task = CheckTask(
        source=sources.resolve(str(folder), pretrained=False, trust_remote_code=True),
        layers=None,
        overrides={},
        device="cpu",
        full_size=True,
        combinations=tuple(enumerate(combinations)),
        batch_size=2,
        seq_len=8,
        seed=0,
    )
    answer = checker.check(task, events.append)
    assert answer.refusal is None, answer
    return {combinations[r.number].strategy: r for r in events if not isinstance(r, ReferenceRun)}


WRONG_DRAWS = {
    "Python": {"inner": "mask(random.random, 2 * width)"},
    "NumPy": {"inner": "mask(np.random.rand, 2 * width)"},
    "a factor before a product": {"inner": "(1 + random.random())"},
    "NumPy's generator of the layer": {
        "init": "self.rng = np.random.default_rng()",
        "inner": "mask(self.rng.random, 2 * width)",
    },
    "Python's generator of the layer": {
        "init": "self.rng = random.Random(0)",
        "inner": "mask(self.rng.random, 2 * width)",
    },
    "torch's generator of the layer": {
        "init": "self.rng = torch.Generator()",
        "inner": "torch.rand(2 * width, generator=self.rng)",
    },
    "a custom function": {"module": drawing.FUNCTION, "factor": "Masked.apply(y)"},
}


@pytest.mark.parametrize("code", WRONG_DRAWS.values(), ids=WRONG_DRAWS)
def test_a_mask_that_is_drawn_again_in_the_recomputation_is_wrong(tmp_path, code):
    """The trap: with torch alone seeded, off differs from itself as much, and twice that was called noise."""
    found = results(drawing.write(tmp_path / "m", **code), "per-layer", "every:2", "reentrant")
    for strategy, result in found.items():
        assert result.verdict == WRONG, (strategy, result)
        assert result.noise == 0.0
        assert result.grad_rel_diff > 0.03
        if "rng" not in str(code) or strategy != "reentrant":
            assert "random number" in result.cause, "the reentrant variant is not to blame"
            assert "torch's global generator" in result.remedy


RIGHT_DRAWS = {
    "torch": {"inner": "torch.rand(2 * width)"},
    "a factor at the end of a layer": {"factor": "(1 + random.random())"},
    "a hook that scales": {"init": "self.register_forward_hook(lambda m, i, o: o * (1 + np.random.rand()))"},
    "outside the layers": {"outside": "mask(np.random.rand, width) * random.random()"},
    "whole layers": {"skip": "if random.random() < 0.4: continue"},
    "a custom function's backward pass": {"module": drawing.FUNCTION, "factor": "NoisyBackward.apply(y)"},
}


@pytest.mark.parametrize("code", RIGHT_DRAWS.values(), ids=RIGHT_DRAWS)
def test_draws_that_checkpointing_does_not_repeat_or_restores_are_right(tmp_path, code):
    found = results(drawing.write(tmp_path / "m", **code), "per-layer", "every:2", "selective:matmul")
    assert [result.verdict for result in found.values()] == [IDENTICAL] * 3, found
    assert all(result.grad_rel_diff == result.noise == 0.0 for result in found.values())


def test_the_reentrant_variant_is_wrong_where_the_other_is_right(tmp_path):
    """A Python float that scales a layer: saved for the backward pass by one variant, drawn anew by the other."""
    found = results(drawing.write(tmp_path / "m", factor="(1 + random.random())"), "per-layer", "reentrant")
    assert found["per-layer"].verdict == IDENTICAL
    assert found["reentrant"].verdict == WRONG
    assert found["reentrant"].grad_rel_diff > 0.1


UNSEEDED = {
    "the system": {"outside": "mask(random.SystemRandom().random, width)"},
    "the system, in a layer": {
        "init": "self.rng = random.SystemRandom()",  # cannot be copied
        "inner": "mask(self.rng.random, 2 * width)",
    },
    "a generator of the module": {"module": "RNG = np.random.default_rng(0)", "factor": "(1 + RNG.random())"},
    "a clock": {"outside": "(1 + (time.perf_counter_ns() % 9973) / 9973)"},
    "layers left out": {"module": "RNG = random.Random(0)", "skip": "if RNG.random() < 0.4: continue"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("code", UNSEEDED.values(), ids=UNSEEDED)
def test_where_off_does_not_repeat_itself_nothing_is_shown(tmp_path, code, precision):
    """No verdict, in any precision: in bf16 much can be noise, so that fp32 is tested, too."""
    (result,) = results(drawing.write(tmp_path / "m", **code), "per-layer", precision=precision).values()
    assert result.verdict == NOT_REPEATABLE, result
    assert "off does not repeat itself: nothing can be shown" in result.message
    assert "global generators are seeded" in result.remedy
    assert result.noise is None or math.isfinite(result.noise)


def test_a_difference_that_looks_like_roundoff_is_looked_at_in_fp32(tmp_path):
    """Wrong by less than a few units of bf16's roundoff, and by thousands of fp32's."""
    folder = drawing.write(tmp_path / "m", inner="(1 + 0.02 * random.random())")
    (result,) = results(folder, "per-layer", precision="bf16").values()
    assert result.verdict == WRONG, result
    assert result.grad_rel_diff < 4 * 2.0**-8
    assert result.message.startswith("the same in fp32, which has less roundoff")


def test_noise_that_fp32_does_not_have_is_roundoff(tmp_path):
    """As of a token that goes to another expert: far above bf16's roundoff, and gone in fp32."""
    folder = drawing.write(
        tmp_path / "m",
        module="import itertools\nCALLS = itertools.count()",
        outside="(1 + 0.3 * (next(CALLS) % 3) * (x.dtype == torch.bfloat16))",
    )
    (result,) = results(folder, "per-layer", precision="bf16").values()
    assert result.noise > 2.0**-4
    assert result.verdict == WITHIN_NOISE, result


@pytest.mark.parametrize("call", [4, 6])
def test_what_draws_seldom_accuses_nobody(tmp_path, call):
    """Two runs of off agree by chance, and the strategy's run (4) or the next of off (6) does not."""
    odd = "(2 if call in (4, 6) else 1)" if call == 6 else "(2 if call == 4 else 1)"
    module = f"import itertools\nCALLS = itertools.count()\ndef factor():\n    call = next(CALLS)\n    return {odd}"
    (result,) = results(drawing.write(tmp_path / "m", module=module, outside="factor()"), "per-layer").values()
    assert result.verdict == NOT_REPEATABLE, result
    assert ("per-layer" if call == 4 else "off") in result.message
