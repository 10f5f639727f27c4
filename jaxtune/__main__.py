"""The program `jaxtune`, also as `python -m jaxtune COMMAND ...`."""

import signal

from jaxtune.huge_pages import start_anew


def main(arguments: list[str] | None = None) -> None:
    """arguments: in place of the command line's."""
    start_anew()
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:  # nothing is there to be cleaned up yet: no traceback out of an import
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jaxtune import cli  # takes a while: not twice
    from jaxtune.tokenizer import without_torch

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    without_torch()
    cli.main(arguments)


if __name__ == "__main__":
    main()
