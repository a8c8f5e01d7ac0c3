"""Where the program starts: nothing is imported before an interruption can be told."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """`gcbench.cli.app.main`, and a word where Ctrl-C comes while that is imported."""
    try:
        from gcbench.cli import app as cli

        cli.main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
