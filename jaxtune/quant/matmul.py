"""x W^T where W lies in few bits: it is dequantised for the product, again for the backward pass, and kept by neither."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dequantised_matmul(x: jax.Array, parts: Any, dequantise: Callable[[Any, Any], jax.Array]) -> jax.Array:
    """x W^T in x's type: [..., in] -> [..., out]. W is frozen: no gradient of it is computed.

    parts: a tree of arrays, the quantised weight. dequantise: (parts, dtype) -> W [out, in]; hashable, equal where it
    does the same, since jax compiles anew for another.
    """
    return _times(x, dequantise(parts, x.dtype), 1)


def _fwd(x: jax.Array, parts: Any, dequantise: Callable) -> tuple[jax.Array, Any]:
    return dequantised_matmul(x, parts, dequantise), parts


def _bwd(dequantise: Callable, parts: Any, d: jax.Array) -> tuple[jax.Array, None]:
    return _times(d, dequantise(parts, d.dtype), 0), None


dequantised_matmul.defvjp(_fwd, _bwd)


def _times(x: jax.Array, w: jax.Array, dim: int) -> jax.Array:
    """The last dimension of x against `dim` of w."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (dim,)), ((), ())))
