"""How long `gcbench plan` takes, imports and all: the whole command, from the shell to the answer.

    python benchmarks/plan_speed.py

Kept in results/reference/plan-speed.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gcbench.core.files import write_text

PATH = Path(__file__).parent.parent / "results" / "reference" / "plan-speed.json"
CASES = {
    "llama-3.1-8b": (15.0, ("--device", "h200", "--precision", "bf16", "--seq-len", "4096")),
    "llama-3.1-405b": (25.0, ("--device-memory", "4096GiB", "--precision", "bf16", "--seq-len", "4096")),
}
"""Model -> (the bar in seconds, the other flags)."""
TIMES = 3


def main() -> None:
    results = {}
    for model, (bar_s, flags) in CASES.items():
        seconds = []
        for _ in range(TIMES):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "gcbench", "plan", "-m", model, *flags]
                begin = time.perf_counter()
                subprocess.run([*command, "--out", f"{folder}/plan"], check=True, capture_output=True)
                seconds.append(time.perf_counter() - begin)
        middle = statistics.median(seconds)
        results[model] = {"command": " ".join(["gcbench", *command[3:]]), "seconds": seconds, "bar_s": bar_s}
        verdict = "PASS" if middle < bar_s else "MISS"
        print(f"{model}: {middle:.1f} s (of {', '.join(f'{s:.1f}' for s in seconds)}); bar {bar_s:.0f} s: {verdict}")
    stored = {"command": "python benchmarks/plan_speed.py", "cores": os.cpu_count(), "results": results}
    write_text(PATH, json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
