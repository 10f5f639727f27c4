"""DoRA (Liu et al. 2024, arXiv 2402.09353): a low-rank update of each weight's direction, and its rows' lengths apart.

y = m / |W + s B A| * (W + s B A) x, where m trains and |.|, the length of each row, counts as a constant in the
gradient (section 4.3). The length comes from the low-rank terms, so that W + s B A is never formed:

    |w + s b A|^2 = |w|^2 + 2 s (A w) . b + s^2 b (A A^T) b       of one row w of W and b of B

|w|^2 never changes; A w costs as much as `rank` tokens more. Legend: I inputs, O outputs, R rank.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxtune import ops
from jaxtune.float8 import unwrapped
from jaxtune.leaves import Axes
from jaxtune.parallel import local
from jaxtune.tune.lora import LORA_FILES, Drawn, fresh, initial, lora_parts, lora_rate, lora_tensors
from jaxtune.tune.low_rank import LowRank, low_rank
from jaxtune.tune.plan import Part, Site
from jaxtune.tune.sites import Kind, Start, Tensor, site_method

EXACT = jax.lax.Precision.HIGHEST


class DoraSection(Drawn):
    """LoRA of the weights' directions, with their rows' lengths trained apart (Liu et al. 2024, arXiv 2402.09353)."""

    method: Literal["dora"] = "dora"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dora(LowRank):
    """A low-rank leaf whose rows have lengths of their own; of an embedding, [vocab, features], its columns.

    magnitude: [out], the lengths; squares: [out], float32, the squares of those that the base has. A layer of a stack
    that has no adapter has scale 0, and is its base.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"a", "b", "magnitude"})

    magnitude: jax.Array = field(kw_only=True)
    squares: jax.Array = field(kw_only=True)

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        out = (*axes[:-2], axes[-1] if is_table else axes[-2])
        return {**super().axes(axes, is_table), "magnitude": out, "squares": out}

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        """With dropout, as in PEFT, x is dropped for all that is not W x itself: W x + (g - 1) W x' + g s B A x'."""
        a_RI = jax.lax.stop_gradient(self.a).T
        gain = self.gain(ops.linear(a_RI, unwrapped(self.base), split=split), split)
        low, dtype = low_rank(inputs[-1], self), inputs[0].dtype
        if len(inputs) == 1:
            return gain.astype(dtype) * (ops.linear(inputs[0], self.base, split=split) + low)
        whole, dropped = ops.linear(jnp.stack(inputs), self.base, split=split)  # one product: float8 sees one
        return whole + (gain - 1).astype(dtype) * dropped + gain.astype(dtype) * low

    def rows(self, ids: Any, dtype: Any) -> Any:
        cross_RO = jnp.einsum("ir,io->ro", jax.lax.stop_gradient(self.a), ops.dense(self.base, True))
        return super().rows(ids, dtype) * self.gain(cross_RO, "tensor").astype(dtype)

    def gain(self, cross_RO: jax.Array, split: str | None) -> jax.Array:
        """What each output of W + s B A is multiplied by, m / |W + s B A|: float32 [O].

        cross: A W^T; this device's part of the sum, where `split` names the axis along which `in` is split.
        """
        parts = self.a, self.b, self.scale, self.squares, cross_RO
        a, b, scale, squares, cross = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in parts)
        gram = jnp.einsum("ir,is->rs", a, a, precision=EXACT)
        if split:
            cross, gram = local.total((cross, gram), split)
        both = 2 * scale * cross + scale**2 * jnp.einsum("rs,so->ro", gram, b, precision=EXACT)
        return _ratio(self.magnitude, jnp.sqrt(jnp.maximum(squares + jnp.sum(both * b, axis=0), 0)), scale)

    def dense(self, is_table: bool) -> Any:
        axis = -2 if is_table else -1
        moved = super().dense(is_table)
        norm = jnp.sqrt(jnp.sum(jnp.square(moved), axis))
        return moved * jnp.expand_dims(_ratio(self.magnitude, norm, self.scale[..., None]), axis)


def _ratio(magnitude: jax.Array, norm: jax.Array, scale: jax.Array) -> jax.Array:
    """magnitude / norm; 1 for a row of zeros, which has no direction, and without an adapter."""
    is_scaled = (norm > 0) & (scale != 0)
    return jnp.where(is_scaled, magnitude / jnp.where(is_scaled, norm, 1.0), 1.0)


def dora_parts(section: DoraSection, site: Site) -> dict[str, Part]:
    lengths = site.part(site.in_out[1:], site.in_out_axes[1:])
    return {**lora_parts(section, site), "magnitude": lengths, "squares": lengths}


def dora_start(section: DoraSection, site: Site, seed: int) -> Start:
    """LoRA's first values, and the lengths that the weight has, since the product of A and B is zero."""
    start = fresh(section, site, seed)
    return Start(_with_lengths, start.arrays, start.settings, of_base=True)


def _with_lengths(base, keys, ranks, scales, *, kind: str, **settings) -> dict[str, jax.Array]:
    is_table = kind == "embedding"
    squares = jnp.sum(jnp.square(ops.dense(base, is_table)), axis=-2 if is_table else -1)
    parts = initial(keys, ranks, scales, kind=kind, **settings)
    return {**parts, "magnitude": jnp.sqrt(squares), "squares": squares}


def dora_leaf(section: DoraSection, site: Site, base: Any, parts: dict[str, Any]) -> Dora:
    return Dora(base, **parts, dropout=section.dropout)


def dora_tensors(section: DoraSection, site: Site, row: int) -> list[Tensor]:
    return [*lora_tensors(section, site, row), Tensor("lora_magnitude_vector", site.in_out[1:], "magnitude")]


DORA_KIND = Kind(parts=dora_parts, start=dora_start, leaf=dora_leaf, tensors=dora_tensors)
DORA = site_method(DoraSection, DORA_KIND, replace(LORA_FILES, fixed={"use_dora": True}), rate=lora_rate)
