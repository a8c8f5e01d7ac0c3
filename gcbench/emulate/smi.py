"""Answers as `nvidia-smi` for the emulated cards. Runs by itself, without gcbench; the shim on PATH is made from it."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

MIB = 1 << 20
SLOT = struct.Struct("=ii16Q")  # csrc/ledger.c: process id, unused, bytes used of each card


def main(arguments: list[str]) -> None:
    """Print what the arguments query, of all cards or those chosen with `--id`."""
    cards, processes = _cards(), _processes()
    options = _options(arguments)
    chosen = list(range(int(cards.get("num_cards", "1"))))
    if options.get("--id", "").isdecimal():
        chosen = [card for card in chosen if card == int(options["--id"])]
    if "-L" in options or "--list-gpus" in options:
        for card in chosen:
            print(f"GPU {card}: {cards.get('name', '')} (UUID: {_value('uuid', card, cards, processes)})")
        return
    query, apps = options.get("--query-gpu"), options.get("--query-compute-apps")
    lines: list[list[str]] = []
    if query is not None:
        lines = [[_value(field.strip(), card, cards, processes) for field in query.split(",")] for card in chosen]
    elif apps is not None:
        for pid, used in processes:
            for card in chosen:
                if used[card]:
                    size = f"{used[card] // MIB} MiB"
                    known = {"pid": str(pid), "process_name": "python", "used_memory": size, "used_gpu_memory": size}
                    fields = [field.strip() for field in apps.split(",")]
                    lines.append([known.get(field) or _value(field, card, cards, processes) for field in fields])
    else:
        for card in chosen:
            used_text, total = (_value(field, card, cards, processes) for field in ("memory.used", "memory.total"))
            print(f"{card}  {cards.get('name', '')}  {used_text} / {total}  (emulated by gcbench)")
        return
    form = options.get("--format", "csv")
    if "noheader" not in form:
        print(", ".join(field.strip() for field in (query or apps or "").split(",")))
    for line in lines:
        print(", ".join(_bare(text) if "nounits" in form else text for text in line))


def _options(arguments: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not has_value and name in ("-i", "--id", "--format") and rest:
            value = rest.pop(0)
        found[{"-i": "--id"}.get(name, name)] = value
    return found


def _cards() -> dict[str, str]:
    text = os.environ.get("GCBENCH_EMULATED_PROPERTIES", "")
    return dict(entry.split("=", 1) for entry in text.split("|") if "=" in entry)


def _processes() -> list[tuple[int, list[int]]]:
    """Return (process id, bytes used of each card) of the living processes."""
    try:
        content = Path(os.environ.get("GCBENCH_EMULATED_LEDGER", "")).read_bytes()
    except OSError:
        return []
    slots = SLOT.iter_unpack(content[: len(content) // SLOT.size * SLOT.size])
    return [(pid, used) for pid, _, *used in slots if pid > 0 and Path(f"/proc/{pid}").exists()]


def _value(field: str, card: int, cards: dict[str, str], processes: list[tuple[int, list[int]]]) -> str:
    total = int(cards.get("memory_bytes", "0")) // MIB
    used = min(total, -(-sum(sizes[card] for _, sizes in processes) // MIB))
    uuid = f"GPU-6c6c6c6c-6c6c-6c6c-6c6c-6c6c6c6c6c{card:02x}"
    known = {
        "index": str(card),
        "count": cards.get("num_cards", "1"),
        "name": cards.get("name", ""),
        "gpu_name": cards.get("name", ""),
        "driver_version": cards.get("driver", ""),
        "compute_cap": f"{cards.get('major', '0')}.{cards.get('minor', '0')}",
        "uuid": uuid,
        "gpu_uuid": uuid,
        "pci.bus_id": f"00000000:{card + 1:02X}:00.0",
        "memory.total": f"{total} MiB",
        "memory.used": f"{used} MiB",
        "memory.free": f"{total - used} MiB",
        "memory.reserved": "0 MiB",
        "utilization.gpu": "0 %",
        "utilization.memory": "0 %",
    }
    return known.get(field, "[N/A]")


def _bare(text: str) -> str:
    return text.rsplit(" ", 1)[0] if text.endswith((" MiB", " %")) else text


if __name__ == "__main__":
    main(sys.argv[1:])
