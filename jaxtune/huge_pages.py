"""Memory in pages of 2 MiB for the process that is to train on a CPU.

A step's temporary arrays are given back to the system after each step, and the next one finds fresh pages: with 4 KiB
each, half a million faults for 2 GB, 3 to 14 % of a step. Where Linux gives large pages only on request ("madvise", the
default of most distributions), glibc's allocator makes that request, but only if it is told so before it starts:
https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html (glibc.malloc.hugetlb, since 2.35;
an older one passes over it). Hence a command starts its process anew, once, as the first thing it does.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # the one in force is in brackets
TUNABLES, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # 1: on request, 0: no


def start_anew() -> None:
    """Take this process's place by the same command with large pages, if that changes anything.

    For commands alone, before anything is opened. A user who has set the tunable, to 0 perhaps, keeps it. The process
    stays the same one to whoever started it.
    """
    environment = with_tunable(os.environ)
    if environment is None or not sys.executable:
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - itself
    except OSError:
        return  # slower, but it runs


def with_tunable(environment: Mapping[str, str], policy: Path = POLICY) -> dict[str, str] | None:
    """The environment in which large pages are asked for; None where that is done already, or would change nothing."""
    given = environment.get(TUNABLES, "")
    if TUNABLE in given:
        return None
    try:
        is_on_request = "[madvise]" in policy.read_text()
    except OSError:  # another system
        return None
    if not is_on_request:
        return None
    return {**environment, TUNABLES: ":".join(filter(None, (given, f"{TUNABLE}=1")))}
