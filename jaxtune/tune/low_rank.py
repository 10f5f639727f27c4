"""The leaf of the LoRA family: a weight and a product of two narrow matrices beside it. How it starts is lora.py's."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxtune import cpu_bfloat16, ops
from jaxtune.leaves import Axes, Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Leaf):
    """W + scale * (a b)^T, never formed. Axis 0 of each part is the layer where W is a stack.

    base: [out, in] (of an embedding: [vocab, features], which `in` and `out` then name in this order)
    a: [in, rank]; b: [rank, out]; scale: scalar. Layers of a stack that have a smaller rank, or none,
    hold zeros in the columns of `a` and rows of `b` that they lack: both gradients are zero there.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"a", "b"})

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    dropout: float = field(default=0.0, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        *layers, first, second = axes
        in_axis, out_axis = (first, second) if is_table else (second, first)
        return {"a": (*layers, in_axis, "rank"), "b": (*layers, "rank", out_axis), "scale": tuple(layers)}

    def inputs(self, x: Any, noise: Any, split: str | None) -> tuple[Any, ...]:
        drops = noise is not None and self.dropout > 0
        return (x, ops.dropout(x, self.dropout, noise, split)) if drops else (x,)

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        return ops.linear(inputs[0], self.base, split=split) + low_rank(inputs[-1], self)

    def rows(self, ids: Any, dtype: Any) -> Any:
        low = ops.embed(ids, self.a, dtype) @ self.b.astype(dtype)
        return ops.embed(ids, self.base, dtype) + low * self.scale.astype(dtype)

    def dense(self, is_table: bool) -> Any:
        return ops.dense(self.base, is_table) + self.scale[..., None, None] * delta(self.a, self.b, is_table)


def delta(a: jax.Array, b: jax.Array, is_table: bool) -> jax.Array:
    """a b in float32 as it adds to a weight: [..., out, in], of a table [..., vocab, features]."""
    form = "...ir,...ro->...io" if is_table else "...ir,...ro->...oi"
    return jnp.einsum(form, a, b, precision=jax.lax.Precision.HIGHEST)


def low_rank(x: jax.Array, leaf: Any) -> jax.Array:
    """What a low-rank leaf adds to its base: scale * x a b."""
    a, b = leaf.a.astype(x.dtype), leaf.b.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    return (two_products(rows, a, b) * leaf.scale.astype(x.dtype)).reshape(*x.shape[:-1], b.shape[-1])


@jax.custom_vjp
def two_products(x_TI: jax.Array, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """x a b. Its own backward pass turns the narrow factor of each product round, where XLA for CPU would copy the
    wide one into another order: on a small model those copies took as long as a matmul of the whole layer."""
    return _times(_times(x_TI, a_IR), b_RO)


def _two_products_fwd(x_TI, a_IR, b_RO):
    low_TR = _times(x_TI, a_IR)
    return _times(low_TR, b_RO), (x_TI, low_TR, a_IR, b_RO)


def _two_products_bwd(residuals, d_TO):
    x_TI, low_TR, a_IR, b_RO = residuals
    d_TR = _times(d_TO, b_RO.T)
    low_RT, d_RT = jax.lax.optimization_barrier((low_TR.T, d_TR.T))
    return _times(d_TR, a_IR.T), _times(d_RT, x_TI).T, _times(low_RT, d_TO)


two_products.defvjp(_two_products_fwd, _two_products_bwd)
_times = partial(cpu_bfloat16.contract, dims=(1, 0))
