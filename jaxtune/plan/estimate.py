"""A step's memory and time from arithmetic alone, in microseconds: what orders a search's candidates, not what it reports.

Bytes of weights, gradients and moments follow exactly from shapes. Activations and seconds are rough; a search
compiles the best few and corrects the rest by what it finds.

Legend: E hidden size, Q and K all query and key heads together, I intermediate size, T time, V vocabulary; each of
this device's share where `tensor` or `context` split it.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import Config
from jaxtune.leaves import Axes, map_parts
from jaxtune.loss import CHUNK
from jaxtune.mesh import rules_of
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree, leaves_with_path
from jaxtune.parallel.schedule import bubble, make_schedule
from jaxtune.plan.target import Chip

HOST_LINK = 25e9  # bytes a second between a device and its host: PCIe 4 x16, rounded down
USED = 0.5  # of the chip's peak, by matmuls that are large enough
Kind = tuple[Axes, bool]  # logical axes of an array, whether it trains


@dataclass(frozen=True)
class Facts:
    """What does not depend on mesh, memory or micro-batches."""

    model: ModelConfig
    numbers: dict[Kind, int]  # elements of all arrays of a kind
    moment_bytes: float  # of the optimiser, for each trained number
    weight_bytes: int  # of a frozen number; trained ones of an adapter are float32
    compute_bytes: int
    flops: float  # that the model asks for, all devices together

    @classmethod
    def of(cls, model: ModelConfig, weights: Tree, params: Tree, mask: Tree, optimizer: Any, compute: Any, flops: float):
        """weights, params, mask: declarations, shapes and what trains. compute: the type of the activations."""
        numbers: Counter[Kind] = Counter()
        for path, weight in leaves_with_path(weights):
            kinds = map_parts(lambda array, axes: axes, _at(params, path), weight.full_axes, weight.is_table)
            for array, train, axes in zip(*map(_leaves, (_at(params, path), _at(mask, path), kinds)), strict=True):
                numbers[axes, train] += math.prod(array.shape)
        trained = [x for x, train in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True) if train]
        moments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optimizer.init, trained)))
        count = sum(x.size for x in trained)
        each = next(x.dtype.itemsize for x in jax.tree.leaves(params))
        return cls(model, dict(numbers), moments / count, each, jnp.dtype(compute).itemsize, flops)
