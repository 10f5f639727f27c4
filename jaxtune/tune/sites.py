"""Methods that put a typed leaf on each of some chosen weights: what they share.

A method says, of one weight (a `Site` of plan.py): which parts it adds, how they start, which leaf holds them, and
under which names PEFT stores them. Choosing weights, sharding, loading, saving and merging are then the same for all.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.leaves import Leaf
from jaxtune.models.weights import Tree, Weight, leaves_with_path, map_tree, path_key, set_path
from jaxtune.section import Targeted
from jaxtune.tune.method import Method, Rate, ShardingOf, get_path, is_abstract, make
from jaxtune.tune.peft_files import PREFIX, Entry, Files, whole_entries
from jaxtune.tune.plan import Part, Site, make_plan


class Tensor(NamedTuple):
    """What PEFT stores of one module: `{module}.{suffix}`, its shape there, and the part of the leaf that it is.

    turned: the file has it transposed. Otherwise the two may differ by dimensions of size 1.
    """

    suffix: str
    shape: tuple[int, ...]
    part: str
    turned: bool = False


class Start(NamedTuple):
    """How a leaf's parts start: `function(*arrays, **settings)`, jitted, gives them by name.

    settings: static; weights of one shape are compiled once. of_base: the base comes first among the arrays.
    rebases: and the result has another in its place, under "base".
    """

    function: Callable[..., dict[str, jax.Array]]
    arrays: tuple[Any, ...] = ()
    settings: dict[str, Any] = {}
    of_base: bool = False
    rebases: bool = False


@dataclass(frozen=True)
class Kind:
    """What a method does with one weight.

    parts: (section, site) -> shapes and logical axes of the parts that it adds, by name.
    start: (section, site, seed) -> how they start. A layer without an adapter has values that change nothing.
    leaf: (section, site, base, parts) -> the leaf.
    tensors: (section, site, row) -> what PEFT stores of the module in that row.
    takes_bias: where the map has a bias, the parts have a copy of it under "bias".
    check: (section, site, sharding_of) raises AdapterError where the options do not fit the weight, and MeshError where
    they do not fit the mesh.
    """

    parts: Callable[[Any, Site], dict[str, Part]]
    start: Callable[[Any, Site, int], Start]
    leaf: Callable[[Any, Site, Any, dict[str, Any]], Leaf]
    tensors: Callable[[Any, Site, int], list[Tensor]]
    takes_bias: bool = False
    check: Callable[[Any, Site, ShardingOf | None], None] = lambda section, site, sharding_of: None


def site_method(
    section: type[Targeted],
    kind: Kind,
    files: Files | None,
    rate: Rate = lambda section, weight, part, lr: 1.0,
) -> Method:
    """The method that puts leaves of this kind on the targets of a section.

    files: what PEFT's adapter_config.json says of it; the tensors are the kind's.
    """
    stored = None if files is None else files.with_entries(partial(entries, kind))
    return Method(
        section,
        trained=lambda section, weights: set(make_plan(section, weights).trained),
        adapted=lambda section, weights: make_plan(section, weights).adapted,
        wrap=partial(wrap, kind),
        separates=True,
        files=stored,
        rate=rate,
    )


def wrap(kind: Kind, section: Targeted, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The parameters with fresh leaves."""
    made = partial(_leaf, kind, section, seed, sharding_of)
    return wrap_with(made, section, params, weights, kind.takes_bias)


def wrap_with(
    made: Callable[[Site, Any, Any], Leaf], section: Targeted, params: Tree, weights: Tree, takes_bias: bool = False
) -> Tree:
    """The parameters with `made(site, weight, bias)` at every site. Weights that train whole become float32, as all
    that an adapter file holds."""
    plan = make_plan(section, weights)
    result: Tree = {}
    for path, leaf in leaves_with_path(widened(params, weights, plan.trained)):
        site = plan.sites.get(path)
        if site is not None:
            leaf = made(site, leaf, get_path(params, (*path[:-1], "bias")) if takes_bias else None)
        set_path(result, path, leaf)
    return result


def _leaf(
    kind: Kind, section: Targeted, seed: int, sharding_of: ShardingOf | None, site: Site, base: Any, bias: Any
) -> Leaf:
    kind.check(section, site, sharding_of)
    start = kind.start(section, site, seed)
    arrays = (base, *start.arrays) if start.of_base else start.arrays
    where: Any = None
    if sharding_of is not None:
        where = {name: sharding_of(*part) for name, part in kind.parts(section, site).items()}
        if start.rebases:
            where["base"] = jax.tree.map(lambda x: x.sharding, base)
    parts = make(start.function, where, is_abstract({"base": base}), *arrays, **start.settings)
    if bias is not None:
        # An array of its own: the one that the map has may be given up, as when a pipeline is made.
        parts["bias"] = make(jnp.copy, getattr(bias, "sharding", None), is_abstract({"bias": bias}), bias)
    return kind.leaf(section, site, parts.pop("base", base), parts)


def widened(params: Tree, weights: Tree, trained: Set[str]) -> Tree:
    """The tree with the weights that train whole in float32, which an adapter file has them in."""
    return map_tree(partial(_wide, trained), weights, params)


def _wide(trained: Set[str], weight: Weight, array: Any) -> Any:
    if not trained & set(weight.keys) or array.dtype == jnp.float32:
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=array.sharding)
    return array.astype(jnp.float32)


def keys_of(site: Site, seed: int, purpose: str = "") -> jax.Array:
    """A random key for each layer of a site, from the seed and the module's name alone."""
    return jnp.stack([path_key(seed, name + purpose) for name in site.modules])


def stacked(site: Site, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parts with axis 0 for the layers as the weight has them: without it, where it is of no stack."""
    return parts if site.weight.layers is not None else {name: part[0] for name, part in parts.items()}


def entries(kind: Kind, section: Targeted, weights: Tree) -> list[Entry]:
    """Every tensor that an adapter file holds, no more and no less."""
    plan = make_plan(section, weights)
    found = [entry for site in plan.sites.values() for entry in _site_entries(kind, section, site)]
    return found + whole_entries(plan, weights)


def _site_entries(kind: Kind, section: Targeted, site: Site) -> Iterator[Entry]:
    for row, (module, rank) in enumerate(zip(site.modules, site.ranks)):
        axis = None if site.weight.layers is None else row
        for tensor in kind.tensors(section, site, row) if rank else ():
            key = f"{PREFIX}{module}.{tensor.suffix}"
            yield Entry(key, tensor.shape, site.path, axis, tensor.part, tensor.turned)


def sites_in(section: Targeted, params: Tree, weights: Tree) -> list[tuple[Site, Any]]:
    """Each site with its leaf in a tree."""
    return [(site, get_path(params, path)) for path, site in make_plan(section, weights).sites.items()]
