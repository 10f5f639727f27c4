"""`python -m jaxtune COMMAND ...`: the same as the console script `jaxtune`."""

from jaxtune.cli import main

if __name__ == "__main__":
    main()
