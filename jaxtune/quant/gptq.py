"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): a weight rounded input by input, each time moving what is not yet
rounded so that the outputs on the calibration data change least. `round_to_nearest` is the same grid without that.

Legend: O outputs, I inputs, G groups of a linear map; B inputs of a block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.quant.grouped import Fit, code, fit, value

BLOCK = 128  # inputs between two updates of all that is left; a group, where there are groups, is a block
HIGHEST = jax.lax.Precision.HIGHEST


class Rounded(NamedTuple):
    """A weight on its grid, inputs in their own order."""

    codes: jax.Array  # uint8 [O, I]
    scales: jax.Array  # [O, G]
    zeros: jax.Array  # uint8 [O, G]
    groups: jax.Array  # int32 [I]


@partial(jax.jit, static_argnames=("bits", "group", "symmetric", "dtype"))
def round_to_nearest(
    w_OI: jax.Array, *, bits: int, group: int, symmetric: bool = True, dtype: Any = jnp.float16
) -> Rounded:
    """The nearest point of each group's grid. dtype: of the scales."""
    outputs, inputs = w_OI.shape
    count = -(-inputs // group)
    padded = jnp.pad(w_OI.astype(jnp.float32), ((0, 0), (0, count * group - inputs)))
    rows = padded.reshape(outputs * count, group)  # a row for each group of each output
    grid = fit(rows, bits, symmetric, dtype)
    codes = code(rows, grid, bits).reshape(outputs, -1)[:, :inputs]
    scales, zeros = (x.reshape(outputs, count) for x in grid)
    return Rounded(
        codes.astype(jnp.uint8), scales, zeros.astype(jnp.uint8), jnp.arange(inputs, dtype=jnp.int32) // group
    )


@partial(jax.jit, static_argnames=("bits", "group", "symmetric", "act_order", "dtype"))
def gptq(
    w_OI: jax.Array,
    hessian_II: jax.Array,
    damp: float,
    *,
    bits: int,
    group: int,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: Any = jnp.float16,
) -> Rounded:
    """The weight [O, I] on its grid. NaN scales: the Hessian is not positive definite at this `damp`.

    hessian: a positive multiple of the sum over tokens of x x^T, float32. damp: what is added to its diagonal, as a
    share of the diagonal's mean. group: inputs that share a grid; I for all of them. act_order: the inputs in the
    order of the Hessian's diagonal, largest first, and grouped in that order. dtype: of the scales.
    """
    outputs, inputs = w_OI.shape
    diagonal = jnp.diagonal(hessian_II)
    is_dead = diagonal == 0  # an input that is always 0: its weights do nothing
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(inputs)
    w_IO = jnp.where(is_dead[:, None], 0, w_OI.astype(jnp.float32).T)[order]
    h_II = (hessian_II + jnp.diag(is_dead.astype(jnp.float32)))[order][:, order]
    factor_II = _inverse_factor(h_II + damp * jnp.mean(jnp.diagonal(h_II)) * jnp.eye(inputs))

    size = group if group < inputs else BLOCK
    pad = -inputs % size
    w_IO, factor_II = jnp.pad(w_IO, ((0, pad), (0, 0))), jnp.pad(factor_II, ((0, pad), (0, pad)))
    factor_II = factor_II + jnp.diag(jnp.arange(inputs + pad) >= inputs)
    whole = fit(w_IO.T, bits, symmetric, dtype) if group >= inputs else None
    codes, scales, zeros = _blocks(w_IO, factor_II, size, bits, symmetric, dtype, whole)

    codes = jnp.zeros((inputs, outputs), jnp.uint8).at[order].set(codes[:inputs])
    groups = jnp.zeros(inputs, jnp.int32).at[order].set(jnp.arange(inputs, dtype=jnp.int32) // group)
    return Rounded(codes.T, scales.T, zeros.T, groups)


def _inverse_factor(h_II: jax.Array) -> jax.Array:
    """The upper triangular U with U^T U = H^-1, from one Cholesky factor: of H turned round, H = R R^T with an upper
    triangular R, and U is its inverse."""
    r_II = jnp.linalg.cholesky(h_II[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r_II, jnp.eye(h_II.shape[0]), lower=False)


def _blocks(w_IO, factor_II, size: int, bits: int, symmetric: bool, dtype: Any, whole: Fit | None):
    """Codes uint8 [I, O], scales and zeros [G, O]: block after block, each fitted when it is reached."""
    inputs, outputs = w_IO.shape
    count = inputs // size

    def block(index, state):
        w_IO, codes, scales, zeros = state
        start = index * size
        w_BO = jax.lax.dynamic_slice_in_dim(w_IO, start, size)
        rows_BI = jax.lax.dynamic_slice_in_dim(factor_II, start, size)
        corner_BB = jax.lax.dynamic_slice_in_dim(rows_BI, start, size, axis=1)
        grid = fit(w_BO.T, bits, symmetric, dtype) if whole is None else whole
        block_codes, errors_BO = _columns(w_BO, corner_BB, grid, bits)
        w_IO = w_IO - jnp.matmul(rows_BI.T, errors_BO, precision=HIGHEST)  # rows before the block: zeros in the factor
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        codes = put(codes, block_codes.astype(jnp.uint8), start_index=start)
        if whole is None:
            scales, zeros = (
                put(old, new[None].astype(old.dtype), start_index=index) for old, new in zip((scales, zeros), grid)
            )
        return w_IO, codes, scales, zeros

    groups = count if whole is None else 1
    start = Fit(jnp.zeros((groups, outputs), dtype), jnp.zeros((groups, outputs), jnp.uint8))
    if whole is not None:
        start = Fit(whole.scale[None], whole.zero[None].astype(jnp.uint8))
    _, codes, scales, zeros = jax.lax.fori_loop(
        0, count, block, (w_IO, jnp.zeros((inputs, outputs), jnp.uint8), *start)
    )
    failed = jnp.isnan(factor_II).any()
    return codes, jnp.where(failed, jnp.nan, scales), zeros


def _columns(w_BO, corner_BB, grid: Fit, bits: int):
    """Codes [B, O] of a block, and each input's error over its factor's diagonal, which the later inputs make good."""

    def column(index, state):
        w_BO, codes, errors = state
        row_B = corner_BB[index]
        chosen = code(w_BO[index], grid, bits)
        error = (w_BO[index] - value(chosen, grid)) / row_B[index]
        return w_BO - row_B[:, None] * error, codes.at[index].set(chosen), errors.at[index].set(error)

    empty = jnp.zeros_like(w_BO)
    return jax.lax.fori_loop(0, w_BO.shape[0], column, (w_BO, empty, empty))[1:]
