"""Where a moment of training stands in the code, and what a value that is read there decides."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from gcbench.dry_run.observer import places

CODE = textwrap.dedent(
    """
    class Net:
        def forward(self, x):
            return x  # 4

    def train(loss, model):
        while loss.item() > 0.1:  # 7
            value = loss.item()  # 8
            if value > 3:
                break
            shown = loss.item()  # 11
            assert loss.item() == loss.item()  # 12
            print(shown)
        best = loss.item() if loss.item() < 1 else 0  # 14
        kept = [x for x in model if x.item()]  # 15
    """
)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(CODE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("line", "kind"), [(7, "while"), (8, "if"), (11, None), (12, "assert"), (14, "if"), (15, "if"), (4, None)]
)
def test_a_value_decides_a_condition(script, line, kind):
    assert places.condition_of(script, line) == kind


def test_a_function_is_named_with_its_class(script):
    assert places.qualified_name(script, 4) == "Net.forward"
    assert places.qualified_name(script, 8) == "train"
    assert places.qualified_name(script, 1) is None


def test_a_file_that_cannot_be_parsed_decides_nothing(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("if (", encoding="utf-8")
    assert places.condition_of(str(broken), 1) is None


def test_the_users_own_code_is_what_is_installed_nowhere(script):
    assert places.library_of(script) is None
    assert places.library_of("/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py") == "torch"
    assert places.library_of("/venv/lib/python3.12/site-packages/six.py") == "six"
    assert places.library_of(textwrap.__file__) == "python"
    assert places.library_of(places.__file__) == "gcbench"


def test_the_innermost_line_of_the_user_is_the_place(script):
    torch = "/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py"
    model = "/venv/lib/python3.12/site-packages/transformers/models/llama/modeling_llama.py"
    frames = [
        (torch, 1, "forward"),
        (model, 2, "forward"),
        (torch, 3, "call"),
        (script, 8, "train"),
        (script, 1, "<module>"),
    ]
    user, library = places.user_place(frames), places.library_place(frames)
    assert user is not None and library is not None
    assert (user["line"], user["text"]) == (8, "value = loss.item()  # 8")
    assert library["file"] == model
    assert places.library_place(frames[3:]) is None
