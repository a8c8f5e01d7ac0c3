"""What `import gcbench` shows: the public names, without torch."""

from __future__ import annotations

import subprocess
import sys

import gcbench

SHOWN = """
import sys, rlcompleter, gcbench
assert {"apply", "remove", "Plan", "Policy"} <= set(dir(gcbench)), dir(gcbench)
assert not {"importlib", "TYPE_CHECKING", "_HOMES"} & set(dir(gcbench))
assert "torch" not in sys.modules
completer = rlcompleter.Completer({"gcbench": gcbench})
assert any(name.startswith("gcbench.Plan") for name in completer.attr_matches("gcbench.Pl"))
assert "torch" not in sys.modules
"""


def test_dir_and_tab_completion_show_what_is_public():
    subprocess.run([sys.executable, "-c", SHOWN], check=True, timeout=60)


def test_everything_that_is_shown_is_there():
    assert set(gcbench.__all__) <= set(dir(gcbench))
    assert all(getattr(gcbench, name) is not None for name in dir(gcbench) if name not in ("apply", "remove"))
