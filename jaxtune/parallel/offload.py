"""Arrays that lie in the host's memory between steps, and come to their devices when they are used."""

from typing import Any

import jax
from jax.sharding import Sharding

from jaxtune.models.execution import HOST

DEVICE = "device"


def on_host(homes: Any) -> Any:
    """The same shardings, in the memory of each device's host."""
    return jax.tree.map(lambda home: home.with_memory_kind(HOST), homes)


def fetched(tree: Any, homes: Any) -> Any:
    """Inside jit: the arrays on their devices. homes: where they lie now."""
    device = lambda home: home.with_memory_kind(DEVICE)  # noqa: E731
    return jax.tree.map(lambda x, home: jax.device_put(x, device(home)) if is_away(home) else x, tree, homes)


def stored(tree: Any, homes: Any) -> Any:
    """Inside jit: the arrays back where they lie between steps."""
    return jax.tree.map(lambda x, home: jax.device_put(x, home) if is_away(home) else x, tree, homes)


def is_away(home: Sharding) -> bool:
    """Whether an array lies on the host between steps."""
    return home.memory_kind == HOST
