"""Compiled programs that JAX keeps on disk for the next start, and those that it must not keep.

JAX is imported when it is needed: where programs are kept has to be said before that.
"""

import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import ConfigError
from jaxtune.files import user_cache

if TYPE_CHECKING:
    from jax.sharding import Mesh

ZSTD = b"\x28\xb5\x2f\xfd"  # what a program begins with where JAX finds zstandard; else it takes zlib


def keep_programs() -> None:
    """Before JAX is imported: where it keeps compiled programs, unless the environment says so already."""
    with suppress(ConfigError):  # without a home none are kept
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    warnings.showwarning = partial(_show, warnings.showwarning)


def _show(otherwise: Callable[..., None], message: Warning | str, *rest: Any, **options: Any) -> None:
    """Show a warning; where it is of a kept program that a kill or a full disk cut off, remove that: JAX warns at each
    start, compiles it anew, and does not write over what is there."""
    found = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    home = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    torn = [path for path in Path(home).glob(f"{found[1]}-*-cache") if _is_torn(path)] if found and home else []
    if not torn:
        otherwise(message, *rest, **options)
        return
    from jaxtune.console import warn

    for path in torn:
        with suppress(OSError):
            path.unlink()
        warn(f"{path}: this compiled program was cut off; it is made again")


def _is_torn(path: Path) -> bool:
    """Whether a kept program is not all there, as far as the standard library can tell."""
    try:
        content = path.read_bytes()
        if not content.startswith(ZSTD):
            zlib.decompress(content)
    except zlib.error:
        return True
    except OSError:
        pass
    return False


@contextmanager
def compiled_anew(mesh: "Mesh") -> Iterator[None]:
    """What is compiled in here for several CPU devices is neither taken from the disk nor kept there.

    XLA for CPUs orders a program's collectives by one resource that all of them use. As it reads a kept program, each
    loop and each branch gets a resource of its own (thunk_proto_serdes.cc, jax 0.10 and 0.11). Devices may then start
    one inside and one outside in different orders: they wait for each other until XLA ends the process, or add up
    numbers that do not belong together. What is kept is a setting of the whole process: one thread at a time.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache
    if not kept or mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it asks once in a process whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
