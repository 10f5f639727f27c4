"""For which devices a plan is made: this machine's, N pretended ones, or a TPU slice that is not here.

JAX must not have been used before `choose`: how many devices a CPU pretends to be is settled once.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import MeshError, UserError, listing

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Chip:
    """Of one JAX device: memory in bytes, bfloat16 operations a second, bytes that it sends a second.

    island: neighbours that it reaches at `network`; others it reaches at `far`.
    """

    memory: int
    flops: float
    network: float
    island: int = 2**30
    far: float = 0.0

    def bandwidth(self, span: int) -> float:
        """Within groups whose members lie among `span` neighbours."""
        return self.network if span <= self.island else self.far


# Google Cloud's pages on each TPU version.
TPUS = {
    "v4": Chip(32 * 2**30, 275e12, 300e9),
    "v5e": Chip(16 * 2**30, 197e12, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 448e9),
}
# What stands for an unknown accelerator where candidates are compared: an H100's data sheet (dense bfloat16, NVLink),
# eight in a machine, with a network port of 400 Gbit/s each.
GENERIC = Chip(80 * 10**9, 989e12, 450e9, island=8, far=50e9)

MOST_CPUS = 2048  # XLA takes the ones after them for another process's (kMaxCpuDevicesPerProcess)


@dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    name: str
    devices: list[Any]
    chip: Chip
    compute: str | None = None  # what precision.compute: auto means there; None: as on this machine

    @property
    def memory(self) -> int | None:
        """Of one device, where it is known."""
        return self.chip.memory if self.is_tpu else None

    @property
    def is_tpu(self) -> bool:
        """A TPU slice that is compiled for and not run on."""
        return self.name.partition(":")[0] in TPUS


def choose(name: str | None, count: int | None) -> Target:
    """The devices of a target: a TPU slice such as v5e:8x8, or `cpu`; without either, this machine's own.

    count: devices; of a CPU that pretends to have as many.

    Raises:
        MeshError: an unknown target, more devices than a CPU can pretend to have, or a slice that has another number.
        UserError: libtpu is not installed.
    """
    if name not in (None, "cpu"):
        return _slice(str(name), count)
    if name is None and count is None:
        import jax

        return Target(jax.devices()[0].device_kind, jax.devices(), GENERIC)
    return Target("cpu", _pretend(count or 1), GENERIC)


def _pretend(count: int) -> list[Any]:
    """`count` devices of the CPU."""
    if count > MOST_CPUS:
        raise MeshError(
            f"--devices {count}: a CPU pretends to have {MOST_CPUS} at most; plan for fewer, or set --target to a TPU "
            "slice"
        )
    import jax

    # Both are read when JAX first looks for devices, which importing it does not. After that the first does nothing,
    # and the second is refused.
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise MeshError(
            f"{count} devices: JAX was started with {len(devices)} in this process; start Python with "
            f"JAX_NUM_CPU_DEVICES={count}, or use the command jaxtune plan"
        )
    return devices[:count]


def _slice(name: str, count: int | None) -> Target:
    version = name.partition(":")[0]
    if version not in TPUS:
        raise MeshError(f"--target {name}: allowed: cpu, or a TPU slice of {listing(TPUS)}, such as v5e:8x8")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nothing is asked of a cloud machine's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU that two processes could dispute
    from jax.experimental import topologies

    try:
        with quiet():
            devices = list(topologies.get_topology_desc(name, "tpu").devices)
    except Exception as problem:
        first = str(problem).splitlines()[0]
        if "not installed" in first:
            raise UserError(f'--target {name}: libtpu is not installed; pip install "jaxtune[tpu]"') from None
        raise MeshError(f"--target {name}: {first}; a slice is written v5e:8x8 or v5p:4x4x4") from None
    if count not in (None, len(devices)):
        raise MeshError(f"--target {name} has {len(devices)} devices, --devices says {count}; leave one out")
    return Target(name, devices, TPUS[version], "bfloat16")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libtpu's own lines off stderr: it reports the lack of a TPU there, whatever its log level is.

    Python's own warnings and tracebacks come later and are seen.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def parse_bytes(text: str) -> int:
    """Bytes in `80GB`, `16GiB` or `500 MB`; a number alone is GB.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f'--budget "{text}": expected a size such as 80GB or 16GiB')
    return int(float(match[1]) * _UNITS[match[2] or "GB"])
