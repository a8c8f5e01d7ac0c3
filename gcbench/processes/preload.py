"""Switches garbage collection off for the imports of the server process, as modules are never garbage."""

from __future__ import annotations

import gc

gc.disable()  # repeated passes over the modules take a seventh of the imports' time; `child.run_task` turns it on again
