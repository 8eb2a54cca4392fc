"""`python -m softdice`: the same as the command `softdice`."""

from softdice.cli import main

if __name__ == "__main__":
    main()
