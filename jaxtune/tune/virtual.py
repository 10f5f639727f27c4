"""What the methods share that put virtual tokens before every conversation: their options, their weights beside the
model's, and the encoders that some of them make their tokens with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import AdapterError
from jaxtune.models.hooks import Hooks
from jaxtune.models.weights import HOOKS, Path, Tree, Weight, map_tree, path_key, set_path
from jaxtune.section import Adapting, Positive
from jaxtune.tune.method import ShardingOf, declared, is_abstract, make
from jaxtune.tune.peft_files import Entry

EMBEDDINGS = "prompt_embeddings"  # PEFT's one tensor
ENCODER_FILE = "prompt_encoder.safetensors"  # ours: what PEFT drops, under PEFT's names


class Virtual(Adapting):
    """Options of the methods that train tokens which stand before every conversation."""

    num_virtual_tokens: Positive = 20  # they count in data.max_length, and in the model's positions


@dataclass(frozen=True)
class VirtualHooks(Hooks):
    """What these methods add to the decoder. count: of the virtual tokens."""

    count: int

    @property
    def virtual_tokens(self) -> int:
        return self.count


def own_weights(weights: Tree) -> list[tuple[Path, Weight]]:
    """The declarations of a method's own weights, with their paths."""
    return [(path, weight) for path, weight in declared(weights) if HOOKS in path]


def own_keys(section: Any, weights: Tree) -> set[str]:
    """All of them train, and nothing else does."""
    return {key for _, weight in own_weights(weights) for key in weight.keys}


def put(
    params: Tree, weights: Tree, bounds: dict[str, float | None], seed: int, sharding_of: ShardingOf | None
) -> Tree:
    """The tree with the first values of a method's own weights in it.

    bounds: by the last name on a weight's path: drawn uniformly from within +-bound; None: normally, with deviation 1.
    """
    result, abstract = map_tree(lambda leaf: leaf, params), is_abstract(params)
    for path, weight in own_weights(weights):
        where = None if sharding_of is None else sharding_of(weight.full_shape, weight.full_axes)
        keys = jnp.stack([path_key(seed, key) for key in weight.keys])
        settings = {"shape": weight.shape, "bound": bounds[path[-1]], "stacked": weight.layers is not None}
        set_path(result, path, make(_drawn, where, abstract, keys, **settings))
    return result


def _drawn(keys: jax.Array, *, shape: tuple[int, ...], bound: float | None, stacked: bool) -> jax.Array:
    """One array for each key, along axis 0 where the weight is a stack's."""
    if bound is None:
        values = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    else:
        values = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, -bound, bound))(keys)
    return values if stacked else values[0]


def linear_bounds(name: str, in_size: int) -> dict[str, float | None]:
    """torch's first values of a Linear: its weight and its bias."""
    bound = 1 / math.sqrt(in_size)
    return {f"{name}_weight": bound, f"{name}_bias": bound}


def matrix(key: str, shape: tuple[int, ...], hidden_size: int) -> Weight:
    """An encoder's weight. It lies in parts along fsdp where a dimension is a multiple of the hidden size, which is
    what fsdp is known to divide."""
    whole: list[str | None] = [None] * len(shape)
    fits = [dim for dim, size in enumerate(shape) if size % hidden_size == 0]
    if len(shape) > 1 and fits:
        whole[fits[-1]] = "embed"
    return Weight(shape, tuple(whole), key)


def linear_weights(name: str, in_size: int, out_size: int, hidden_size: int) -> Tree:
    """Declarations of PEFT's `{name}.weight` and `{name}.bias`."""
    label = name.replace(".", "_")
    return {
        f"{label}_weight": matrix(f"{name}.weight", (out_size, in_size), hidden_size),
        f"{label}_bias": Weight((out_size,), (None,), f"{name}.bias"),
    }


def linear(x: jax.Array, weights: Tree, name: str) -> jax.Array:
    """x W^T + b of an encoder's layer."""
    return x @ weights[f"{name}_weight"].T + weights[f"{name}_bias"]


def precise(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function, jitted, whose matmuls round as little as the device can: for files."""
    jitted = jax.jit(function)

    def call(*arguments: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jitted(*arguments)

    return call


def own_entries(section: Any, weights: Tree) -> list[Entry]:
    """Tensors that are one weight each."""
    return [Entry(weight.key, weight.shape, path, None, None) for path, weight in own_weights(weights)]


# Source of the keys: peft 0.21, `PromptLearningConfig`. What the model's own settings say is filled in where it is
# null, and of the sizes the tensors' shapes are checked.
SETTINGS = {"num_virtual_tokens": "num_virtual_tokens"}
HARMLESS = frozenset({"token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"})


def read_virtual(tree: dict[str, Any], where: FilePath) -> dict[str, Any]:
    """Of the keys that all of them have, those that we cannot be without."""
    if not isinstance(tree.get("num_virtual_tokens"), int):
        raise AdapterError(f"{where}: num_virtual_tokens {tree.get('num_virtual_tokens')!r}; it must be a number")
    if tree.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            f"{where}: num_transformer_submodules {tree['num_transformer_submodules']!r}; a decoder has 1"
        )
    return {}


def write_virtual(token_dim: int, layers: int, heads: int | None = None) -> dict[str, Any]:
    """These keys for a decoder."""
    return {
        "token_dim": token_dim,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
    }


def number_of_layers(weights: Tree) -> int:
    """Of the whole model."""
    return max(weight.layers.stop for _, weight in declared(weights) if weight.layers is not None)


def has_encoder(where: FilePath) -> bool:
    """Whether an adapter's encoder lies beside its adapter_config.json."""
    return (where.parent / ENCODER_FILE).is_file()
