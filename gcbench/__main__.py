"""`python -m gcbench`."""

from gcbench.cli import main

if __name__ == "__main__":
    main()
