"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): two random matrices that all maps share stay as they are, and two
vectors of each map train, which scale what lies between the matrices and what comes out.

The matrices exist once, beside the layers; each map takes the part that its size needs.

Legend: T tokens, I inputs, O outputs of a map; r rank.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import ops
from jaxtune.errors import AdapterError
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.config import ModelConfig
from jaxtune.models.hooks import Hooks
from jaxtune.models.weights import HOOKS, Tree, Weight
from jaxtune.parallel import local
from jaxtune.section import Fraction, NonNegative, Positive, Targeted
from jaxtune.tune.method import ShardingOf, is_abstract
from jaxtune.tune.peft_files import TARGET_DEFAULTS, TARGET_SETTINGS, Entry, Files
from jaxtune.tune.plan import Part, Site, make_plan
from jaxtune.tune.sites import Kind, Start, Tensor, entries, site_method, wrap

A, B = "vera_A", "vera_B"  # [rank, most inputs] and [most outputs, rank] of all targets


class VeraSection(Targeted):
    """Two vectors for each target, between random matrices that all of them share (arXiv 2310.11454)."""

    method: Literal["vera"] = "vera"
    rank: Positive = 256  # of the shared matrices
    projection_prng_key: NonNegative = 0  # seed of the shared matrices, which are those of PEFT for it
    save_projection: bool = True  # the shared matrices go into the adapter's file too
    d_initial: float = 0.1  # first value of the vector between them; the other starts at 0
    dropout: Fraction = 0.0  # on the input of the first matrix
    bias: Literal["none", "all", "vera_only"] = "none"  # which biases train as well


