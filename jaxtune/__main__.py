"""The program `jaxtune`, also as `python -m jaxtune COMMAND ...`."""

from jaxtune.huge_pages import start_anew


def main() -> None:
    start_anew()
    from jaxtune import cli  # takes a while: not twice

    cli.main()


if __name__ == "__main__":
    main()
