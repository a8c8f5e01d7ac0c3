"""What tests on a card assert where the card is emulated: nothing is computed, so values and times mean nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import pytest

from gcbench.emulate.environment import emulated_card

IS_EMULATED = emulated_card() is not None

needs_values = pytest.mark.skipif(
    IS_EMULATED, reason=f"needs computed values or times, and nothing is computed on an emulated {emulated_card()}"
)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs torch.compile's compiler for the card: pip install triton"
)


def assert_proven(rows: Mapping[str, Mapping[str, object]]) -> None:
    """Assert that no cell failed, and on a real card that its gradients are those of `off`."""
    assert {row["status"] for row in rows.values()} == {"ok"}
    if not IS_EMULATED:
        assert {row["proof"] for row in rows.values()} <= {"identical", "within noise"}
