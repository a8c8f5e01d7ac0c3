"""What the default job costs beyond its training steps, and what the parent process holds.

The bars, on two cores: at most 30 training steps; wall time at most 1.3 times the time spent in them, plus 3 s for
each child process, plus 15 s; a parent below 150 MiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_STEPS = 30
STEP_FACTOR, CHILD_S, FIXED_S = 1.3, 3.0, 15.0
MAX_PARENT_MIB = 150


def high_water_mib(pid: int) -> float:
    """The most resident memory a live process has held."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    arguments = sys.argv[1:] or ["--model", "gpt2", "--batch", "16"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.perf_counter()
        parent = subprocess.Popen([sys.executable, "-m", "gcbench", "run", *arguments, "--out", str(out)])
        peak_mib = 0.0
        while parent.poll() is None:
            peak_mib = max(peak_mib, high_water_mib(parent.pid))
            time.sleep(0.1)
        wall_s = time.perf_counter() - start
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rounds = [result for outcome in report["outcomes"] for result in outcome["rounds"]]
    num_steps = sum(result["num_steps"] for result in rounds)
    steps_s = sum(result["steps_s"] for result in rounds)
    num_children = len(rounds) + 1  # one more says what the machine and the model are
    allowed_s = STEP_FACTOR * steps_s + CHILD_S * num_children + FIXED_S
    print(f"training steps   {num_steps} (at most {MAX_STEPS})")
    print(f"wall time        {wall_s:.1f} s, of which in training steps {steps_s:.1f} s")
    terms = f"{STEP_FACTOR} × steps + {CHILD_S:.0f} s × {num_children} children + {FIXED_S:.0f} s"
    print(f"allowed          {allowed_s:.1f} s = {terms}")
    print(f"beside the steps {wall_s - steps_s:.1f} s, {(wall_s - steps_s) / num_children:.2f} s a child process")
    print(f"parent's peak    {peak_mib:.0f} MiB (at most {MAX_PARENT_MIB})")


if __name__ == "__main__":
    main()
