"""What a call of the command line has imported by its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import ROOT
from processes import PROCESS_TIMEOUT_S

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "numpy")


PROBE = """
import json, sys
sys.argv = ["gcbench", *json.loads(sys.argv[1])]
from gcbench.cli.app import main
try:
    main()
except SystemExit as ended:
    print(json.dumps([ended.code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def imported(*args: object) -> tuple[int, set[str]]:
    """Exit code, and the packages that a call of the command line has imported by its end."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([str(arg) for arg in args])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
    )
    code, names = json.loads(done.stderr.splitlines()[-1])
    return code, set(names)
