"""Compiled programs that JAX keeps on disk for the next start, and those that it must not keep.

JAX is imported when it is needed: where programs are kept has to be said before that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from jaxtune.errors import ConfigError
from jaxtune.files import user_cache

if TYPE_CHECKING:
    from jax.sharding import Mesh


def keep_programs() -> None:
    """Before JAX is imported: where it keeps compiled programs, unless the environment says so already."""
    with suppress(ConfigError):  # without a home none are kept
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


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
