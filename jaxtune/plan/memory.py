"""Bytes of a step on one device: of each tree from shapes and shardings, of the whole from what was compiled."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax

DEVICE, HOST = "device", "pinned_host"


def tree_bytes(tree: Any) -> Counter[str]:
    """Bytes of a tree's arrays (or ShapeDtypeStructs with shardings) on one device, by kind of memory."""
    total: Counter[str] = Counter()
    for array in jax.tree.leaves(tree):
        total[memory_kind(array.sharding)] += array_bytes(array)
    return total


def array_bytes(array: Any) -> int:
    """Of one array on one device."""
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def memory_kind(sharding: Any) -> str:
    """`device`, or `pinned_host` for what is offloaded."""
    return HOST if getattr(sharding, "memory_kind", None) == HOST else DEVICE


@dataclass(frozen=True)
class Compiled:
    """What a compiled program needs on one device, in bytes: in the device's memory, and in the host's for it."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take their arguments' place
    temporaries: int
    host: int = 0

    @classmethod
    def of(cls, compiled: Any, host: int = 0) -> "Compiled":
        """From compiled.memory_analysis(). host: bytes of the state that lie on the host between steps.

        A CPU has one memory, and counts everything as the device's: there `host` is taken off.
        """
        found = compiled.memory_analysis()
        on_host = found.host_argument_size_in_bytes + found.host_output_size_in_bytes - found.host_alias_size_in_bytes
        away = 0 if on_host else host
        return cls(
            arguments=found.argument_size_in_bytes - away,
            outputs=found.output_size_in_bytes - away,
            aliased=found.alias_size_in_bytes - away,
            temporaries=found.temp_size_in_bytes,
            host=away + on_host + found.host_temp_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        """All that is in the device's own memory at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries
