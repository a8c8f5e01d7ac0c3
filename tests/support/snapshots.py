"""Reads a memory snapshot as the viewer does."""

from __future__ import annotations

from itertools import accumulate
from typing import Any


def curve(snapshot: dict[str, Any]) -> list[int]:
    """The bytes after each allocation and release, as the viewer's "Active Memory Timeline" adds them up.

    A release without an allocation, and a block that is allocated at the end without one, were there at the start.
    """
    changes, at_start, known = [], 0, set()
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "alloc":
            known.add(entry["addr"])
            changes.append(entry["size"])
        elif entry["action"] == "free_completed":
            if entry["addr"] not in known:
                at_start += entry["size"]
            known.discard(entry["addr"])
            changes.append(-entry["size"])
    for segment in snapshot["segments"]:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and block["address"] not in known:
                at_start += block["requested_size"]
    return [at_start, *(at_start + change for change in accumulate(changes))]
