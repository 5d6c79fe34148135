"""`python -m wisp.cli` is `wisp`."""

from wisp.cli import main

if __name__ == "__main__":
    main()
