"""LoKr: the update of a frozen weight is the Kronecker product of two small matrices, each of them whole or low-rank.

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; Edalati et al. 2022 (KronA), arXiv 2212.10650.

Legend: the O = a b outputs of a map are a groups of b, its I = c d inputs c groups of d; R rank.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import field_validator

from jaxtune import ops
from jaxtune.errors import AdapterError
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.weights import Tree
from jaxtune.parallel import local
from jaxtune.section import LARGEST
from jaxtune.tune.lycoris import DEFAULTS, SETTINGS, Lycoris, uniform, written
from jaxtune.tune.method import ShardingOf
from jaxtune.tune.peft_files import Files
from jaxtune.tune.plan import Part, Site
from jaxtune.tune.sites import Kind, Start, Tensor, keys_of, site_method

PARTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


class LokrSection(Lycoris):
    """The Kronecker product of two small matrices (Yeh et al. 2023, arXiv 2309.14859)."""

    method: Literal["lokr"] = "lokr"
    decompose_both: bool = False  # the first matrix is low-rank too, where the rank is below half of its size
    decompose_factor: int = -1  # groups of outputs and of inputs, where it divides them; -1: near the square root
    init: Literal["default", "lycoris"] = "default"  # which starts at zero: the first matrix, or the second

    @field_validator("decompose_factor")
    @classmethod
    def _positive(cls, value: int) -> int:
        if not 1 <= value <= LARGEST and value != -1:
            raise ValueError(f"allowed are 1 to {LARGEST}, or -1")
        return value


class Shape(NamedTuple):
    """Of a map's two matrices: [a, c] and [b, d]."""

    a: int
    b: int
    c: int
    d: int

    @classmethod
    def of(cls, section: LokrSection, site: Site) -> "Shape":
        (c, d), (a, b) = (factors(size, section.decompose_factor) for size in site.in_out)
        return cls(a, b, c, d)

    def parts(self, section: LokrSection, rank: int) -> dict[str, tuple[int, int]]:
        """The shapes of what there is of a matrix: low-rank, where the rank is below half of its larger side."""
        a, b, c, d = self
        is_low = section.decompose_both and rank < max(a, c) / 2
        first = {"w1_a": (a, rank), "w1_b": (rank, c)} if is_low else {"w1": (a, c)}
        is_low = rank < max(b, d) / 2
        return first | ({"w2_a": (b, rank), "w2_b": (rank, d)} if is_low else {"w2": (b, d)})


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: `factor` first, if it divides it; else the largest divisor that is neither
    above it nor above the square root. -1: no limit. As peft 0.21's `factorization`."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(n for n in range(1, limit + 1) if size % n == 0)
    return first, size // first


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kronecker(Leaf):
    """W + scale * (w1 (x) w2), never formed. Axis 0 of each part is the layer where W is a stack.

    base: [O, I]; w1: [a, c], or w1_a [a, R] and w1_b [R, c] in its place; w2: [b, d], or w2_a [b, R] and w2_b [R, d];
    whole on every device. scale: scalar. Layers that have a smaller rank, or no adapter, hold zeros for what they lack.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset(PARTS)

    base: Any
    scale: jax.Array
    w1: jax.Array | None = None
    w1_a: jax.Array | None = None
    w1_b: jax.Array | None = None
    w2: jax.Array | None = None
    w2_a: jax.Array | None = None
    w2_b: jax.Array | None = None

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        layers = axes[:-2]
        return {"scale": layers, **dict.fromkeys(PARTS, (*layers, None, None))}

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        (x,) = inputs
        y = ops.linear(x, self.base, split=split)
        first, second = self._matrices()
        added = update(x, first.astype(x.dtype), second.astype(x.dtype), split, y.shape[-1])
        return y + added * self.scale.astype(x.dtype)

    def dense(self, is_table: bool) -> Any:
        first, second = self._matrices()
        weight = ops.dense(self.base)
        product = jnp.einsum("...ac,...bd->...abcd", first, second).reshape(weight.shape)
        return weight + self.scale[..., None, None] * product

    def _matrices(self) -> tuple[jax.Array, jax.Array]:
        whole = (self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b)
        first, second = (w if w is not None else _matmul(a, b) for w, a, b in whole)
        return first, second


def _matmul(a: Any, b: Any) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def update(x: jax.Array, w1_ac: jax.Array, w2_bd: jax.Array, split: str | None, outputs: int) -> jax.Array:
    """x (w1 (x) w2)^T of this device: [..., its inputs] -> [..., its `outputs`].

    What is split over the tensor axis is split between groups, where they divide: then a device needs some rows or
    columns of w1. Otherwise it takes its inputs among zeros, or its outputs out of all.
    """
    (a, c), (b, d) = w1_ac.shape, w2_bd.shape
    parts = 1 if split is None else local.size(split)
    if split is not None and parts > 1 and c % parts == 0:
        w1_ac = local.part(w1_ac, split, 1)
    elif split is not None and parts > 1:
        room = jnp.zeros((*x.shape[:-1], c * d), x.dtype)
        x = jax.lax.dynamic_update_slice_in_dim(room, x, local.index(split) * x.shape[-1], x.ndim - 1)
    is_cut = outputs < a * b
    if is_cut and outputs % b == 0:
        w1_ac = local.part(w1_ac, "tensor", 0)
    groups = ops.linear(x.reshape(*x.shape[:-1], -1, d), w2_bd)
    y = jnp.einsum("...cb,ac->...ab", groups, w1_ac).reshape(*x.shape[:-1], -1)
    return local.part(y, "tensor", y.ndim - 1) if is_cut and outputs % b else y


def lokr_parts(section: LokrSection, site: Site) -> dict[str, Part]:
    shapes = Shape.of(section, site).parts(section, site.rank)
    parts = {name: site.part(shape, (None, None)) for name, shape in shapes.items()}
    return {**parts, "scale": site.part((), ())}


def check(section: LokrSection, site: Site, sharding_of: ShardingOf | None) -> None:
    """Raises AdapterError where the layers of a stack would have matrices of two kinds."""
    shape = Shape.of(section, site)
    kinds = {tuple(shape.parts(section, rank)): rank for rank in sorted(set(site.ranks) - {0})}
    if len(kinds) > 1:
        low, high = list(kinds.values())[:2]
        raise AdapterError(
            f"tune.rank_pattern: ranks {low} and {high} for {site.modules[0].rpartition('.')[2]} in different layers, "
            f"whose matrices are low-rank with {low} and whole with {high}: (a, b, c, d) are {tuple(shape)}; take "
            "ranks that are both below or both at least half of the larger side"
        )


def fresh(section: LokrSection, site: Site, seed: int) -> Start:
    """As PEFT draws them: uniform in +-1/sqrt(columns), but for one, which is zero."""
    shapes = tuple(Shape.of(section, site).parts(section, site.rank).items())
    arrays = keys_of(site, seed), np.array(site.ranks), np.array(site.scales, np.float32)
    zero = "w1" if section.init == "default" else "w2"
    return Start(_initial, arrays, {"shapes": shapes, "zero": zero, "in_layers": site.weight.layers is not None})


def _initial(keys, ranks, scales, *, shapes: tuple, zero: str, in_layers: bool) -> dict[str, jax.Array]:
    """zero: the matrix that starts at zero; of a low-rank first one that is its left factor, of a second its right."""
    zeros = {"w1": ("w1", "w1_a"), "w2": ("w2", "w2_b")}[zero]
    parts = {"scale": scales}
    for name, (rows, columns) in shapes:
        if name.endswith("_a"):  # its columns are as many as the layer's rank
            bounds = jnp.maximum(ranks, 1) ** -0.5
            part = uniform(keys, PARTS.index(name), ranks, (columns, rows), bounds).swapaxes(1, 2)
        else:
            own = ranks if name.endswith("_b") else jnp.where(ranks > 0, rows, 0)
            part = uniform(keys, PARTS.index(name), own, (rows, columns), columns**-0.5)
        parts[name] = jnp.zeros_like(part) if name in zeros else part
    return parts if in_layers else {name: part[0] for name, part in parts.items()}


def lokr_leaf(section: LokrSection, site: Site, base: Any, parts: dict[str, Any]) -> Kronecker:
    return Kronecker(base, **parts)


def lokr_tensors(section: LokrSection, site: Site, row: int) -> list[Tensor]:
    shapes = Shape.of(section, site).parts(section, site.ranks[row])
    return [Tensor(f"lokr_{name}", shape, name) for name, shape in shapes.items()]


def read_lokr(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    return {"init": "lycoris" if tree.get("init_weights") == "lycoris" else "default"}


def write_lokr(section: LokrSection, weights: Tree) -> dict[str, Any]:
    init = {"init_weights": "lycoris"} if section.init == "lycoris" else {}
    return {**written(section), **init}


OWN = {"decompose_both": False, "decompose_factor": -1}
LOKR_KIND = Kind(parts=lokr_parts, start=fresh, leaf=lokr_leaf, tensors=lokr_tensors, check=check)
LOKR_FILES = Files(
    "LOKR",
    {**SETTINGS, **{name: name for name in OWN}},
    {**DEFAULTS, **OWN},
    harmless=frozenset({"init_weights", "rank_dropout_scale"}),  # the second: of rank_dropout, refused where it is on
    read=read_lokr,
    write=write_lokr,
)
LOKR = site_method(LokrSection, LOKR_KIND, LOKR_FILES)
