"""Runs the GPU tests on an emulated card: what needs computed values or times is skipped there, with its reason.

    python tests/support/run_emulated.py [CARD [ARGUMENTS OF pytest]]      h100 by default

Needs a CUDA build of torch in the environment of this Python; exits with 3 and one sentence where there is none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # the environment with a CUDA build need not have gcbench installed

from gcbench.core.errors import GcbenchError  # noqa: E402 - found through the line above
from gcbench.devices import cards  # noqa: E402
from gcbench.emulate.environment import environment  # noqa: E402


def main() -> None:
    """Replace this process by pytest on the emulated card; nothing of the environment survives it."""
    card, *arguments = sys.argv[1:] or ["h100"]
    try:
        added = environment(cards.find(card))
    except GcbenchError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    tests = ("-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests/gpu"))
    command = [sys.executable, "-m", "pytest", *tests, *arguments]
    os.chdir(ROOT)
    os.execve(sys.executable, command, {**os.environ, **added, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
