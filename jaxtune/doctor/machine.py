"""What has to be right of a machine whatever is trained on it: versions, devices, the compiler, the disk."""

import os
import platform
import shutil
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from packaging.requirements import Requirement

from jaxtune import cpu_bfloat16
from jaxtune.checkpoint import Checkpointer, problems
from jaxtune.doctor.check import Check, Problem
from jaxtune.files import expanded

PYTHON = (3, 11)
SHOWN = ("jax", "jaxlib", "orbax-checkpoint", "transformers")
GPUS = ("/dev/nvidia0", "/dev/kfd")
DRIVERS = "install jaxtune[cuda] or jaxtune[tpu] and the driver that JAX's pages ask for"
TOLERANCE = 1e-5


def checks(directory: Path) -> list[Check]:
    """directory: where runs are written."""
    return [
        Check("Python and packages", versions, "pip install --upgrade jaxtune, in an environment of its own", False),
        Check("devices", devices, DRIVERS, False),
        Check("compiler", compiler, "a device or its driver is broken: try each alone, or another version of jaxlib"),
        Check("run directory", lambda: writable(directory), "set train.output_dir to one that you may write to", False),
        Check("checkpoints", lambda: checkpoint(directory), "another file system, or another version of Orbax"),
    ]


def versions() -> str:
    """Of Python and of what jaxtune asks for."""
    if sys.version_info < PYTHON:
        raise Problem(f"Python {platform.python_version()}; 3.11 or later is needed")
    asked = [Requirement(line) for line in requires("jaxtune") or []]
    wrong = [text for one in asked if one.marker is None or one.marker.evaluate({"extra": ""}) if (text := _wrong(one))]
    if wrong:
        raise Problem("; ".join(wrong))
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in SHOWN)])


def _wrong(asked: Requirement) -> str | None:
    try:
        found = version(asked.name)
    except PackageNotFoundError:
        return f"{asked.name} is not installed; {asked.specifier} is needed"
    if asked.specifier.contains(found, prereleases=True):
        return None
    return f"{asked.name} {found} is installed; {asked.specifier} is needed"


@cache
def has_devices() -> bool:
    """Whether JAX can start; where it cannot, it would try anew each time."""
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def devices() -> str:
    """What JAX sees, and whether it overlooks a GPU."""
    found = jax.devices()
    kind, limit = found[0].device_kind, (found[0].memory_stats() or {}).get("bytes_limit")
    gpu = next((path for path in GPUS if Path(path).exists()), None)
    if found[0].platform == "cpu" and gpu and not os.environ.get("JAX_PLATFORMS"):
        raise Problem(f"there is a GPU ({gpu}), but JAX sees CPUs only")
    memory = f" with {limit / 1e9:.1f} GB each" if limit else ""
    units = ", with units for bfloat16" if found[0].platform == "cpu" and cpu_bfloat16.has_units() else ""
    return f"{len(found)} x {kind} ({found[0].platform}){memory}{units}"


def compiler() -> str:
    """A matmul on each device, and a sum over all of them, beside numpy's."""
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal((128, 128)).astype(np.float32) for _ in range(2))
    wanted = a.astype(np.float64) @ b
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    for device in jax.local_devices():
        require_close(f"a matmul on {device}", multiply(*jax.device_put((a, b), device)), wanted)
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = np.arange(4.0 * mesh.size, dtype=np.float32).reshape(mesh.size, 4)
    spread = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("all")))
    require_close("a sum over all devices", jax.jit(lambda x: x.sum(0))(spread), rows.sum(0))
    return f"a matmul on each of {len(jax.local_devices())} devices and a sum over them are right"


def require_close(what: str, found: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    """Compare two arrays in float32, by the largest number that is wanted.

    Raises:
        Problem: they differ, or something is not finite.
    """
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    largest = max(float(np.abs(wanted).max()), 1e-30)
    difference = float(np.abs(found - wanted).max()) / largest
    if not difference <= tolerance:  # nan is not
        raise Problem(f"{what} differs by {difference:.1e} of its largest number; {tolerance:.0e} is allowed")


def existing(directory: Path) -> Path:
    """The directory, or the nearest above it that is there."""
    directory = expanded(directory).absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())


def writable(directory: Path) -> str:
    """A file is written, renamed and deleted where a run would be."""
    place = existing(directory)
    with tempfile.TemporaryDirectory(prefix=".jaxtune-doctor-", dir=place) as home:
        first, second = Path(home) / "first", Path(home) / "second"
        first.write_bytes(bytes(1 << 20))
        first.rename(second)
        if second.stat().st_size != 1 << 20:
            raise Problem(f"{place}: of a file of 1 MiB {second.stat().st_size} bytes are there")
    return f"{place}: {shutil.disk_usage(place).free / 1e9:.1f} GB are free"


def checkpoint(directory: Path) -> str:
    """A small state is saved and restored, and a damage to it is noticed."""
    state = {"weights": jnp.arange(1000, dtype=jnp.float32), "step": jnp.int32(7)}
    with tempfile.TemporaryDirectory(prefix=".jaxtune-doctor-", dir=existing(directory)) as home:
        with Checkpointer(Path(home), every=1, keep=2) as checkpoints:
            checkpoints.save(1, state, {}, wait=True)
            if (found := checkpoints.latest_valid()) != 1:
                raise Problem(f"step 1 was saved, and the newest whole checkpoint is {found}")
            back = checkpoints.restore(1, jax.eval_shape(lambda: state))
        if not all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (state, back)), strict=True)):
            raise Problem("what was restored is not what was saved")
        largest = max((path for path in Path(home).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(bytes([largest.read_bytes()[0] ^ 1]) + largest.read_bytes()[1:])
        if not problems(Path(home), 1):
            raise Problem("a flipped bit was not noticed")
    return "saved, verified and restored bit for bit; a flipped bit is noticed"
