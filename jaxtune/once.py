"""Programs that run once, when a run starts."""

import os
from collections.abc import Callable
from typing import Any

import jax

LEVEL = "xla_backend_optimization_level"


def run_once(function: Callable, *arrays: Any, shardings: Any = None, **settings: Any) -> Any:
    """function(*arrays, **settings), each array of the result in its own shards. settings: static, to be hashed.

    Calls with one function, settings and shapes are compiled once. For a CPU they are optimised a little: numbers are
    drawn as fast, and compiling takes half as long, which is most of it. A level in XLA_FLAGS is left as it is.
    """
    where = {} if shardings is None else {"out_shardings": shardings}
    is_ours = jax.default_backend() == "cpu" and LEVEL not in os.environ.get("XLA_FLAGS", "")
    options = {LEVEL: 1} if is_ours else None
    return jax.jit(function, static_argnames=tuple(settings), compiler_options=options, **where)(*arrays, **settings)
