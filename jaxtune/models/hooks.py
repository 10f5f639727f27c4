"""Where a tuning method may add to the decoder: weights of its own, and what it does with them in named places.

A method that changes a weight is a leaf (leaves.py), not a hook.
"""

from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree
from jaxtune.ops import Noise


@dataclass(frozen=True)
class Hooks:
    """What a method adds; these here add nothing. Compared by value: a model is compiled once for equal ones.

    Virtual tokens are ids from the vocabulary's size on: the data puts them at the start of every document, where the
    embedding has zeros for them, and no loss is on them. So masks, positions, packing and caches need to know nothing.

    Legend: B batch, T time, E hidden size, K key/value heads of this device, D head size.
    """

    @property
    def virtual_tokens(self) -> int:
        """How many stand before every document."""
        return 0

    @property
    def merges(self) -> bool:
        """Whether weights into which the leaves are merged need nothing of it any more: it only holds what they share,
        and has no part of its own in the forward pass."""
        places = ("embedded", "keys_values", "attention_output", "mlp_output")
        return all(getattr(type(self), place) is getattr(Hooks, place) for place in places)

    def shared(self, config: ModelConfig) -> Tree:
        """Declarations of weights that there are once. They lie under "hooks" of the tree."""
        return {}

    def layer(self, config: ModelConfig) -> Tree:
        """Declarations of weights that each layer has ("{layer}" in their keys), under "hooks" of each stack."""
        return {}

    def embedded(self, shared: Tree, slots_BT: jax.Array, dtype: Any, noise: Noise | None) -> jax.Array | None:
        """The embeddings [B, T, E] of virtual tokens, zero elsewhere. slots: a virtual token's number, or below 0.

        noise: of dropout; None turns it off. Its tokens are the batch's, in which a virtual token stands many times.
        """
        return None

    def keys_values(
        self, own: Tree, shared: Tree, slots_BT: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys, after their rotation, and values, as attention and the cache take them. own: this layer's weights."""
        return k_BTKD, v_BTKD

    def attention_output(
        self, own: Tree, residual_BTE: jax.Array, normed_BTE: jax.Array, y_BTE: jax.Array, noise: Noise | None
    ) -> Any:
        """What is added to the residual stream after attention. normed: what attention took. noise: of dropout.

        With sequence parallelism all of them are this device's part of the sequence.
        """
        return y_BTE

    def mlp_output(
        self, own: Tree, residual_BTE: jax.Array, normed_BTE: jax.Array, y_BTE: jax.Array, noise: Noise | None
    ) -> Any:
        """Likewise, after the MLP."""
        return y_BTE


NO_HOOKS = Hooks()
