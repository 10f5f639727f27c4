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
    """Of one array on one device; arrays of int4 and the like take a byte an element unless packed."""
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def memory_kind(sharding: Any) -> str:
    """`device`, or `pinned_host` for what is offloaded."""
    kind = getattr(sharding, "memory_kind", None)
    return HOST if kind == HOST else DEVICE


@dataclass(frozen=True)
class Compiled:
    """What one device needs to run a compiled program, in bytes; host: what lies in the host's pinned memory."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take their arguments' place
    temporaries: int
    host: int = 0

    @classmethod
    def of(cls, compiled: Any) -> "Compiled":
        """From compiled.memory_analysis()."""
        found = compiled.memory_analysis()
        return cls(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            host=found.host_argument_size_in_bytes
            + found.host_output_size_in_bytes
            - found.host_alias_size_in_bytes
            + found.host_temp_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        """All that is there at once, in the device's own memory."""
        return self.arguments + self.outputs - self.aliased + self.temporaries
