"""OFT: the inputs of a frozen weight are turned, block by block, by orthogonal matrices that train.

Qiu et al. 2023, arXiv 2306.07280; the turned inputs in place of a turned weight, and the Cayley-Neumann series: Qiu
et al. 2025, arXiv 2506.19847. Numbers and names as in peft 0.21, `OFTRotationModule`.

Legend: T tokens, K blocks of the inputs, b inputs of a block, o outputs.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from jaxtune import ops
from jaxtune.errors import AdapterError, MeshError
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.weights import Tree
from jaxtune.parallel import local
from jaxtune.section import LARGEST, Fraction, NonNegative, Targeted
from jaxtune.tune.method import ShardingOf
from jaxtune.tune.peft_files import TARGET_DEFAULTS, TARGET_SETTINGS, Files
from jaxtune.tune.plan import Part, Site
from jaxtune.tune.sites import Kind, Start, Tensor, site_method

HIGHEST = jax.lax.Precision.HIGHEST
SERIES_SINCE = "0.18.0"  # of PEFT: before it, the last term of the series had another factor


class OftSection(Targeted):
    """Orthogonal turns of the inputs (Qiu et al. 2023, arXiv 2306.07280, and 2025, arXiv 2506.19847)."""

    method: Literal["oft"] = "oft"
    oft_block_size: NonNegative = 32  # inputs that one matrix turns; 0: from rank
    rank: NonNegative = 0  # matrices of a module, its inputs / oft_block_size; 0: from oft_block_size
    block_share: bool = False  # one matrix for all blocks of a module
    use_cayley_neumann: bool = True  # a series for the orthogonal matrix, which is nearly one; false: exact
    num_cayley_neumann_terms: Annotated[int, Field(ge=2, le=LARGEST)] = 5  # of the series
    module_dropout: Fraction = 0.0  # share of a module's blocks that a training step leaves as they are
    bias: Literal["none", "all", "oft_only"] = "none"  # which biases train as well

    @model_validator(mode="after")
    def _nothing_unused(self):
        if (self.rank == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"oft_block_size {self.oft_block_size} and rank {self.rank}: their product is a module's number of "
                "inputs, so one of them has to be 0"
            )
        if self.oft_block_size == 1:
            raise ValueError("oft_block_size 1: one number alone cannot be turned; allowed are 2 or more, or 0")
        if self.adapter is not None:  # PEFT stores what does nothing, too
            return self
        if not self.use_cayley_neumann and self.num_cayley_neumann_terms != 5:
            raise ValueError("num_cayley_neumann_terms would do nothing without use_cayley_neumann")
        if self.block_share and self.module_dropout:
            raise ValueError("module_dropout would do nothing with block_share: there is one matrix")
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned(Leaf):
    """W after the blocks of its inputs are turned: x R W^T, R of K blocks along the diagonal.

    base: [out, in]; skew: [K, b (b - 1) / 2], the upper triangles, row by row, of the skew-symmetric matrices that R
    is made of; K is 1 where all blocks share one. Zeros turn nothing. terms: of the series; None: R is exact.
    dropout: share of the blocks that a training step does not turn.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"skew"})
    EXACT: ClassVar[frozenset[str]] = frozenset({"skew"})

    base: Any
    skew: jax.Array
    terms: int | None = field(default=5, metadata={"static": True})
    share: bool = field(default=False, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        return {"skew": (*axes[:-2], _block_axis(axes[-1], self.share), None)}

    def inputs(self, x: Any, noise: Any, split: str | None) -> tuple[Any, ...]:
        moves = rotations(self.skew, self.terms)
        if noise is not None and self.dropout > 0:
            moves = jnp.where(_is_turned(len(moves), self.dropout, noise.key, split)[:, None, None], moves, 0.0)
        return (turn(x, moves.astype(x.dtype)),)

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        return ops.linear(inputs[0], self.base, split=split)

    def dense(self, is_table: bool) -> Any:
        moves, weight = rotations(self.skew, self.terms), ops.dense(self.base)
        blocks = weight.reshape(*weight.shape[:-1], -1, moves.shape[-1])
        moves = jnp.broadcast_to(moves, (*moves.shape[:-3], blocks.shape[-2], *moves.shape[-2:]))
        return weight + jnp.einsum("...okc,...kbc->...okb", blocks, moves, precision=HIGHEST).reshape(weight.shape)


def _block_axis(in_axis: Any, share: bool) -> Any:
    """Where the blocks lie: with their inputs, but whole along fsdp, which need not divide their number."""
    return None if share or in_axis == "embed" else in_axis


def rotations(skew: jax.Array, terms: int | None) -> jax.Array:
    """R - I, float32: [..., K, b (b - 1) / 2] -> [..., K, b, b].

    With Q the skew-symmetric matrix, exact is Cayley's R = (I - Q)(I + Q)^-1. The series has the other sign:
    R = I + 2 Q + 2 Q^2 + ... + Q^p is nearly (I + Q)(I - Q)^-1, where p = terms - 1, but 3 for 3 terms; and
    I + 2 Q for 2. All as in peft 0.21, `_cayley_batch`.
    """
    size = (1 + math.isqrt(1 + 8 * skew.shape[-1])) // 2
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((*skew.shape[:-1], size, size), jnp.float32).at[..., rows, columns].set(skew)
    q = upper - upper.swapaxes(-1, -2)
    if terms is None:
        return jnp.linalg.solve(jnp.eye(size) + q, -2 * q)
    if terms == 2:
        return 2 * q
    series = q
    for _ in range(max(terms, 4) - 2):
        series = 2 * q + jnp.matmul(q, series, precision=HIGHEST)
    return series


def turn(x: jax.Array, moves: jax.Array) -> jax.Array:
    """x R, [..., in] -> [..., in], from R - I [K, b, b]: small turns survive a narrow type so."""
    blocks = x.reshape(*x.shape[:-1], -1, moves.shape[-1])
    moved = blocks @ moves[0] if len(moves) == 1 else jnp.einsum("...kb,kbc->...kc", blocks, moves)
    return x + moved.reshape(x.shape)


def _is_turned(blocks: int, rate: float, key: jax.Array, split: str | None) -> jax.Array:
    """[K] of this device: all blocks of the module but a random int(rate K) of them."""
    count = blocks * (local.size(split) if split else 1)
    turned = jax.random.permutation(key, count) >= int(rate * count)
    return local.part(turned, split, 0) if split else turned


def block_size(section: OftSection, size: int) -> int:
    """b for a module with `size` inputs. An adapter from elsewhere may ask for what does not divide them: the nearest
    that does is taken for it, the smaller of two, as PEFT does (`adjust_oft_parameters`)."""
    asked = section.rank or section.oft_block_size
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    found = min(divisors, key=lambda n: (abs(n - asked), n))
    return size // found if section.rank else found


def check(section: OftSection, site: Site, sharding_of: ShardingOf | None) -> None:
    """Raises AdapterError where blocks do not fit a weight, MeshError where they would span two devices."""
    size, block = site.in_out[0], block_size(section, site.in_out[0])
    option = "rank" if section.rank else "oft_block_size"
    asked, where = getattr(section, option), site.modules[0]
    if section.adapter is None and (size % asked or block < 2):
        fitting = [n for n in range(2, size + 1) if size % n == 0]
        allowed = sorted({size // n for n in fitting}) if section.rank else fitting
        raise AdapterError(f"tune.{option} {asked} does not fit the {size} inputs of {where}; {_of(allowed)} would")
    blocks = size // block
    if section.adapter is None and section.module_dropout and int(section.module_dropout * blocks) == 0:
        raise AdapterError(
            f"tune.module_dropout {section.module_dropout} of the {blocks} blocks of {where} is less than one; "
            f"it takes {1 / blocks:.4g} or more, or 0"
        )
    in_axis = site.in_out_axes[0]
    if sharding_of is None or in_axis == "embed":
        return
    own = sharding_of((size,), (in_axis,)).shard_shape((size,))[0]
    if own % block:
        raise MeshError(
            f"mesh.tensor {size // own} leaves {own} inputs of {where} on each device, which blocks of {block} do not "
            f"divide; tune.oft_block_size {_of([n for n in range(2, own + 1) if own % n == 0])} would, or leave it out "
            "of tune.targets"
        )


def _of(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")


def oft_parts(section: OftSection, site: Site) -> dict[str, Part]:
    size = site.in_out[0]
    block = block_size(section, size)
    blocks = 1 if section.block_share else size // block
    axis = _block_axis(site.in_out_axes[0], section.block_share)
    return {"skew": site.part((blocks, block * (block - 1) // 2), (axis, None))}


def fresh(section: OftSection, site: Site, seed: int) -> Start:
    """Nothing is turned."""
    return Start(_zeros, settings={"shape": oft_parts(section, site)["skew"].shape})


def _zeros(*, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    return {"skew": jnp.zeros(shape, jnp.float32)}


def oft_leaf(section: OftSection, site: Site, base: Any, parts: dict[str, Any]) -> Turned:
    terms = section.num_cayley_neumann_terms if section.use_cayley_neumann else None
    return Turned(base, parts["skew"], terms, section.block_share, section.module_dropout)


def oft_tensors(section: OftSection, site: Site, row: int) -> list[Tensor]:
    return [Tensor("oft_R.weight", oft_parts(section, site)["skew"].shape[-2:], "skew")]


def read_oft(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    """Refuses the formats that PEFT had before, in which the same numbers mean other matrices."""
    if "oft_block_size" not in tree:
        raise AdapterError(f"{where}: no oft_block_size: an adapter of PEFT 0.13 or older, which cannot be converted")
    version = str(tree.get("peft_version") or "0").partition("@")[0]
    if tree.get("use_cayley_neumann", True) and _number(version) < _number(SERIES_SINCE):
        raise AdapterError(
            f"{where}: use_cayley_neumann of peft_version {tree.get('peft_version')}: before {SERIES_SINCE} the series "
            "had other terms; if this adapter is from a newer one, say so under peft_version"
        )
    # A zero says which of the two counts, so it is no absent value.
    return {name: tree[key] for key, name in (("r", "rank"), ("oft_block_size", "oft_block_size")) if key in tree}


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def write_oft(section: OftSection, weights: Tree) -> dict[str, Any]:
    """With the series, the version that has it: an older PEFT, which has another, fails on the key."""
    version = {"peft_version": SERIES_SINCE} if section.use_cayley_neumann else {}
    return {"coft": False, "fan_in_fan_out": False, "init_weights": True, **version}


OPTIONS = (
    "oft_block_size",
    "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "module_dropout",
    "bias",
)
SETTINGS = {"r": "rank", **{name: name for name in OPTIONS}, **TARGET_SETTINGS}
DEFAULTS: dict[str, Any] = {
    "oft_block_size": 32,
    "rank": 0,
    "block_share": False,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "module_dropout": 0.0,
    "bias": "none",
    **TARGET_DEFAULTS,
}
OFT_FILES = Files(
    "OFT",
    SETTINGS,
    DEFAULTS,
    harmless=frozenset({"eps", "fan_in_fan_out", "init_weights"}),  # eps: of coft, which is refused where it is on
    read=read_oft,
    write=write_oft,
)
OFT_KIND = Kind(parts=oft_parts, start=fresh, leaf=oft_leaf, tensors=oft_tensors, check=check)
OFT = site_method(OftSection, OFT_KIND, OFT_FILES)
