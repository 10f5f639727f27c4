"""Tuning methods as transforms of the parameter tree: `resolve`, `layout`, then `apply`.

    section = resolve(section)                   # an adapter's settings put in place
    config, stacks = layout(section, config)     # before the weights are declared
    model = Model.create(config, stacks, hooks=hooks(section, config))
    params, mask = apply(section, params, model.weights, seed, sharding_of)

Files in PEFT's format are peft_io.py's, merging is merge.py's.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.leaves import Leaf, count, mask_of, partition
from jaxtune.models.config import ModelConfig
from jaxtune.models.hooks import NO_HOOKS, Hooks
from jaxtune.models.weights import HOOKS, Path, Tree, Weight, map_tree, names_of
from jaxtune.section import TuneSection, adapter_of
from jaxtune.tune.adalora import ADALORA, AdaloraSection
from jaxtune.tune.bottleneck import HOULSBY, PARALLEL, PFEIFFER
from jaxtune.tune.dora import DORA
from jaxtune.tune.full import FREEZE, FULL
from jaxtune.tune.ia3 import IA3
from jaxtune.tune.loftq import LOFTQ, LoftqSection, notes
from jaxtune.tune.loha import LOHA, LohaSection
from jaxtune.tune.lokr import LOKR
from jaxtune.tune.lora import LORA, Ranked
from jaxtune.tune.method import EMBEDDING, HEAD, Course, Method, ShardingOf, declared, get_path, is_abstract
from jaxtune.tune.oft import OFT
from jaxtune.tune.p_tuning import P_TUNING
from jaxtune.tune.peft_config import resolve
from jaxtune.tune.peft_tensors import open_checked
from jaxtune.tune.pissa import PISSA
from jaxtune.tune.plan import make_plan
from jaxtune.tune.prefix import PREFIX_TUNING
from jaxtune.tune.prompt import PROMPT_TUNING
from jaxtune.tune.selective import BITFIT, LAYERNORM
from jaxtune.tune.tokens import TRAINABLE_TOKENS
from jaxtune.tune.vera import VERA

METHODS: dict[str, Method] = {
    "full": FULL,
    "freeze": FREEZE,
    "lora": LORA,
    "dora": DORA,
    "pissa": PISSA,
    "loftq": LOFTQ,
    "adalora": ADALORA,
    "ia3": IA3,
    "prompt": PROMPT_TUNING,
    "p_tuning": P_TUNING,
    "prefix": PREFIX_TUNING,
    "oft": OFT,
    "vera": VERA,
    "layernorm": LAYERNORM,
    "bitfit": BITFIT,
    "trainable_tokens": TRAINABLE_TOKENS,
    "loha": LOHA,
    "lokr": LOKR,
    "houlsby": HOULSBY,
    "pfeiffer": PFEIFFER,
    "parallel": PARALLEL,
}

__all__ = [
    "METHODS",
    "apply",
    "check",
    "counts",
    "course",
    "gates",
    "has_adapter",
    "hooks",
    "layout",
    "quantized",
    "rates",
    "resolve",
    "shapes",
    "virtual_ids",
    "vocab_size",
    "words",
]


def words(section: TuneSection, tokenizer: Any) -> tuple[Any, TuneSection]:
    """(the tokenizer with the tokens that the method adds, the section, resolved, with what it needs of them)."""
    section = resolve(section)
    return METHODS[section.method].words(section, tokenizer)


def vocab_size(section: TuneSection, config: ModelConfig) -> int:
    """Rows of the embedding and of the head under this method.

    Raises:
        ConfigError: the section names tokens that cannot be.
    """
    section = resolve(section)
    return METHODS[section.method].vocab_size(section, config)


def layout(section: TuneSection, config: ModelConfig, one_stack: bool = False) -> tuple[ModelConfig, tuple[range, ...]]:
    """The model's settings and stacks of layers that a method needs.

    The head is untied where an adapter, or a full copy, of it or of the embedding trains: as in PEFT, the two
    are separate from then on. Layers of one stack train the same weights; the layers below the first that
    trains anything are a stack of their own, in which no gradient is computed.

    Raises:
        AdapterError: the section does not fit the model; the message names what is near.
    """
    section, method = resolve(section), METHODS[section.method]
    config = replace(config, vocab_size=method.vocab_size(section, config))
    hooked = hooks(section, config)
    if config.tied and method.separates:
        apart = replace(config, tied=False)
        weights = _declare(apart, hooked)
        ends = {*get_path(weights, EMBEDDING).keys, *get_path(weights, HEAD).keys}
        if ends & (method.trained(section, weights) | method.adapted(section, weights)):
            config = apart
    if one_stack:
        return config, (range(config.num_layers),)
    weights = _declare(config, hooked)
    return config, _stacks(
        weights, config.num_layers, method.trained(section, weights), method.adapted(section, weights)
    )


def check(section: TuneSection, config: ModelConfig, scheme: Any = None) -> list[str]:
    """What a user should know of a section on a model, before its weights are read: of the methods of two narrow
    matrices, that they are not narrow; of LoftQ, that PEFT will not load what it leaves.

    scheme: how the model's linear maps are quantised.

    Raises:
        AdapterError: as layout.
    """
    section = resolve(section)
    config, _ = layout(section, config)
    told = notes(section, scheme) if isinstance(section, LoftqSection) else []
    if not isinstance(section, (Ranked, AdaloraSection, LohaSection)):
        return told
    sites = make_plan(section, _declare(config, hooks(section, config))).sites.values()
    wide = [
        f"{site.rank} on {site.modules[0].rsplit('.', 1)[-1]}, of {site.in_out[0]} and {site.in_out[1]}"
        for site in sites
        if site.rank > max(site.in_out)
    ]
    if not wide:
        return told
    named = "tune.init_r" if isinstance(section, AdaloraSection) else "tune.rank or rank_pattern"
    return [
        *told,
        f"{named}: a rank above both sides of a weight ({'; '.join(wide)}): the adapter is larger "
        "than the weight itself, and can do no more than full tuning",
    ]


def apply(
    section: TuneSection,
    params: Tree,
    weights: Tree,
    seed: int,
    sharding_of: ShardingOf | None = None,
    tokenizer: Any = None,
) -> tuple[Tree, Tree]:
    """(params with the method's leaves in place, mask of what trains).

    params: arrays, traced arrays, or jax.ShapeDtypeStructs, for `weights` as declared after `layout`; where
    `layout` untied the head, the head may be absent and is then the embedding: the same buffer while both are
    frozen, else a copy. tokenizer: of the model, for a method that starts from a text. mask: the same structure with
    a bool for every array. New values depend on `seed` and the Hugging Face module names alone.

    Raises:
        AdapterError: the section, or the adapter that it starts from, does not fit the model.
    """
    section, method = resolve(section), METHODS[section.method]
    trained = method.trained(section, weights)
    params = _with_head(params, weights, trained, sharding_of)
    adapter, stored = adapter_of(section), None
    if adapter is not None and method.files is not None:
        stored = open_checked(adapter, method.files, section, weights)
    words = (tokenizer,) if method.needs_tokenizer else ()
    params = method.wrap(section, params, weights, seed, sharding_of, *words)
    if stored is not None:
        params = stored.put_into(params)
    return params, map_tree(lambda weight, leaf: _mask(weight, leaf, trained), weights, params)


def hooks(section: TuneSection, config: ModelConfig) -> Hooks:
    """What the method adds to the decoder beside its weights."""
    section = resolve(section)
    return METHODS[section.method].hooks(section, config) or NO_HOOKS


def virtual_ids(section: TuneSection, config: ModelConfig) -> range:
    """The ids past the vocabulary that the method puts before every document."""
    return range(config.vocab_size, config.vocab_size + hooks(section, config).virtual_tokens)


def has_adapter(section: TuneSection) -> bool:
    """Whether the method ends in an adapter; the others end in a whole model."""
    return METHODS[section.method].files is not None


def course(section: TuneSection, weights: Tree, steps: int) -> Course | None:
    """What the method does in a run of so many steps besides descending."""
    section = resolve(section)
    return METHODS[section.method].course(section, weights, steps)


def quantized(section: TuneSection, weights: Tree) -> Callable[[Weight, Any], Callable | None]:
    """(weight, how weights are quantised as they are loaded) -> what makes its leaf of it, where the method does."""
    section = resolve(section)
    return partial(METHODS[section.method].quantized, section, weights)


def rates(section: TuneSection, weights: Tree, trainable: Tree, lr: float) -> Tree:
    """For every array of a trainable tree: what the learning rate, of which `lr` is the highest, is multiplied by."""
    section = resolve(section)
    rate = METHODS[section.method].rate

    def of(weight: Weight, leaf: Any) -> Any:
        if not isinstance(leaf, Leaf):
            return None if leaf is None else rate(section, weight, None, lr)
        return jax.tree_util.tree_map_with_path(lambda path, _: rate(section, weight, path[-1].name, lr), leaf)

    return map_tree(of, weights, trainable)


def _declare(config: ModelConfig, hooked: Hooks) -> Tree:
    from jaxtune.models.decoder import Model

    return Model.create(config, hooks=hooked).weights


def _stacks(weights: Tree, layers: int, trained: set[str], adapted: set[str]) -> tuple[range, ...]:
    """Runs of layers that train the same weights, from declarations in one stack."""
    stacked = [weight for _, weight in declared(weights) if weight.layers is not None]
    names = [{weight.key: weight.key.format(layer=layer) for weight in stacked} for layer in range(layers)]
    touched = [bool((trained | adapted) & set(keys.values())) for keys in names]
    below = touched.index(True) if True in touched else layers
    ends = [weight for path, weight in declared(weights) if path[0] in (EMBEDDING[0], HOOKS)]
    if any(set(weight.keys) & (trained | adapted) for weight in ends):
        below = 0  # the gradient of the embedding, and of what all layers see, passes through every layer
    kinds = [(i < below, {name for name, key in keys.items() if key in trained}) for i, keys in enumerate(names)]
    starts = [i for i in range(layers) if i == 0 or kinds[i] != kinds[i - 1]]
    return tuple(range(start, stop) for start, stop in zip(starts, [*starts[1:], layers]))


def _with_head(params: Tree, weights: Tree, trained: set[str], sharding_of: ShardingOf | None) -> Tree:
    """The tree with the untied head in it, where it is declared and absent."""
    head: Weight | None = get_path(weights, HEAD)
    if head is None or get_path(params, HEAD) is not None:
        return params
    embedding: Weight = get_path(weights, EMBEDDING)
    value: Any = get_path(params, EMBEDDING)
    if not is_abstract(params):
        if trained & {*head.keys, *embedding.keys}:
            value = jnp.copy(value)  # a trained array is given up at each step: the other one needs its own
        if sharding_of is not None and head.axes != embedding.axes:
            value = jax.device_put(value, sharding_of(head.full_shape, head.full_axes))
    return {**params, HEAD[0]: {HEAD[1]: value}}


def _mask(weight: Weight, leaf: Any, trained: set[str]) -> Any:
    """Booleans in the leaf's own structure."""
    if isinstance(leaf, Leaf):
        return mask_of(leaf)
    return any(key in trained for key in weight.keys)


def gates(section: TuneSection, weights: Tree) -> dict[Path, np.ndarray]:
    """Of each stacked weight of which some layers train, or carry what does, and others not: a bool for each layer."""
    section = resolve(section)
    method = METHODS[section.method]
    moved = method.trained(section, weights) | method.adapted(section, weights)
    flags = {path: np.array([key in moved for key in weight.keys]) for path, weight in declared(weights)}
    return {path: layers for path, layers in flags.items() if layers.any() and not layers.all()}


def counts(section: TuneSection, weights: Tree, params: Tree, mask: Tree) -> tuple[int, int]:
    """(numbers that train, numbers in all) of what `apply` gives. Where an array has room for more than its layers
    hold, the rest is neither; layers of a weight that stay as they are belong to the second."""
    gated, own = gates(section, weights), shapes(section, weights)
    trained, empty = 0, 0
    for where, array in jax.tree_util.tree_leaves_with_path(partition(params, mask)[0]):
        path, weight = names_of(where), tuple(part.key for part in where if hasattr(part, "key"))
        layers = gated.get(weight, np.ones(1, bool))
        moved = sum(map(math.prod, own[path])) if path in own else array.size * layers.sum().item() // layers.size
        trained += moved
        empty += array.size - moved if path != weight else 0
    return trained, count(params) - empty


def shapes(section: TuneSection, weights: Tree) -> dict[Path, list[tuple[int, ...]]]:
    """Of each part of a stacked leaf that is larger in some layers than in others, by its path: what an adapter file
    has of it, layer by layer; (0,) of a layer without an adapter. What the array has besides are zeros, and stay so.
    """
    section = resolve(section)
    files = METHODS[section.method].files
    found: dict[Path, list[tuple[int, ...]]] = {}
    for entry in [] if files is None else files.entries(section, weights):
        if entry.part is not None and entry.row is not None:
            layers = get_path(weights, entry.path).keys
            found.setdefault((*entry.path, entry.part), [(0,)] * len(layers))[entry.row] = entry.shape
    return {path: own for path, own in found.items() if len({*own} - {(0,)}) > 1}
