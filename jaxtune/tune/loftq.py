"""LoftQ (Li et al. 2023, arXiv 2310.08659): LoRA that starts with what quantising the weights has lost.

In turn, the weight less the low-rank product is quantised, and the product becomes the best one for what is missing.
It happens as each weight is loaded, where the weight itself is still there.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.models.weights import Tree, Weight
from jaxtune.parallel import local
from jaxtune.quant.four_bit import FourBit
from jaxtune.quant.scheme import AtLoad
from jaxtune.section import Positive
from jaxtune.tune.lora import LORA_FILES, LORA_KIND, LoraSection, Ranked, lora_rate
from jaxtune.tune.low_rank import LowRank, delta
from jaxtune.tune.method import ShardingOf, get_path
from jaxtune.tune.pissa import check_rank, factors
from jaxtune.tune.plan import make_plan
from jaxtune.tune.sites import site_method, wrap_with

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
NOT_PEFT_S = ("fp4", "int4", "nf4 double_quant", "fp4 double_quant")  # bases that PEFT's loftq_init cannot make


class LoftqSection(Ranked):
    """LoRA that starts with what quantising the weights has lost; takes model.quantize (arXiv 2310.08659)."""

    method: Literal["loftq"] = "loftq"
    loftq_bits: Literal[4, 8] = 4  # those of model.quantize
    loftq_iter: Positive = 1  # how often the weights are quantised and the low-rank product fitted


def quantized(section: LoftqSection, weights: Tree, weight: Weight, scheme: AtLoad) -> Callable | None:
    """What makes a weight, [layers, out, in], a `LowRank` leaf over a quantised one; None: the weight has no adapter.

    The product is divided by the adapters' scale, which PEFT takes for 1.
    """
    site = next((site for site in make_plan(section, weights).sites.values() if site.weight == weight), None)
    if site is None:
        return None
    check_rank(site)
    if BITS[scheme.kind] != section.loftq_bits:
        raise ConfigError(
            f"tune.loftq_bits {section.loftq_bits}: {scheme.name} has {BITS[scheme.kind]}; set one like the other"
        )
    split = partial(_split, quantize=scheme.layer, times=section.loftq_iter, width=site.rank)

    def make(w_LOI: jax.Array) -> LowRank:
        scales = jnp.array(site.scales, jnp.float32)
        base, a, b = jax.lax.map(lambda row: split(*row), (w_LOI, np.array(site.ranks), scales))
        return LowRank(base, a, b, scales, section.dropout)

    return make


def _split(w, rank, scale, *, quantize: Callable, times: int, width: int) -> tuple[Any, jax.Array, jax.Array]:
    """(the quantised weight, a, b) of one layer."""
    whole = rest = local.near(w).astype(jnp.float32)
    for _ in range(times):
        base = quantize(rest)
        a, b = factors(whole - base.weight(jnp.float32), rank, scale, width)
        rest = whole - scale * delta(a, b, is_table=False)
    return base, a, b


def wrap(section: LoftqSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The leaves are in place since the weights were loaded.

    Raises:
        ConfigError: they were not quantised then.
    """
    for path, site in make_plan(section, weights).sites.items():
        if not isinstance(get_path(params, path), LowRank):
            raise ConfigError(
                f"tune.method loftq: {site.modules[0]} is not quantised as it is loaded; set model.quantize to nf4, "
                "fp4, int4 or int8 for a model that is not quantised yet, and leave lm_head out of tune.targets"
            )
    return wrap_with(lambda site, leaf, bias: leaf, section, params, weights)


def notes(section: LoftqSection, scheme: Any) -> list[str]:
    """What a user should know before a run over weights that are quantised so."""
    kind = _name(scheme.kind, scheme.double) if isinstance(scheme, AtLoad) else None
    if section.loftq_iter == 1 or kind not in NOT_PEFT_S:
        return []
    return [
        f"tune.loftq_iter {section.loftq_iter} over {kind}: PEFT makes the base of such an adapter itself, of nf4 "
        "without double_quant or of int8, and will refuse this one; jaxtune loads it. For other tools, export with "
        "--onto dequantized, or set loftq_iter: 1 or another model.quantize"
    ]


def _name(kind: str, double: bool) -> str:
    return f"{kind} double_quant" if double else kind


def as_lora(section: LoftqSection, weights: Tree, params: Tree) -> tuple[Any, Tree]:
    """After one round the base is what plain quantising gives, and the adapter a LoRA like others over it. After more,
    PEFT makes the base anew from `loftq_config`: where it would make another, the bits are a name, which it refuses.
    """
    if section.loftq_iter > 1:
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, FourBit))
        names = {_name(leaf.kind, leaf.nested is not None) for leaf in leaves if isinstance(leaf, FourBit)}
        foreign = sorted(names.intersection(NOT_PEFT_S))
        return section.model_copy(update={"loftq_bits": foreign[0]}) if foreign else section, params
    shared = section.model_fields_set & LoraSection.model_fields.keys() - {"method"}
    return LoraSection.model_validate({name: getattr(section, name) for name in shared}), params


def read(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    config = tree.get("loftq_config") or {}
    options = {name: config[name] for name in ("loftq_bits", "loftq_iter") if name in config}
    return options | ({"loftq_bits": 4} if options.get("loftq_bits") in NOT_PEFT_S else {})


def write(section: LoftqSection, weights: Tree) -> dict[str, Any]:
    bits, times = section.loftq_bits, section.loftq_iter
    return {**LORA_FILES.write(section, weights), "loftq_config": {"loftq_bits": bits, "loftq_iter": times}}


FILES = replace(
    LORA_FILES,
    fixed={"init_lora_weights": "loftq"},
    harmless=LORA_FILES.harmless | {"loftq_config"},
    read=read,
    write=write,
    stored=as_lora,
)
LOFTQ = replace(site_method(LoftqSection, LORA_KIND, FILES, rate=lora_rate), wrap=wrap, quantized=quantized)
