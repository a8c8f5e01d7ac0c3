"""`python -m gcbench`."""

from gcbench.entry import main

if __name__ == "__main__":
    main()
