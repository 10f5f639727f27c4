"""How the processes beside this one are started: those that render templates, and those that tokenise."""

import subprocess
from typing import Any

from jaxtune.errors import DataError


def start(command: list[str], what: str, **options: Any) -> subprocess.Popen:
    """The process, its stdin and stdout being pipes. what: names it in the error.

    Raises:
        DataError: the system does not start it.
    """
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    except OSError as error:
        raise DataError(
            f"{what}: {command[0]} cannot be started: {error.strerror or error}; this needs memory for one more "
            "Python, and the right to start it (ulimit -u, a container's limit of processes)"
        ) from None
