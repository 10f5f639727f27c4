"""The decoder: Qwen2, Qwen3, Llama and Mistral are settings of it.

The modules are Flax NNX; where an array will stand they declare a `Weight`. A `Model` splits the modules
once into a static graph and the tree of declarations; all hot code then works on plain trees.

Legend: B batch, T time, E hidden size, H query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as _save

from jaxtune import ops
from jaxtune.mesh import constrain, gather
from jaxtune.models.attention import attention
from jaxtune.models.config import ModelConfig
from jaxtune.models.rope import cos_sin, rotate
from jaxtune.models.weights import Tree, Weight, map_tree

LAYER = "model.layers.{layer}."
# What a layer keeps for its backward pass; the rest is computed again. Measured on CPU, saving these was
# faster than saving everything, which costs memory traffic, and than saving nothing, which costs matmuls.
SAVED = ("query", "key", "value", "after_attention", "gate", "up")


class Linear(nnx.Module):
    """y = x W^T + b."""

    def __init__(self, key: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool = False):
        self.weight = nnx.Param(Weight(shape, axes, f"{key}.weight"))
        self.bias = nnx.Param(Weight(shape[:1], axes[:1], f"{key}.bias", "zeros")) if bias else None

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        bias = None if self.bias is None else self.bias.get_value()
        return ops.linear(x, self.weight.get_value(), bias, key)


class RMSNorm(nnx.Module):
    def __init__(self, key: str, size: int, eps: float):
        self.weight = nnx.Param(Weight((size,), ("norm",), f"{key}.weight", "ones"))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.rms_norm(x, self.weight.get_value(), self.eps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values already computed, for generation. Columns are filled from the left.

    k, v: [layers of the stack, B, S, K, D]; segments: [B, S], 0 where a column is empty or padding.
    """

    k: Any
    v: Any
    segments: jax.Array
    length: jax.Array | None = None  # columns filled; None: none are, and the next pass need not look for any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer of one pass sees."""

    cos: jax.Array  # [B, T, D / 2]
    sin: jax.Array
    segments: jax.Array  # [B, T]
    cache_segments: jax.Array | None = None  # [B, S], with this pass's columns already in
    start: jax.Array | None = None  # first column of this pass in the cache; None: nothing is before it


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig):
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        name = LAYER + "self_attn."
        self.q_proj = Linear(name + "q_proj", (q_size, c.hidden_size), ("heads", "embed"), c.qkv_bias)
        self.k_proj = Linear(name + "k_proj", (kv_size, c.hidden_size), ("kv_heads", "embed"), c.qkv_bias)
        self.v_proj = Linear(name + "v_proj", (kv_size, c.hidden_size), ("kv_heads", "embed"), c.qkv_bias)
        self.o_proj = Linear(name + "o_proj", (c.hidden_size, q_size), ("embed", "heads"), c.out_bias)
        self.q_norm = RMSNorm(name + "q_norm", c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(name + "k_norm", c.head_dim, c.norm_eps) if c.qk_norm else None
        self.head_dim = c.head_dim

    def __call__(self, x_BTE: jax.Array, context: Context, window, cache, key):
        q_key, k_key, v_key, o_key = ops.split_keys(key, 4)
        q, k, v = self.q_proj(x_BTE, q_key), self.k_proj(x_BTE, k_key), self.v_proj(x_BTE, v_key)
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        q, k, v = (_save(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))
        if cache is not None:
            write = partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=0 if context.start is None else context.start, axis=1
            )
            cache = write(cache[0], k), write(cache[1], v)
        if context.start is None:
            out = attention(q, k, v, context.segments, context.segments, window=window)
        else:
            k, v = cache
            out = attention(q, k, v, context.segments, context.cache_segments, context.start, window)
        return self.o_proj(out.reshape(*x_BTE.shape[:2], -1), o_key), cache


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig):
        wide, narrow, name = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size), LAYER + "mlp."
        self.gate_proj = Linear(name + "gate_proj", wide, ("mlp", "embed"), c.mlp_bias)
        self.up_proj = Linear(name + "up_proj", wide, ("mlp", "embed"), c.mlp_bias)
        self.down_proj = Linear(name + "down_proj", narrow, ("embed", "mlp"), c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x_BTE: jax.Array, key: jax.Array | None) -> jax.Array:
        gate_key, up_key, down_key = ops.split_keys(key, 3)
        gate = _save(constrain(self.gate_proj(x_BTE, gate_key), "batch", None, "mlp"), "gate")
        up = _save(constrain(self.up_proj(x_BTE, up_key), "batch", None, "mlp"), "up")
        return self.down_proj(ops.ACTIVATIONS[self.activation](gate) * up, down_key)


class Block(nnx.Module):
    """Attend, then MLP."""

    def __init__(self, c: ModelConfig):
        self.attention_norm = RMSNorm(LAYER + "input_layernorm", c.hidden_size, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(LAYER + "post_attention_layernorm", c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x_BTE: jax.Array, context: Context, window, cache, key):
        attention_key, mlp_key = ops.split_keys(key, 2)
        attended, cache = self.attention(self.attention_norm(x_BTE), context, window, cache, attention_key)
        x_BTE = _save(constrain(x_BTE + attended, "batch", None, None), "after_attention")
        x_BTE = x_BTE + self.mlp(self.mlp_norm(x_BTE), mlp_key)
        return constrain(x_BTE, "batch", None, None), cache


class Embedding(nnx.Module):
    def __init__(self, key: str, c: ModelConfig):
        self.weight = nnx.Param(Weight((c.vocab_size, c.hidden_size), ("vocab", "embed"), f"{key}.weight"))


class Decoder(nnx.Module):
    """Embedding, stacks of blocks, final norm; the head's weight, where it is not the embedding."""

    def __init__(self, c: ModelConfig, stacks: tuple[range, ...]):
        self.embed = Embedding("model.embed_tokens", c)
        self.stacks = nnx.Dict({str(i): Block(c) for i in range(len(stacks))})
        self.norm = RMSNorm("model.norm", c.hidden_size, c.norm_eps)
        if not c.tied:
            self.head = Embedding("lm_head", c)


@dataclass(frozen=True)
class Model:
    """A decoder without its arrays: every method takes the parameter tree.

    stacks: runs of consecutive layers; each is one scan over arrays stacked on axis 0.
    """

    config: ModelConfig
    graph: Any  # static NNX graph definition of the whole decoder
    block: Any  # of one layer
    weights: Tree  # of Weight
    stacks: tuple[range, ...]

    @classmethod
    def create(cls, config: ModelConfig, stacks: tuple[range, ...] | None = None) -> "Model":
        stacks = stacks or (range(config.num_layers),)
        graph, state = nnx.split(Decoder(config, stacks))
        weights = nnx.to_pure_dict(state)
        for name, layers in zip(list(weights["stacks"]), stacks, strict=True):
            weights["stacks"][name] = map_tree(partial(Weight.stacked, layers=layers), weights["stacks"][name])
        return cls(config, graph, nnx.split(Block(config))[0], weights, stacks)

    def head(self, params: Tree) -> Any:
        """The leaf that turns hidden states into logits."""
        return self._whole("embed" if self.config.tied else "head", params)

    def hidden(
        self,
        params: Tree,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        dtype: Any = jnp.float32,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The hidden states after the final norm, [B, T, E] in `dtype`, and the cache with this pass in it.

        key: of dropout; None turns it off. segments: 0 is padding; a token sees its own segment only.
        """
        x = ops.embed(tokens_BT, self._whole("embed", params), dtype)
        x = constrain(x, "batch", None, None)
        context, cache = self._context(positions_BT, segments_BT, cache)
        caches = []
        for index in range(len(self.stacks)):
            stack_cache = None if cache is None else (cache.k[index], cache.v[index])
            x, stack_cache = self._stack(params["stacks"][str(index)], index, x, context, stack_cache, key)
            caches.append(stack_cache)
        x = ops.rms_norm(x, params["norm"]["weight"], self.config.norm_eps)
        if cache is not None:
            k, v = zip(*caches, strict=True)
            cache = Cache(k, v, cache.segments, cache.length)
        return x, cache

    def logits(self, params: Tree, hidden: jax.Array) -> jax.Array:
        """[..., E] -> [..., vocab] in float32."""
        return ops.linear(hidden, self.head(params)).astype(jnp.float32)

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        c = self.config
        shapes = [(len(layers), batch, length, c.num_kv_heads, c.head_dim) for layers in self.stacks]
        k, v = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
        return Cache(k, v, jnp.zeros((batch, length), jnp.int32))

    def _whole(self, name: str, params: Tree) -> Any:
        return gather(params[name]["weight"], self.weights[name]["weight"], self.config)

    def _context(self, positions, segments, cache) -> tuple[Context, Cache | None]:
        c = self.config
        cos, sin = cos_sin(c.rope, c.head_dim, c.max_positions, positions)
        if cache is None:
            return Context(cos, sin, segments), None
        start = jnp.int32(0) if cache.length is None else cache.length
        columns = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, start, axis=1)
        filled = Cache(cache.k, cache.v, columns, start + segments.shape[1])
        return Context(cos, sin, segments, columns, cache.length), filled

    def _stack(self, params, index, x, context, cache, key):
        """One scan over the layers of a stack."""
        layers, declared = self.stacks[index], self.weights["stacks"][str(index)]
        windows = [self.config.windows[i] if self.config.windows else None for i in layers]
        window = None if all(w is None for w in windows) else jnp.array([w or 2**30 for w in windows], jnp.int32)
        keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(jnp.array(list(layers)))

        @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
        def layer(x, inputs):
            params, window, cache, key = inputs
            params = map_tree(partial(gather, config=self.config), params, declared)
            block = nnx.merge(self.block, nnx.State(params))
            return block(x, context, window, cache, key)

        return jax.lax.scan(layer, x, (params, window, cache, keys))
