"""Prepares emulated cards for a child process: the environment variables that it starts with. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from gcbench.devices.cards import Card
from gcbench.devices.target import CPU
from gcbench.emulate import library
from gcbench.emulate.properties import architectures, capability_of, joined, properties, split

CARD = "GCBENCH_EMULATED_CARD"
PROPERTIES = "GCBENCH_EMULATED_PROPERTIES"
LEDGER = "GCBENCH_EMULATED_LEDGER"


def environment(
    card: Card, *, num_cards: int = 1, python: Path | None = None, ledger: Path | None = None
) -> dict[str, str]:
    """Return the environment variables to add to a child process's, so that its torch sees `num_cards` such cards.

    Builds the library with the C compiler on first use. `python` is the interpreter that the child runs (this one).
    Processes that name the same `ledger`, a file in a private folder, count against the same memory, and `nvidia-smi`
    then reports what they use. Raises UnavailableError where the card or the machine does not allow it.
    """
    capability_of(card)  # before anything is built
    built = library.build(python)
    values = properties(
        card,
        num_cards=num_cards,
        built_for=architectures(built.architectures),
        torch_version=built.torch.version.partition("+")[0],
    )
    earlier = [name for name in os.environ.get("LD_PRELOAD", "").split(":") if name and not _is_ours(name)]
    added = {
        "LD_PRELOAD": ":".join([*map(str, built.preload), *earlier]),
        "PATH": f"{built.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TRITON_LIBCUDA_PATH": str(built.folder),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_cards))),
        CARD: card.name,
        PROPERTIES: joined(values),
    }
    return added | ({LEDGER: str(ledger)} if ledger is not None else {})


def emulated_card() -> str | None:
    """Return the name of the card that this process runs on, if it is emulated; None in every other process."""
    return os.environ.get(CARD) if os.environ.get(PROPERTIES) else None


def card_behind(device: str) -> str | None:
    """Return the name of the card that a device of this process, "cpu" or "cuda:N", emulates; None for a real one."""
    return None if device == CPU else emulated_card()


def emulated_context_bytes() -> int | None:
    """Return the estimate of what CUDA itself takes of this process's emulated card; None in every other process."""
    value = split(os.environ.get(PROPERTIES, "")).get("context_bytes")
    return int(value) if value else None


def _is_ours(name: str) -> bool:
    return (Path(name).parent / "built.json").exists()
