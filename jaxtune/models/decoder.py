"""The decoder: Qwen2, Qwen3, Llama and Mistral are settings of it.

The modules are Flax NNX; where an array will stand they declare a `Weight`. A `Model` splits the modules
once into a static graph and the tree of declarations; all hot code then works on plain trees.

Legend: B batch, T time, E hidden size, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as _save

from jaxtune import float8, ops
from jaxtune.leaves import Axes, Leaf, dim_of, map_parts
from jaxtune.models.attention import attention
from jaxtune.models.config import ModelConfig
from jaxtune.models.execution import USUAL, WEIGHT, Execution
from jaxtune.models.hooks import NO_HOOKS, Hooks
from jaxtune.models.kernels import attend
from jaxtune.models.rope import cos_sin, rotate
from jaxtune.models.weights import HOOKS, Tree, Weight, map_tree
from jaxtune.ops import Noise
from jaxtune.parallel import local
from jaxtune.parallel.context import spread_attention

LAYER = "model.layers.{layer}."
NO_WINDOW = 2**30


class Linear(nnx.Module):
    """y = x W^T + b. Split over the tensor axis by its outputs, or by its inputs: Megatron's column and row
    (Shoeybi et al. 2019, arXiv 1909.08053, section 3)."""

    def __init__(self, key: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool = False):
        self.weight = nnx.Param(Weight(shape, axes, f"{key}.weight"))
        self.bias = nnx.Param(Weight(shape[:1], axes[:1], f"{key}.bias", "zeros")) if bias else None
        self.splits_inputs = axes[0] == "embed"

    def __call__(self, x: jax.Array, noise: Noise | None, execution: Execution) -> jax.Array:
        y = ops.linear(x, self.weight.get_value(), noise, "tensor" if self.splits_inputs else None)
        if self.splits_inputs:
            y = leave(y, execution)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


def enter(x_BTE: jax.Array, execution: Execution) -> jax.Array:
    """The residual stream as a map that is split over the tensor axis takes it: whole sequences."""
    return local.gathered(x_BTE, "tensor", 1) if execution.sequence_parallel else x_BTE


def leave(x_BTE: jax.Array, execution: Execution) -> jax.Array:
    """From each device's part of a sum to the residual stream."""
    return local.scattered(x_BTE, "tensor", 1) if execution.sequence_parallel else local.total(x_BTE, "tensor")


def noise_here(noise: Noise | None, execution: Execution) -> Noise | None:
    """The noise of the tokens that this device has in the residual stream."""
    if noise is None or not execution.sequence_parallel:
        return noise
    return replace(noise, tokens=local.part(noise.tokens, "tensor", 1))


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
    slots: jax.Array | None = None  # [B, T]: a virtual token's number, below 0 for others
    shared: Tree = field(default_factory=dict)  # weights of the hooks that there are once
    execution: Execution = field(default=USUAL, metadata={"static": True})
    hooks: Hooks = field(default=NO_HOOKS, metadata={"static": True})


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
        self.config = c

    def __call__(self, x_BTE: jax.Array, context: Context, window, cache, noise, own: Tree):
        run = context.execution
        q_noise, k_noise, v_noise, o_noise = ops.split_noise(noise, 4)
        q, k, v = (
            project(x_BTE, own, run)
            for project, own in ((self.q_proj, q_noise), (self.k_proj, k_noise), (self.v_proj, v_noise))
        )
        q, k, v = (y.reshape(*y.shape[:2], -1, self.config.head_dim) for y in (q, k, v))
        k, v = own_kv_heads(k, self.config), own_kv_heads(v, self.config)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if context.slots is not None:
            k, v = context.hooks.keys_values(own, context.shared, context.slots, k, v)
        q, k, v = (_save(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))
        if cache is not None:
            write = partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=0 if context.start is None else context.start, axis=1
            )
            cache = write(cache[0], k), write(cache[1], v)
        if local.size("context") > 1:
            # Both name themselves what is to be kept of them.
            out = spread_attention(run.context_attention, q, k, v, context.segments, window, run.attention)
        elif context.start is None:
            out = attend(run.attention, q, k, v, context.segments, window, run.one_document)
        else:
            k, v = cache
            out = attention(q, k, v, context.segments, context.cache_segments, context.start, window)
        return self.o_proj(out.reshape(*out.shape[:2], -1), o_noise, run), cache


