"""Starts the observer in every Python process of a dry run, before the script; then leaves no trace of itself.

Python imports a module of this name at startup. This folder is first in PYTHONPATH, holds nothing else, and is taken
off `sys.path` again; the user's own `sitecustomize` runs as it would have.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_NAME = "gcbench_dry_run_observer"
"""The observer's name in the script's process, whose environment may have no gcbench."""


def _start() -> None:
    """Import the observer from its folder and start it; a failure must not stop the script."""
    folder = _HERE.parent
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    module.start()


def _run_users_own() -> None:
    """Import the `sitecustomize` that this one hides, if there is one."""
    mine = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ImportError as err:
        if err.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, mine)


sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
_start()
_run_users_own()
