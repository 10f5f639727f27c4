"""The program `jaxtune`, also as `python -m jaxtune COMMAND ...`."""

from jaxtune.huge_pages import start_anew


def main(arguments: list[str] | None = None) -> None:
    """arguments: in place of the command line's."""
    start_anew()
    from jaxtune import cli  # takes a while: not twice
    from jaxtune.tokenizer import without_torch

    without_torch()
    cli.main(arguments)


if __name__ == "__main__":
    main()
