"""Texts that are stored, and what is compared with them."""

from __future__ import annotations

import os
import re
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def check(name, text):
    """Compare with the stored text, or store it; the last digits of a logarithm are the C library's affair."""
    text = re.sub(r"\d+\.\d{10,}", lambda number: f"{float(number[0]):.9g}", text)
    path = GOLDEN / name
    if os.environ.get("GCBENCH_REWRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
