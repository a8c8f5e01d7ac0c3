"""What the server of child processes imports first: what follows is modules, of which none is garbage."""

from __future__ import annotations

import gc

gc.disable()  # looking through them again and again is a seventh of the imports' time; `worker.main` turns it on again
