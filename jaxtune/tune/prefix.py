"""Prefix tuning: every layer has keys and values of its own for the virtual tokens, and they train.

They stand in the place of those that the layer computes, after the rotation, so that nothing of a virtual token's own
state is ever seen.

Legend: V virtual tokens, K key/value heads, D head size, H the encoder's hidden size, L layers.
"""

import math
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import model_validator

from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import own_kv_heads
from jaxtune.models.weights import HOOKS, Tree, Weight
from jaxtune.section import Positive
from jaxtune.tune.method import Method, ShardingOf
from jaxtune.tune.peft_files import Derived, Entry, Files
from jaxtune.tune.virtual import (
    EMBEDDINGS,
    ENCODER_FILE,
    HARMLESS,
    SETTINGS,
    Virtual,
    VirtualHooks,
    has_encoder,
    linear,
    linear_bounds,
    linear_weights,
    matrix,
    number_of_layers,
    own_keys,
    own_weights,
    precise,
    put,
    read_virtual,
    write_virtual,
)

KINDS = ("key", "value")  # in PEFT's order
OUTPUT = "transform.2"  # PEFT's name of the encoder's last layer, of which each layer of the model has its part


class PrefixSection(Virtual):
    """Keys and values in every layer before every conversation (Li and Liang 2021, arXiv 2101.00190).

    With a projection the adapter holds what PEFT's holds, and the encoder in prompt_encoder.safetensors beside it,
    without which training could not go on: an adapter that has none loads as one without projection.
    """

    method: Literal["prefix"] = "prefix"
    prefix_projection: bool = False  # an encoder gives the keys and values: linear, tanh, linear
    encoder_hidden_size: Positive | None = None  # of the projection; null: key/value heads times head size
    init_weights: Literal["zero"] | None = None  # keys and values start at zero; null: at random

    @model_validator(mode="after")
    def _nothing_unused(self):
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size belongs to prefix_projection and would do nothing without it")
        if self.adapter is not None and self.init_weights is not None:
            raise ValueError("init_weights is how a new prefix starts and would do nothing with an adapter")
        return self


