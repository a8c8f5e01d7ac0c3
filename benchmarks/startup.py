"""How long `gcbench --help` and a wrong flag take, against importing typer and rich; and what they import.

The bar: at most 3 times the import, and none of torch, transformers, pandas and matplotlib.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15
HEAVY = ("torch", "transformers", "pandas", "matplotlib")
COMMANDS = {
    "import typer, rich": ["-c", "import typer, rich"],
    "gcbench --help": ["-m", "gcbench", "--help"],
    "gcbench run --help": ["-m", "gcbench", "run", "--help"],
    "gcbench run --no-such-flag": ["-m", "gcbench", "run", "--no-such-flag"],
    "gcbench run -m gpt2 -b 0": ["-m", "gcbench", "run", "-m", "gpt2", "-b", "0"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def heavy_imports(arguments: list[str]) -> list[str]:
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    return sorted(name for name in HEAVY if name in loaded)


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):  # in turn, so that a busy moment hits all of them
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    base = times["import typer, rich"]
    print(f"{'command':<30}{'median':>10}{'ratio':>8}  heavy imports")
    for name, arguments in COMMANDS.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], base, strict=True))
        heavy = ", ".join(heavy_imports(arguments)) or "none"
        print(f"{name:<30}{statistics.median(times[name]) * 1e3:>7.0f} ms{ratio:>8.2f}  {heavy}")


if __name__ == "__main__":
    main()
