"""A check's problems: results with one cause or one message are one paragraph, for all strategies and settings."""

from __future__ import annotations

import pytest

from gcbench.check import view
from gcbench.check.cases import FAILED, IDENTICAL, UNSUPPORTED, WRONG, Check, CheckResult, CheckSetting, Combination

SETTINGS = [CheckSetting(), CheckSetting(tuned="lora"), CheckSetting(precision="bf16-mixed", tuned="lora")]


def check_of(**results):
    """(verdict, message) by strategy, one for each setting."""
    combinations, done = [], []
    for strategy, pairs in results.items():
        for setting, (verdict, message) in zip(SETTINGS, pairs, strict=True):
            done.append(CheckResult(number=len(combinations), verdict=verdict, message=message))
            combinations.append(Combination(setting=setting, strategy=strategy))
    return Check(
        model="m",
        command="",
        device="cpu",
        versions={},
        scaled=None,
        num_params=1,
        num_layers=4,
        combinations=tuple(combinations),
        results=tuple(done),
    )


def outcomes(check):
    return [(view.where(problem, check), problem.message) for problem in view.problems(check)]


GOOD, NEVER = (IDENTICAL, None), (UNSUPPORTED, "it cannot checkpoint")
LORA = [(UNSUPPORTED, f"{each.label} does not run without checkpointing either (no targets)") for each in SETTINGS]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"a": [NEVER] * 3, "b": [NEVER] * 3}, [("all combinations", "it cannot checkpoint")]),
        ({"a": [NEVER] * 3, "b": [GOOD] * 3}, [("a with every setting", "it cannot checkpoint")]),
        (
            {"a": [GOOD, *LORA[1:]], "b": [GOOD, *LORA[1:]]},
            [
                (
                    "all strategies with lora and with bf16-mixed, lora",
                    "does not run without checkpointing either (no targets)",
                )
            ],
        ),
        (
            {"a": [NEVER, GOOD, GOOD], "b": [GOOD, NEVER, GOOD]},
            [("a with plain; b with lora", "it cannot checkpoint")],
        ),
        (
            {"a": [(WRONG, "differ by 0.1"), NEVER, GOOD], "b": [(WRONG, "differ by 0.2"), (FAILED, "broke"), NEVER]},
            [
                ("a with plain", "differ by 0.1"),
                ("b with plain", "differ by 0.2"),
                ("b with lora", "broke"),
                ("a with lora; b with bf16-mixed, lora", "it cannot checkpoint"),
            ],
        ),
    ],
)
def test_problems_with_one_cause_are_shown_as_one(results, expected):
    assert outcomes(check_of(**results)) == expected


def test_a_refusal_of_everything_is_one_paragraph_in_text_and_markdown():
    check = check_of(**{name: [NEVER] * 3 for name in "abcdefg"})
    assert view.plain(check, width=100).count("cannot checkpoint") == 1
    assert view.markdown(check).count("cannot checkpoint") == 1