def own_kv_heads(x_BTKD: jax.Array, config: ModelConfig) -> jax.Array:
    """Of all KV heads, those that this device's query heads use; where the heads are split already, x."""
    tensor = local.size("tensor")
    if config.num_kv_heads % tensor == 0:
        return x_BTKD
    heads, group = config.num_heads // tensor, config.num_heads // config.num_kv_heads
    first = local.index("tensor") * heads
    if group % heads == 0:  # all query heads here share one
        return jax.lax.dynamic_slice_in_dim(x_BTKD, first // group, 1, axis=2)
    return jnp.take(x_BTKD, (first + jnp.arange(heads)) // group, axis=2)


def num_own_kv_heads(config: ModelConfig) -> int:
    """How many heads `own_kv_heads` gives."""
    tensor = local.size("tensor")
    if config.num_kv_heads % tensor == 0:
        return config.num_kv_heads // tensor
    heads, group = config.num_heads // tensor, config.num_heads // config.num_kv_heads
    return 1 if group % heads == 0 else heads


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig):
        wide, narrow, name = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size), LAYER + "mlp."
        self.gate_proj = Linear(name + "gate_proj", wide, ("mlp", "embed"), c.mlp_bias)
        self.up_proj = Linear(name + "up_proj", wide, ("mlp", "embed"), c.mlp_bias)
        self.down_proj = Linear(name + "down_proj", narrow, ("embed", "mlp"), c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x_BTE: jax.Array, noise: Noise | None, execution: Execution) -> jax.Array:
        gate_noise, up_noise, down_noise = ops.split_noise(noise, 3)
        gate = _save(self.gate_proj(x_BTE, gate_noise, execution), "gate")
        up = _save(self.up_proj(x_BTE, up_noise, execution), "up")
        return self.down_proj(ops.ACTIVATIONS[self.activation](gate) * up, down_noise, execution)


