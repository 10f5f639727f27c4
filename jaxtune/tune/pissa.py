"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts as the principal part of each weight.

W = U S V^T; A = sqrt(S / s) V^T and B = U sqrt(S / s), of the largest singular values; the frozen weight becomes
W - s B A. A finished adapter is stored as a plain LoRA of twice the rank over W itself, as PEFT converts one:
s (B A - B0 A0) = s [B, -B0] [A; A0], where A0 and B0 are the first values.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import AdapterError, ConfigError
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.weights import Tree, leaves_with_path, set_path
from jaxtune.parallel import local
from jaxtune.tune.lora import LORA_FILES, LoraSection, Ranked, lora_parts, lora_rate, lora_tensors
from jaxtune.tune.low_rank import LowRank, delta
from jaxtune.tune.plan import Part, Site, make_plan
from jaxtune.tune.sites import Kind, Start, site_method


class PissaSection(Ranked):
    """LoRA that starts as the largest singular values of each weight (Meng et al. 2024, arXiv 2404.02948)."""

    method: Literal["pissa"] = "pissa"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Principal(LowRank):
    """A low-rank leaf over what it left of the weight. first_a, first_b: a and b as they started; they stay."""

    REBASED: ClassVar[bool] = True

    first_a: jax.Array = field(kw_only=True)
    first_b: jax.Array = field(kw_only=True)

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        own = super().axes(axes, is_table)
        return {**own, "first_a": own["a"], "first_b": own["b"]}


def pissa_parts(section: PissaSection, site: Site) -> dict[str, Part]:
    """As LoRA's, twice."""
    parts = lora_parts(section, site)
    return {**parts, "first_a": parts["a"], "first_b": parts["b"]}


def pissa_start(section: PissaSection, site: Site, seed: int) -> Start:
    """The same numbers on any number of devices, whatever the seed.

    Raises:
        AdapterError: a rank that no weight of this size has.
    """
    check_rank(site)
    arrays = np.array(site.ranks), np.array(site.scales, np.float32)
    settings = {"width": site.rank, "stacked": site.weight.layers is not None}
    return Start(_principal, arrays, settings, of_base=True, rebases=True)


def check_rank(site: Site) -> None:
    """Raises AdapterError where a weight has fewer singular values than the rank."""
    out_size, in_size = site.weight.shape
    if site.rank > min(site.weight.shape):
        raise AdapterError(
            f"tune.rank {site.rank}: {site.modules[0]} is {out_size} x {in_size} and has only "
            f"{min(out_size, in_size)} singular values; take a lower rank for it"
        )


def _principal(base, ranks, scales, *, width: int, stacked: bool) -> dict[str, jax.Array]:
    if isinstance(base, Leaf):
        raise ConfigError(
            "tune.method pissa: the model is quantised, and what it takes from the weights would have to be quantised "
            "anew; load the model unquantised, or take method: loftq, which starts from what quantising loses"
        )
    weights = base if stacked else base[None]
    a, b, rest = jax.lax.map(lambda row: _split(*row, width=width), (weights, ranks, scales))
    parts = {"a": a, "b": b, "scale": scales, "first_a": a, "first_b": b, "base": rest}
    return parts if stacked else {name: part[0] for name, part in parts.items()}


def _split(w, rank, scale, *, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one layer: a, b, and what they leave of w, in its type."""
    a, b = factors(w, rank, scale, width)
    return a, b, (w.astype(jnp.float32) - scale * delta(a, b, is_table=False)).astype(w.dtype)


def factors(w_OI: jax.Array, rank: Any, scale: Any, width: int) -> tuple[jax.Array, jax.Array]:
    """(a [I, width], b [width, O]) whose scale * (a b)^T is the nearest to w among matrices of this rank.

    The rest of the width is zero. Each pair of singular vectors has the sign that makes the largest number of its
    column of `a` positive, since a decomposition may give either.
    """
    u, values, v = jnp.linalg.svd(w_OI.astype(jnp.float32), full_matrices=False)
    u, values, v = u[:, :width], values[:width], v[:width]
    largest = jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), axis=1)[:, None], axis=1)[:, 0]
    roots = jnp.sqrt(values / jnp.where(scale > 0, scale, 1.0)) * (jnp.arange(width) < rank)
    turned = roots * jnp.where(largest < 0, -1.0, 1.0)
    return (turned[:, None] * v).T, (u * turned).T


def pissa_leaf(section: PissaSection, site: Site, base: Any, parts: dict[str, Any]) -> Principal:
    return Principal(base, **parts, dropout=section.dropout)


def as_lora(section: PissaSection, weights: Tree, params: Tree) -> tuple[LoraSection, Tree]:
    """The plain LoRA over the original weights that computes the same; its bases are not those, and not looked at.

    Source: peft 0.21, `LoraModel.subtract_mutated_init` and `_convert_state_dict_for_initial_model`.
    """
    grown = math.sqrt(2) if section.use_rslora else 2  # so that the scale stays
    options = {
        **{name: getattr(section, name) for name in section.model_fields_set & LoraSection.model_fields.keys()},
        "method": "lora",
        "rank": 2 * section.rank,
        "alpha": grown * section.alpha,
        "rank_pattern": {name: 2 * rank for name, rank in section.rank_pattern.items()},
        "alpha_pattern": {name: grown * alpha for name, alpha in section.alpha_pattern.items()},
    }
    sites = make_plan(section, weights).sites
    result: Tree = {}
    for path, leaf in leaves_with_path(params):
        set_path(result, path, _joined(sites[path], leaf) if path in sites else leaf)
    return LoraSection.model_validate(options), result


def _joined(site: Site, leaf: Principal) -> LowRank:
    """[a, a0] and [b; -b0] with the columns that a layer uses first."""
    a, b = jnp.concatenate([leaf.a, leaf.first_a], axis=-1), jnp.concatenate([leaf.b, -leaf.first_b], axis=-2)
    unused = np.arange(2 * site.rank) % site.rank >= np.array(site.ranks)[:, None]
    order = np.argsort(unused, axis=1, kind="stable")
    order = order if site.weight.layers is not None else order[0]
    a = jnp.take_along_axis(local.near(a), order[..., None, :], axis=-1)
    b = jnp.take_along_axis(local.near(b), order[..., :, None], axis=-2)
    return LowRank(leaf.base, a, b, leaf.scale, leaf.dropout)


FILES = replace(LORA_FILES, fixed={"init_lora_weights": "pissa"}, stored=as_lora, read=lambda tree, where: {})
KIND = Kind(pissa_parts, pissa_start, pissa_leaf, lora_tensors)
PISSA = replace(site_method(PissaSection, KIND, FILES, rate=lora_rate), rebases=True)