@dataclass(frozen=True)
class PrefixHooks(VirtualHooks):
    """Keys and values of the virtual tokens, [V, K, D] each in every layer; or, with a projection, what gives them."""

    config: ModelConfig
    size: int | None = None  # H; None: no projection

    def shared(self, config: ModelConfig) -> Tree:
        if self.size is None:
            return {}
        token_dim, hidden = config.num_kv_heads * config.head_dim, config.hidden_size
        embedding = matrix("embedding.weight", (self.count, token_dim), hidden)
        return {"embedding_weight": embedding, **linear_weights("transform.0", token_dim, self.size, hidden)}

    def layer(self, config: ModelConfig) -> Tree:
        heads, size = config.num_kv_heads, config.head_dim
        shape = (self.count if self.size is None else self.size, heads, size)
        weights = {kind: Weight(shape, (None, "kv_heads", None), f"prefix.{{layer}}.{kind}") for kind in KINDS}
        for kind in KINDS if self.size is not None else ():
            weights[f"{kind}_bias"] = Weight((heads * size,), ("kv_heads",), f"prefix.{{layer}}.{kind}_bias")
        return weights

    def keys_values(
        self, own: Tree, shared: Tree, slots_BT: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        is_virtual, slots = (slots_BT >= 0)[..., None, None], jnp.maximum(slots_BT, 0)
        prefix = (own_kv_heads(x[None], self.config)[0] for x in keys_values(own, shared))
        k, v = (jnp.where(is_virtual, x[slots].astype(y.dtype), y) for x, y in zip(prefix, (k_BTKD, v_BTKD)))
        return k, v


def keys_values(own: Tree, shared: Tree) -> list[jax.Array]:
    """The keys and the values [V, K, D] of a layer's prefix: of those heads that `own` has."""
    if not shared:
        return [own[kind] for kind in KINDS]
    hidden = jnp.tanh(linear(shared["embedding_weight"], shared, "transform_0"))

    def project(kind: str) -> jax.Array:
        weight = own[kind]
        bias = own[f"{kind}_bias"].reshape(weight.shape[1:]).astype(weight.dtype)
        return jnp.einsum("vh,hkd->vkd", hidden.astype(weight.dtype), weight) + bias

    return [project(kind) for kind in KINDS]


def hooks(section: PrefixSection, config: ModelConfig) -> PrefixHooks:
    size = section.encoder_hidden_size or config.num_kv_heads * config.head_dim
    return PrefixHooks(section.num_virtual_tokens, config, size if section.prefix_projection else None)


def wrap(section: PrefixSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The parameters with the prefix as PEFT starts it."""
    size, token_dim = _sizes(weights)
    zero = 0.0 if section.init_weights == "zero" else None
    bounds: dict[str, float | None] = dict.fromkeys(KINDS, zero)
    if section.prefix_projection:
        last = 1 / math.sqrt(size) if zero is None else zero
        bounds = dict.fromkeys((*KINDS, *(f"{kind}_bias" for kind in KINDS)), last)
        bounds |= {"embedding_weight": None, **linear_bounds("transform_0", token_dim)}
    return put(params, weights, bounds, seed, sharding_of)


def _sizes(weights: Tree) -> tuple[int, int]:
    """(V, or with a projection H; K D)"""
    shape = _layer_weight(weights).shape
    return shape[0], shape[1] * shape[2]


def _layer_weight(weights: Tree) -> Weight:
    return next(weight for path, weight in own_weights(weights) if path[-1] == KINDS[0])


def entries(section: PrefixSection, weights: Tree) -> list[Entry]:
    """Of every layer a key's columns and a value's, one after another."""
    first, size = _sizes(weights)
    width = number_of_layers(weights) * len(KINDS) * size
    result = []
    for path, weight in own_weights(weights):
        if weight.layers is None:
            result.append(Entry(weight.key, weight.shape, path, None, None))
            continue
        key, is_turned = EMBEDDINGS, False
        shape: tuple[int, ...] = (first, width)
        if path[-1] not in KINDS:
            key, shape = f"{OUTPUT}.bias", (width,)
        elif section.prefix_projection:
            key, shape, is_turned = f"{OUTPUT}.weight", (width, first), True
        for row, layer in enumerate(weight.layers):
            start = (layer * len(KINDS) + KINDS.index(path[-1].removesuffix("_bias"))) * size
            result.append(Entry(key, shape, path, row, None, is_turned, (start, start + size)))
    return result


def derived(section: PrefixSection) -> Derived | None:
    return Derived(ENCODER_FILE, _outputs) if section.prefix_projection else None


def _outputs(section: PrefixSection, params: Tree) -> dict[str, jax.Array]:
    stacks = [params["stacks"][name][HOOKS] for name in sorted(params["stacks"], key=int)]
    return {EMBEDDINGS: precise(_side_by_side)(stacks, params[HOOKS])}


def _side_by_side(stacks: list[Tree], shared: Tree) -> jax.Array:
    """[V, 2 L K D], as PEFT has it."""
    both = [jnp.stack(jax.vmap(keys_values, (0, None))(own, shared), axis=1) for own in stacks]
    prefix = jnp.concatenate(both)  # [L, 2, V, K, D]
    return jnp.moveaxis(prefix, 2, 0).reshape(prefix.shape[2], -1)


def read(tree: dict[str, Any], where: FilePath) -> dict[str, Any]:
    """PEFT itself reads a projection's adapter as one without it."""
    plain = {} if has_encoder(where) else {"prefix_projection": False}
    is_plain = not tree.get("prefix_projection") or plain
    return {**read_virtual(tree, where), **plain, **({"encoder_hidden_size": None} if is_plain else {})}


def write(section: PrefixSection, weights: Tree) -> dict[str, Any]:
    weight = _layer_weight(weights)
    size = section.encoder_hidden_size or _sizes(weights)[1]
    shared = write_virtual(_sizes(weights)[1], number_of_layers(weights), weight.shape[1])
    return {**shared, "encoder_hidden_size": size}


PREFIX_FILES = Files(
    "PREFIX_TUNING",
    {**SETTINGS, "prefix_projection": "prefix_projection", "encoder_hidden_size": "encoder_hidden_size"},
    {},
    harmless=HARMLESS | {"init_weights"},
    read=read,
    write=write,
    entries=entries,
    derived=derived,
)
PREFIX_TUNING = Method(PrefixSection, trained=own_keys, wrap=wrap, files=PREFIX_FILES, hooks=hooks)
