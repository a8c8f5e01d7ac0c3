"""Runs the command line for `python -m gcbench`."""

from gcbench.cli.entry import main

if __name__ == "__main__":
    main()