class Block(nnx.Module):
    """Attend, then MLP."""

    def __init__(self, c: ModelConfig):
        self.attention_norm = RMSNorm(LAYER + "input_layernorm", c.hidden_size, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(LAYER + "post_attention_layernorm", c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x_BTE: jax.Array, context: Context, window, cache, noise, own: Tree):
        """own: this layer's weights of the hooks."""
        run, hooks = context.execution, context.hooks
        attention_noise, mlp_noise, *others = ops.split_noise(noise, 4)
        after_attention, after_mlp = (noise_here(own_noise, run) for own_noise in others)
        normed = self.attention_norm(x_BTE)
        attended, cache = self.attention(enter(normed, run), context, window, cache, attention_noise, own)
        x_BTE = _save(x_BTE + hooks.attention_output(own, x_BTE, normed, attended, after_attention), "after_attention")
        normed = self.mlp_norm(x_BTE)
        down = _save(self.mlp(enter(normed, run), mlp_noise, run), "down")
        return x_BTE + hooks.mlp_output(own, x_BTE, normed, down, after_mlp), cache


def _under_hooks(declared: Tree) -> Tree:
    return {HOOKS: declared} if declared else {}


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

    On a mesh, all but `create` run inside parallel.local's region, on each device's own parts of the arrays.
    stacks: the numbers of the layers along axis 0 of each stack of arrays, in order; each is one scan.
    """

    config: ModelConfig
    graph: Any  # static NNX graph definition of the whole decoder
    block: Any  # of one layer
    weights: Tree  # of Weight
    stacks: tuple[range, ...]
    execution: Execution = USUAL
    hooks: Hooks = NO_HOOKS

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        stacks: tuple[range, ...] | None = None,
        execution: Execution = USUAL,
        hooks: Hooks = NO_HOOKS,
    ) -> "Model":
        stacks = stacks or (range(config.num_layers),)
        graph, state = nnx.split(Decoder(config, stacks))
        weights = nnx.to_pure_dict(state)
        for number, layers in enumerate(stacks):
            name = str(number)  # a tree's keys are in the order of text, "10" in front of "2"
            declared = {**weights["stacks"][name], **_under_hooks(hooks.layer(config))}
            weights["stacks"][name] = map_tree(partial(Weight.stacked, layers=layers), declared)
        weights |= _under_hooks(hooks.shared(config))
        return cls(config, graph, nnx.split(Block(config))[0], weights, stacks, execution, hooks)

    def head(self, params: Tree, dtype: Any) -> Any:
        """The leaf that turns hidden states into logits, as it is used: [vocab, E], over the tensor axis split."""
        name = "embed" if self.config.tied else "head"
        return self._used(params[name]["weight"], self.weights[name]["weight"], dtype, self._shared(params))

    def hidden(
        self,
        params: Tree,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        dtype: Any = jnp.float32,
        noise: Noise | None = None,
        cache: Cache | None = None,
        length: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The hidden states after the final norm, [B, T, E] in `dtype`, and the cache with this pass in it.

        noise: of dropout; None turns it off. segments: who sees whom (segments.py). length: as in rope.cos_sin.
        """
        x = self.embed(params, tokens_BT, dtype, noise, cache)
        context, cache = self.context(params, tokens_BT, positions_BT, segments_BT, cache, length)
        caches = []
        for index, layers in enumerate(self.stacks):
            stack_cache = None if cache is None else (cache.k[index], cache.v[index])
            stack = params["stacks"][str(index)]
            x, stack_cache = self.layers(stack, np.array(layers), x, context, noise, stack_cache)
            caches.append(stack_cache)
        if cache is not None:
            k, v = zip(*caches, strict=True)
            cache = Cache(k, v, cache.segments, cache.length)
        return self.final(params, x), cache

    @property
    def virtual_ids(self) -> range:
        """The ids that stand in front of every document."""
        return range(self.config.vocab_size, self.config.vocab_size + self.hooks.virtual_tokens)

    def _slots(self, tokens_BT: jax.Array, cache: Cache | None) -> jax.Array | None:
        """Each token's number among the virtual ones, below 0 for others; None where there can be none: they stand
        at the start, so none comes after what a cache has."""
        if not self.hooks.virtual_tokens or (cache is not None and cache.length is not None):
            return None
        return tokens_BT - self.config.vocab_size

    def embed(
        self,
        params: Tree,
        tokens_BT: jax.Array,
        dtype: Any,
        noise: Noise | None = None,
        cache: Cache | None = None,
    ) -> jax.Array:
        """What the first layer takes."""
        table = self._used(params["embed"]["weight"], self.weights["embed"]["weight"], None)
        first = local.index("tensor") * (self.config.vocab_size // local.size("tensor"))
        x = ops.embed(tokens_BT - first, table, dtype)
        slots = self._slots(tokens_BT, cache)
        if slots is not None:
            own = None if noise is None else noise.fold_in(self.config.num_layers)  # the numbers below are the layers'
            added = self.hooks.embedded(self._shared(params), slots, dtype, own)
            # The sum over the tensor axis follows, so one device adds them.
            x = x if added is None else x + jnp.where(local.index("tensor") == 0, added, jnp.zeros_like(added))
        return leave(x, self.execution)

    def context(
        self,
        params: Tree,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: Cache | None = None,
        length: jax.Array | None = None,
    ) -> tuple[Context, Cache | None]:
        """What every layer sees, and the cache with this pass's columns marked as filled."""
        c = self.config
        cos, sin = cos_sin(c.rope, c.head_dim, c.max_positions, positions_BT, length)
        shown = Context(
            cos,
            sin,
            segments_BT,
            slots=self._slots(tokens_BT, cache),
            shared=self._shared(params),
            execution=self.execution,
            hooks=self.hooks,
        )
        if cache is None:
            return shown, None
        start = jnp.int32(0) if cache.length is None else cache.length
        columns = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments_BT, start, axis=1)
        filled = Cache(cache.k, cache.v, columns, start + segments_BT.shape[1])
        return replace(shown, cache_segments=columns, start=cache.length), filled

    def layers(
        self,
        params: Tree,
        numbers: np.ndarray | jax.Array,
        x_BTE: jax.Array,
        context: Context,
        noise: Noise | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        has_gaps: bool = False,
    ) -> tuple[jax.Array, Any]:
        """A stack of layers, one after another: what comes out of the last, and the stack's cache.

        numbers: the layers' own, along axis 0 of `params`. has_gaps: some are -1, places without a layer, which change
        nothing.
        """
        windows, weights = self._windows(numbers), self.weights["stacks"]["0"]

        def layer(x, inputs):
            params, number, window, cache = inputs
            used = partial(self._used, dtype=x.dtype, shared=context.shared)
            params = map_tree(used, params, weights)
            own, hooked = None if noise is None else noise.fold_in(number), params.pop(HOOKS, {})
            if self.execution.float8:
                params = float8.narrow(params, weights)
            return nnx.merge(self.block, nnx.State(params))(x, context, window, cache, own, hooked)

        def place(x, inputs):
            return local.when(inputs[1] >= 0, layer, lambda x, inputs: (x, inputs[3]), x, inputs)

        inputs = params, jnp.asarray(numbers, jnp.int32), windows, cache
        return self._scan(place if has_gaps else layer, x_BTE, inputs, trains=cache is None)

    def final(self, params: Tree, x_BTE: jax.Array) -> jax.Array:
        """What the head takes: whole sequences, after the final norm."""
        weight = self._used(params["norm"]["weight"], self.weights["norm"]["weight"], None)
        return enter(ops.rms_norm(x_BTE, weight, self.config.norm_eps), self.execution)

    def logits(self, params: Tree, hidden: jax.Array) -> jax.Array:
        """[..., E] -> [..., vocab] in float32, the whole vocabulary on every device."""
        own = ops.linear(hidden, self.head(params, hidden.dtype)).astype(jnp.float32)
        return local.gathered(own, "tensor", own.ndim - 1)

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """Of `batch` rows of this device."""
        c = self.config
        shapes = [(len(layers), batch, length, num_own_kv_heads(c), c.head_dim) for layers in self.stacks]
        k, v = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
        return Cache(k, v, jnp.zeros((batch, length), jnp.int32))

    def _scan(self, layer, x, inputs, trains: bool):
        """`layer` over axis 0 of `inputs`, keeping for the backward pass what the execution says."""
        if not trains:
            return jax.lax.scan(layer, x, inputs)
        run = self.execution
        scan = partial(jax.lax.scan, unroll=run.unroll)
        layer = jax.checkpoint(layer, policy=run.policy())
        count = len(jax.tree.leaves(inputs)[0])
        groups = run.groups(count)
        if groups == count:
            return scan(layer, x, inputs)
        nothing = jax.checkpoint_policies.nothing_saveable
        group = jax.checkpoint(lambda x, inputs: scan(layer, x, inputs), policy=nothing)
        split = jax.tree.map(lambda array: array.reshape(groups, count // groups, *array.shape[1:]), inputs)
        return scan(group, x, split)

    def _shared(self, params: Tree) -> Tree:
        """The hooks' weights that there are once, as they are used."""
        own = params.get(HOOKS, {})
        return map_tree(partial(self._used, dtype=None), own, self.weights[HOOKS]) if own else {}

    def _windows(self, numbers: Sequence | np.ndarray | jax.Array) -> jax.Array | None:
        table = self.config.windows
        seen = [table[i] for i in numbers] if table and isinstance(numbers, np.ndarray) else table
        if not any(seen or ()):
            return None
        return jnp.array([window or NO_WINDOW for window in self.config.windows], jnp.int32)[numbers]

    def _used(self, leaf: Any, weight: Weight, dtype: Any, shared: Tree | None = None) -> Any:
        """A weight as it is used, of one layer where it is of a stack: on the device, whole along fsdp, its matrices
        in `dtype`. It is made anew for the backward pass, never kept. shared: what `_shared` gives."""
        run = self.execution

        def use(x: jax.Array, axes: Axes, exact: bool) -> jax.Array:
            if run.offload_params:
                x = local.near(x)
            wanted = x.dtype if dtype is None or exact or x.ndim < 2 else dtype
            dim = dim_of(axes, "embed")
            if run.weights_split and dim is not None and local.size("fsdp") > 1:
                if exact:
                    x = local.gathered(x, "fsdp", dim)
                else:
                    x = local.weight_gathered(x, "fsdp", dim, wanted, run.sum_dtype or x.dtype)
            return _save(x.astype(wanted), WEIGHT)

        used = map_parts(use, leaf, weight.axes, weight.is_table)
        return used.with_shared(shared) if shared and isinstance(used, Leaf) else used
