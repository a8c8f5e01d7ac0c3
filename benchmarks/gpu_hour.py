"""Uses the minutes that one has a card for: the GPU tests, plain loops, two runs, then the grid of truths.

    python benchmarks/gpu_hour.py OUT [SECONDS]      480 seconds by default

What was measured lies in OUT, whatever ends it: `log.txt`, `plain-loop.json`, a report for each run, and the truth's
file. The truth goes on where the committed one stopped; it takes what time is left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "gpt2": ("--model", "gpt2", "--batch", "16", "--seq-len", "1024"),
    "llama-3.2-1b": ("--model", "llama-3.2-1b", "--batch", "4", "--seq-len", "2048", "--precision", "bf16"),
    "llama-3.1-8b-lora": (
        *("--model", "llama-3.1-8b", "--batch", "1", "--seq-len", "4096", "--precision", "bf16"),
        *("--lora-r", "16", "--strategies", "off,per-layer,every:2,selective:matmul,selective:attention,offload"),
    ),
}


def main() -> None:
    """Run the stages in order, each no longer than what is left allows."""
    out, budget_s = Path(sys.argv[1]).resolve(), float(sys.argv[2] if len(sys.argv) > 2 else 480)
    stages = sys.argv[3:] or ["tests", "loops", "runs", "truth"]
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    python = (sys.executable, "-u")
    with (out / "log.txt").open("a", encoding="utf-8") as log:

        def fake_model(name: str, *command: str, at_most_s: float) -> None:
            left = min(at_most_s, end - time.monotonic())
            if left < 5:
                return
            begin = time.monotonic()
            print(f"== {name}: {' '.join(command)}", file=log, flush=True)
            code = _run(command, log, left)
            said = f"== {name}: exit {code} after {time.monotonic() - begin:.0f} s"
            print(said, file=log, flush=True)
            print(said, flush=True)

        if "tests" in stages:
            tests = [str(path) for path in sorted((ROOT / "tests").glob("**/test_gpu*.py"))]
            quiet = ("-m", "gpu", "-q", "--tb=short", "-n", "4")  # most of their time is imports, which share no card
            fake_model("tests", *python, "-m", "pytest", "-p", "no:benchmark", *quiet, *tests, at_most_s=250)
        if "loops" in stages:
            fake_model("loops", *python, "benchmarks/plain_loop.py", str(out / "plain-loop.json"), at_most_s=120)
        for name, flags in RUNS.items() if "runs" in stages else ():
            with_rounds = (*flags, "--rounds", "3", "--quiet", "--out", f"/tmp/gpu-hour/{name}")
            fake_model(name, *python, "-m", "gcbench", "run", *with_rounds, at_most_s=90)
            with suppress(OSError):
                shutil.copy(f"/tmp/gpu-hour/{name}/report.json", out / f"{name}.json")
        if "truth" in stages:
            fake_model("truth", *python, "benchmarks/truth.py", "cuda", at_most_s=budget_s)
            for path in (ROOT / "results" / "reference").glob("truth-*.json"):
                if "cpu" not in path.name:
                    shutil.copy(path, out / path.name)
    print((out / "log.txt").read_text(encoding="utf-8")[-9000:])


def _run(command: tuple[str, ...], log: object, timeout_s: float) -> int | str:
    """The exit code, or that time ran out; nothing of it is left running."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=log,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    try:
        return child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)  # pytest then says why tests failed
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=10)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return "time ran out"


if __name__ == "__main__":
    main()
