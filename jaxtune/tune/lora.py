"""LoRA (arXiv 2106.09685): frozen weights become `LowRank` leaves, whose `a` and `b` train.

Which weights is plan.py's, adapter files are peft_io.py's.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxtune.config import TuneSection
from jaxtune.leaves import LowRank
from jaxtune.models.weights import Path, Tree, Weight, leaves_with_path, map_tree, path_key, set_path
from jaxtune.tune import peft_tensors
from jaxtune.tune.method import Method, ShardingOf, is_abstract, make
from jaxtune.tune.plan import Plan, Site, make_plan


def trained(section: TuneSection, weights: Tree) -> set[str]:
    return set(make_plan(section, weights).trained)


def adapted(section: TuneSection, weights: Tree) -> set[str]:
    return make_plan(section, weights).adapted


def wrap(section: TuneSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The parameters with fresh adapters, or with those of `section.adapter`.

    Weights that train whole become float32, as everything that an adapter file holds is.
    """
    plan = make_plan(section, weights)
    shardings = None if sharding_of is None else _shardings(plan, sharding_of)
    if section.adapter is None:
        draw = lambda: {path: initial(site, section.init, seed) for path, site in plan.sites.items()}  # noqa: E731
        parts = make(draw, shardings, is_abstract(params))
    else:
        params, parts = peft_tensors.read_adapter(section.adapter, plan, weights, params, shardings)
    result: Tree = {}
    for path, leaf in leaves_with_path(map_tree(partial(_wide, plan), weights, params)):
        set_path(result, path, LowRank(leaf, **parts[path], dropout=section.dropout) if path in parts else leaf)
    return result


def _shardings(plan: Plan, sharding_of: ShardingOf) -> dict[Path, dict[str, Sharding]]:
    return {path: {name: sharding_of(*part) for name, part in site.parts.items()} for path, site in plan.sites.items()}


def _wide(plan: Plan, weight: Weight, array: Any) -> Any:
    if not plan.trained & set(weight.keys) or array.dtype == jnp.float32:
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=array.sharding)
    return array.astype(jnp.float32)


def initial(site: Site, init: str, seed: int) -> dict[str, jax.Array]:
    """`a`, `b` and `scale` as PEFT starts them, so that the product is zero.

    Linear: b = 0 and a uniform in +-1/sqrt(in), or normal with deviation 1/rank ("gaussian"). Embedding: a = 0
    and b normal with deviation 1. Each layer draws from its own module name, row by row of the rank, so that
    a layer's numbers depend neither on the stack it lies in nor on the largest rank there.
    """
    in_size, out_size = site.in_out
    ranks = np.array(site.ranks)[:, None, None]
    draws = _draws(site, "normal" if site.is_embedding or init == "gaussian" else "uniform", seed)
    if not site.is_embedding:
        draws = draws / np.maximum(ranks, 1) if init == "gaussian" else draws / math.sqrt(in_size)
    draws = jnp.where(np.arange(site.rank)[:, None] < ranks, draws, 0.0)
    layers = len(site.ranks)
    if site.is_embedding:
        parts = {"a": jnp.zeros((layers, in_size, site.rank)), "b": draws}
    else:
        parts = {"a": draws.swapaxes(1, 2), "b": jnp.zeros((layers, site.rank, out_size))}
    parts["scale"] = jnp.array(site.scales, jnp.float32)
    return parts if site.weight.layers is not None else {name: part[0] for name, part in parts.items()}


def _draws(site: Site, kind: str, seed: int) -> jax.Array:
    """[layers, rank, features] of standard normal numbers, or of numbers uniform in [-1, 1)."""
    in_size, out_size = site.in_out
    shape = (site.rank, out_size if site.is_embedding else in_size)
    draw = {"normal": partial(jax.random.normal), "uniform": partial(jax.random.uniform, minval=-1.0, maxval=1.0)}[kind]
    keys = jnp.stack([path_key(seed, name) for name in site.modules])
    return jax.vmap(lambda key: draw(key, shape, jnp.float32))(keys)


LORA = Method(trained=trained, adapted=adapted, wrap=wrap, separates=True)