@dataclass(frozen=True)
class Projections(Hooks):
    """The two matrices, which every layer sees."""

    rank: int
    inputs: int
    outputs: int

    def shared(self, config: ModelConfig) -> Tree:
        shapes = {A: (self.rank, self.inputs), B: (self.outputs, self.rank)}
        return {name: Weight(shape, (None, None), name) for name, shape in shapes.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BetweenShared(Leaf):
    """W + diag(lambda_b) B diag(lambda_d) A, never formed. Axis 0 of the vectors is the layer where W is a stack.

    base: [O, I]; lambda_d: [r]; lambda_b: [O], whole on every device; a: A, [r, I or more] and b: B, [O or more, r],
    of which the first columns and rows count. In the tree these are None: they lie there once, for all.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"lambda_d", "lambda_b"})

    base: Any
    lambda_d: jax.Array
    lambda_b: jax.Array
    a: jax.Array | None = None
    b: jax.Array | None = None
    dropout: float = field(default=0.0, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        return {"lambda_d": (*axes[:-2], None), "lambda_b": (*axes[:-2], None)}

    def with_shared(self, shared: Tree) -> "BetweenShared":
        return replace(self, a=shared[A], b=shared[B])

    def inputs(self, x: Any, noise: Any, split: str | None) -> tuple[Any, ...]:
        drops = noise is not None and self.dropout > 0
        return (x, ops.dropout(x, self.dropout, noise, split)) if drops else (x,)

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        y, x = ops.linear(inputs[0], self.base, split=split), inputs[-1]
        assert self.a is not None and self.b is not None
        a, b, lambda_b = self.a, self.b[: len(self.lambda_b)], self.lambda_b
        if split is not None:
            a = local.part(a[:, : x.shape[-1] * local.size(split)], split, 1)
        if y.shape[-1] < len(lambda_b):  # this device has some of the outputs
            b, lambda_b = local.part(b, "tensor", 0), local.part(lambda_b, "tensor", 0)
        low = ops.linear(x, a[:, : x.shape[-1]]) * self.lambda_d.astype(x.dtype)
        return y + ops.linear(low, b) * lambda_b.astype(x.dtype)

    def dense(self, is_table: bool) -> Any:
        weight = ops.dense(self.base)
        assert self.a is not None and self.b is not None
        size_out, size_in = weight.shape[-2:]
        low = self.lambda_d[..., :, None] * self.a[:, :size_in]
        high = self.lambda_b[..., :, None] * self.b[:size_out]
        return weight + jnp.matmul(high, low, precision=jax.lax.Precision.HIGHEST)


def projections(section: VeraSection, config: ModelConfig) -> Projections:
    """As large as the largest of the targets needs."""
    from jaxtune.models.decoder import Model

    weights = Model.create(replace(config, tied=False)).weights  # a head that is a target is a weight of its own
    inputs, outputs = zip(*(site.in_out for site in make_plan(section, weights).sites.values()), strict=True)
    return Projections(section.rank, max(inputs), max(outputs))


def draw(key: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """PEFT's float32 matrices for a key: uniform in +-sqrt(6 / columns), from one stream.

    Source: peft 0.21, `_kaiming_init`; torch's generator is MT19937, of which its uniform numbers take 24 bits.
    """
    stream, drawn = np.random.RandomState(key % 2**32), []
    for shape in shapes:
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])))
        bits = stream.randint(0, 2**32, shape, dtype=np.uint32) & (2**24 - 1)
        drawn.append((bits * 2.0**-24 * np.float64(bound + bound) - np.float64(bound)).astype(np.float32))
    return drawn


def vera_parts(section: VeraSection, site: Site) -> dict[str, Part]:
    return {"lambda_d": site.part((section.rank,), (None,)), "lambda_b": site.part((site.in_out[1],), (None,))}


def fresh(section: VeraSection, site: Site, seed: int) -> Start:
    """Nothing is added: lambda_b is zero."""
    shapes = {name: part.shape for name, part in vera_parts(section, site).items()}
    return Start(_constant, settings={**shapes, "value": section.d_initial})


def _constant(*, lambda_d: tuple[int, ...], lambda_b: tuple[int, ...], value: float) -> dict[str, jax.Array]:
    return {"lambda_d": jnp.full(lambda_d, value, jnp.float32), "lambda_b": jnp.zeros(lambda_b, jnp.float32)}


def vera_leaf(section: VeraSection, site: Site, base: Any, parts: dict[str, Any]) -> BetweenShared:
    return BetweenShared(base, **parts, dropout=section.dropout)


def vera_tensors(section: VeraSection, site: Site, row: int) -> list[Tensor]:
    sizes = {"lambda_d": section.rank, "lambda_b": site.in_out[1]}
    return [Tensor(f"vera_{part}", (size,), part) for part, size in sizes.items()]


def wrap_shared(section: VeraSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The parameters with fresh leaves, and the matrices beside them."""
    wrapped = wrap(VERA_KIND, section, params, weights, seed, sharding_of)
    declared: dict[str, Weight] = weights[HOOKS]
    shapes: list[Any] = [declared[name].shape for name in (A, B)]
    drawn = [None, None] if is_abstract(params) else draw(section.projection_prng_key, *shapes)
    place = partial(_placed, sharding_of)
    return {**wrapped, HOOKS: {name: place(shape, array) for name, shape, array in zip((A, B), shapes, drawn)}}


def _placed(sharding_of: ShardingOf | None, shape: tuple[int, ...], array: np.ndarray | None) -> Any:
    """Whole on every device; a shape, where there is no array."""
    where = None if sharding_of is None else sharding_of(shape, (None, None))
    if array is None:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    return jnp.asarray(array) if where is None else jax.make_array_from_callback(shape, where, array.__getitem__)


def vera_entries(section: VeraSection, weights: Tree) -> list[Entry]:
    """The vectors, and the matrices where they are saved."""
    names = (A, B) if section.save_projection else ()
    shared = [Entry(f"base_model.{name}", weights[HOOKS][name].shape, (HOOKS, name), None, None) for name in names]
    return entries(VERA_KIND, section, weights) + shared


def read_vera(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    key = tree.get("projection_prng_key", 0)
    if key is None and not tree.get("save_projection", True):
        raise AdapterError(f"{where}: neither projection_prng_key nor save_projection: its matrices cannot be had")
    return {"projection_prng_key": key or 0, "save_projection": tree.get("save_projection", True)}


def write_vera(section: VeraSection, weights: Tree) -> dict[str, Any]:
    return {"fan_in_fan_out": False, "init_weights": True}


# Source of the keys: peft 0.21, `VeraConfig`, which has no exclude_modules.
SETTINGS = {
    "r": "rank",
    "projection_prng_key": "projection_prng_key",
    "save_projection": "save_projection",
    "vera_dropout": "dropout",
    "d_initial": "d_initial",
    "bias": "bias",
    **{theirs: ours for theirs, ours in TARGET_SETTINGS.items() if ours != "exclude"},
}
DEFAULTS: dict[str, Any] = {"rank": 256, "d_initial": 0.1, "dropout": 0.0, "bias": "none", **TARGET_DEFAULTS}
VERA_KIND = Kind(parts=vera_parts, start=fresh, leaf=vera_leaf, tensors=vera_tensors)
VERA_FILES = Files(
    "VERA",
    SETTINGS,
    DEFAULTS,
    harmless=frozenset({"fan_in_fan_out", "init_weights"}),
    read=read_vera,
    write=write_vera,
)
VERA = replace(
    site_method(VeraSection, VERA_KIND, None),
    wrap=wrap_shared,
    hooks=projections,
    files=VERA_FILES.with_entries(vera_entries),
)
