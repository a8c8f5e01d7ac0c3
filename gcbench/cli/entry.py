"""Starts the program; imports nothing before Ctrl-C can be reported."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run `gcbench.cli.app.main`, and report a Ctrl-C that arrives while it is being imported."""
    try:
        from gcbench.cli import app

        app.main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
