"""Rotary position embedding: the frequencies of each kind that Hugging Face configs name, and the rotation.

The formulas are those of transformers 5.23, `modeling_rope_utils.py`. D head_dim, T time, H heads.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.config import Rope
from jaxtune.parallel import local

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def frequencies(rope: Rope, head_dim: int, max_positions: int, length: Any = None) -> tuple[Any, float]:
    """(inverse frequencies [D/2] in float32, factor on cos and sin).

    length: positions in the sequence, an int or a traced scalar; only `dynamic` looks at it, None is
    max_positions. Where nothing is traced, the result is a numpy constant.
    """
    if rope.type == "dynamic":
        return _dynamic(rope, head_dim, max_positions, max_positions if length is None else length), 1.0
    plain = 1 / _powers(rope.theta, head_dim)
    if rope.type == "default":
        return plain, 1.0
    if rope.type == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.type == "llama3":
        return _llama3(rope, plain), 1.0
    assert rope.type == "yarn", rope.type
    return _yarn(rope, plain, head_dim), attention_factor(rope)


def reach(rope: Rope, positions: jax.Array) -> jax.Array | None:
    """The sequence length that `dynamic` scales by: the largest position plus one, over all rows and devices, as in
    transformers; padding does not count. None: another kind, which asks for none."""
    if rope.type != "dynamic":
        return None
    return local.largest(jnp.max(positions), *local.ROWS, "context") + 1


def cos_sin(
    rope: Rope, head_dim: int, max_positions: int, positions: jax.Array, length: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [..., T, D/2] in float32, of integer positions [..., T].

    length: the `reach` of all that is to be scaled alike; None: of these positions alone, where transformers keeps a
    longer length that it has seen before.
    """
    length = reach(rope, positions) if length is None else length
    inverse, scale = frequencies(rope, head_dim, max_positions, length)
    inverse = inverse.reshape((1,) * positions.ndim + (-1,))
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., T, H, D] turned by its positions' angles; dimension i pairs with i + D/2.

    cos, sin: [..., T, D/2] in float32. The result has x's dtype; the products are float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention_factor(rope: Rope) -> float:
    """YaRN's factor on cos and sin (arXiv 2309.00071, section 3.4), unless the config gives one."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _powers(theta: Any, head_dim: int) -> Any:
    """theta^(2i/D) for i < D/2, in float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if isinstance(theta, jax.Array):
        return theta.astype(jnp.float32) ** exponents
    # The power in float64 and the rounding after it come within one unit in the last place of torch's.
    return (float(theta) ** exponents.astype(np.float64)).astype(np.float32)


def _dynamic(rope: Rope, head_dim: int, max_positions: int, length: Any) -> Any:
    if isinstance(length, jax.Array):
        length = jnp.maximum(length, max_positions).astype(jnp.float32)
    else:
        length = max(length, max_positions)
    stretch = rope.factor * length / max_positions - (rope.factor - 1)
    return 1 / _powers(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original = rope.original_max_positions
    assert original is not None
    wavelength = np.float32(2 * math.pi) / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    result = np.where(wavelength > original / low, plain / rope.factor, blended)
    return np.where(wavelength < original / high, plain, result).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Dimensions that turn often within the original length are kept, those that turn seldom stretched."""
    low, high = (_turning_dim(rope, head_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _turning_dim(rope: Rope, head_dim: int, turns: float) -> float:
    """The dimension that makes this many turns in the original length."""
    assert rope.original_max_positions is not None
    ratio = rope.original_max_positions / (turns * 2 * math.pi)
    return head_dim * math.log(ratio) / (2 * math.log(rope.theta))
