"""XLA's flags for accelerators that a user should not have to find, set before JAX starts.

XLA ends a process that names a flag which it does not know: only flags that every version of jaxlib in `TRIED` takes
are here, and with another version none is set.
"""

import os
import re
from collections.abc import MutableMapping
from importlib.metadata import version
from pathlib import Path

TRIED = ("0.10.", "0.11.")
# What devices send one another is under way while they compute: gathered weights with FSDP, gradients' sums.
GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)


def set_flags(
    environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev"), jaxlib: str | None = None
) -> str:
    """Put into XLA_FLAGS what is not there by name yet; the flags that were put in, "" where none is for this machine.

    One GPU sends nothing, and keeps what it has. devices: the directory with the machine's device files.
    """
    asked, given = environment.get("JAX_PLATFORMS", ""), environment.get("XLA_FLAGS", "")
    is_gpu = not asked or any(name in asked.split(",") for name in ("cuda", "gpu"))
    if not is_gpu or len(list(devices.glob("nvidia[0-9]*"))) < 2 or not (jaxlib or version("jaxlib")).startswith(TRIED):
        return ""
    new = [flag for flag in GPU_FLAGS if not re.search(rf"{flag.partition('=')[0]}(=|\s|$)", given)]
    environment["XLA_FLAGS"] = " ".join([given, *new]).strip()
    return " ".join(new)
