"""Weights in 8 bits with a scale for each row: LLM.int8's storage (Dettmers et al. 2022, arXiv 2208.07339).

Codes and scales equal those of bitsandbytes (Int8Params, int8_vectorwise_quant) in every bit. Not its matmul: here
activations stay as they are, and no outlier needs care.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.leaves import Axes
from jaxtune.quant.leaf import Quantized

_INVERSE = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Quantized):
    """codes: int8 [out, in]; scales: float32 [out], the rows' largest sizes. Axis 0 of each part is the layer."""

    EXACT: ClassVar[frozenset[str]] = frozenset({"codes", "scales"})

    codes: Any
    scales: Any

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        return {"codes": axes, "scales": axes[:-1]}

    def weight(self, dtype: Any) -> jax.Array:
        return (self.codes.astype(jnp.float32) * self.scales[:, None] * _INVERSE).astype(dtype)


def quantize(w: jax.Array) -> Int8:
    """A weight [out, in], rounded to float16 first, as bitsandbytes does; past float16's largest number that one."""
    largest = float(jnp.finfo(jnp.float16).max)
    rows = jnp.clip(w.astype(jnp.float32), -largest, largest).astype(jnp.float16).astype(jnp.float32)
    absmax = jnp.max(jnp.abs(rows), axis=1)
    steps = jax.lax.optimization_barrier(127.0 / jnp.where(absmax > 0, absmax, 1.0))
    return Int8(jnp.round(rows * steps[:, None]).astype(jnp.int8), absmax)
