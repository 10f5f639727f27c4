"""Whether a fused kernel computes, on the device at hand, what plain XLA does: tried on a few packed rows.

It is tried before every run that would take one, and by `jaxtune doctor`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.attention import attention
from jaxtune.models.kernels import NAMES, attend
from jaxtune.segments import SHARED

TIME = 300  # tokens of a row: no kernel's tiles divide it
ENDS = ((70, 181, 283, TIME), (128, 256, TIME, TIME))  # of three documents, and of the padding behind them
KV_HEADS = 2  # at most; query heads as many to each as the model has
# Of the largest number. A wrong mask is off by about 1; kernels keep probabilities in 8 or 11 bits, as plain XLA does,
# and a TPU multiplies float32 in bfloat16 unless it is told not to.
TOLERANCES = {"bfloat16": 0.03, "float16": 0.01, "float32": 0.03}
RESULTS = ("the output", "the gradient of queries", "the gradient of keys", "the gradient of values")
Arrays = list[np.ndarray]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Disagreement(Exception):
    """A kernel gives other numbers than plain XLA, or packed rows other than single ones."""


def trial(
    kernel: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    share_prefix: bool = False,
    one_document: bool = False,
) -> float:
    """The largest difference, as a share of the largest number, forward and backward and between packed and unpacked.

    share_prefix: on rows whose first document all others see, too. one_document: single rows as `attend` takes them
    where no row has two documents.

    Raises:
        Disagreement: something differs by more than rounding. Whatever else the kernel raises goes through.
    """
    group, function = num_heads // num_kv_heads, partial(attend, kernel)
    single = partial(function, one_document=True) if one_document else None
    return compare(function, NAMES[kernel], group, num_kv_heads, head_dim, dtype, share_prefix, single)


def compare(
    kernel: Attend,
    name: str,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    share_prefix: bool = False,
    single: Attend | None = None,
) -> float:
    """`trial` of any function (q, k, v, segments) -> output. group: query heads to each key head. single: the function
    for rows of one document, where it is another; where there is padding it may give any number."""
    kv_heads, dtype = min(num_kv_heads, KV_HEADS), jnp.dtype(dtype)
    draw = np.random.default_rng(0)
    shapes = [(len(ENDS), TIME, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)]
    # What the kernel is given, and what plain XLA is given, are the same numbers.
    given = [np.asarray(jnp.asarray(draw.standard_normal(shape), dtype), np.float32) for shape in shapes]
    segments = np.stack([_segments(ends) for ends in ENDS])
    plain = lambda q, k, v, segments: attention(q, k, v, segments, segments)  # noqa: E731
    largest, found = 0.0, []
    shared = {f"{name}, a shared start": np.where(segments == 1, SHARED, segments)} if share_prefix else {}
    for case, ids in {**shared, name: segments}.items():  # the plain rows last: what was found is unpacked below
        found, wanted = with_gradients(kernel, given, ids, dtype), with_gradients(plain, given, ids, jnp.float32)
        for what, ours, theirs in zip(RESULTS, found, wanted, strict=True):
            largest = max(largest, _difference(f"{case}: {what}", ours, theirs, dtype))
    alone, ones = _unpacked(given), _unpacked([segments])[0]
    real = (ones > 0)[..., None, None]
    in_own_rows = with_gradients(single or kernel, alone, ones, dtype)
    for what, packed, own in zip(RESULTS, _unpacked(found), in_own_rows, strict=True):
        if single is not None:
            own = np.where(real | np.isnan(own), own, 0)
        largest = max(largest, _difference(f"{name}, packed and in rows of their own: {what}", packed, own, dtype))
    return largest


def with_gradients(kernel: Attend, given: Arrays, segments: np.ndarray, dtype: Any) -> Arrays:
    """[output, dq, dk, dv] in float32, computed in `dtype`. given: q, k, v, and the gradient of the output."""

    @jax.jit
    def both(segments, *given):
        q, k, v, dout = (x.astype(dtype) for x in given)
        out, backward = jax.vjp(lambda q, k, v: kernel(q, k, v, segments), q, k, v)
        return [x.astype(jnp.float32) for x in (out, *backward(dout))]

    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        return [np.asarray(x) for x in both(segments, *given)]


def _segments(ends: tuple[int, ...]) -> np.ndarray:
    steps, (first, second, third, _) = np.arange(TIME), ends
    return np.where(steps < third, 1 + (steps >= first) + (steps >= second), 0).astype(np.int32)


def _unpacked(packed: Arrays) -> Arrays:
    """Each document of the first row at the start of a row of its own, zeros behind it: [3, TIME, ...]."""
    starts = (0, *ENDS[0])

    def rows(x: np.ndarray) -> np.ndarray:
        apart = np.zeros((3, *x.shape[1:]), x.dtype)
        for row, (start, end) in enumerate(zip(starts, ENDS[0][:3], strict=False)):
            apart[row, : end - start] = x[0, start:end]
        return apart

    return [rows(x) for x in packed]


def _difference(what: str, found: np.ndarray, wanted: np.ndarray, dtype: Any) -> float:
    """As a share of the largest number.

    Raises:
        Disagreement: it is more than rounding.
    """
    allowed = TOLERANCES[jnp.dtype(dtype).name]
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not difference <= allowed:  # nan is not
        raise Disagreement(f"{what} differs by {difference:.1e} of the largest number; {allowed} is allowed")
    return difference
