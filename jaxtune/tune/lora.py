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
from jaxtune.models.weights import Path, Tree, Weight, leaves_with_path, map_tree, path_key, set_path
from jaxtune.tune import peft_tensors
from jaxtune.tune.low_rank import LowRank
from jaxtune.tune.method import Method, ShardingOf, is_abstract, make
from jaxtune.tune.plan import Plan, make_plan


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
        parts = fresh(plan, section.init, seed, shardings, is_abstract(params))
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


def fresh(plan: Plan, init: str, seed: int, shardings: Any, abstract: bool) -> dict[Path, dict[str, Any]]:
    """The adapters' first values as PEFT draws them, so that every product is zero.

    Linear: b = 0 and a uniform in +-1/sqrt(in), or normal with deviation 1/rank ("gaussian"). Embedding: a = 0
    and b normal with deviation 1.
    """
    parts = {}
    for path, site in plan.sites.items():
        keys = jnp.stack([path_key(seed, name) for name in site.modules])
        ranks, scales = np.array(site.ranks), np.array(site.scales, np.float32)
        kind = "embedding" if site.is_embedding else init
        where = None if shardings is None else shardings[path]
        sizes = (*site.in_out, site.rank)
        stacked = site.weight.layers is not None
        parts[path] = make(_initial, where, abstract, keys, ranks, scales, sizes=sizes, kind=kind, stacked=stacked)
    return parts


def _initial(keys, ranks, scales, *, sizes: tuple[int, int, int], kind: str, stacked: bool) -> dict[str, jax.Array]:
    """`a`, `b` and `scale` of one leaf, from a key, a rank and a scale for each layer.

    Drawn row by row of the rank, so that a layer's numbers do not depend on the largest rank of its stack.
    """
    in_size, out_size, rank = sizes
    draw = partial(jax.random.uniform, minval=-1.0, maxval=1.0) if kind == "default" else jax.random.normal
    shape = (rank, out_size if kind == "embedding" else in_size)
    draws = jax.vmap(lambda key: draw(key, shape, jnp.float32))(keys)
    ranks = ranks[:, None, None]
    if kind != "embedding":
        draws = draws / math.sqrt(in_size) if kind == "default" else draws / jnp.maximum(ranks, 1)
    draws = jnp.where(jnp.arange(rank)[:, None] < ranks, draws, 0.0)
    if kind == "embedding":
        a, b = jnp.zeros((len(keys), in_size, rank)), draws
    else:
        a, b = draws.swapaxes(1, 2), jnp.zeros((len(keys), rank, out_size))
    parts = {"a": a, "b": b, "scale": scales}
    return parts if stacked else {name: part[0] for name, part in parts.items()}


LORA = Method(trained=trained, adapted=adapted, wrap=wrap, separates=True)
