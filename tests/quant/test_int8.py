"""Int8 by row. The peer is bitsandbytes: Int8Params, and the definition's kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.quant.scheme import AtLoad


def test_codes_and_scales_are_those_of_bitsandbytes_in_every_bit():
    import torch
    from bitsandbytes.nn import Int8Params

    w = np.random.default_rng(0).normal(size=(48, 80)).astype(np.float32)
    theirs = Int8Params(torch.tensor(w), requires_grad=False).to("cpu")
    assert theirs.dtype is torch.int8
    leaf = jax.jit(AtLoad("int8").quantized)(w[None])
    np.testing.assert_array_equal(leaf.codes[0], theirs.data.numpy())
    np.testing.assert_array_equal(leaf.scales[0], theirs.SCB.numpy())
    dense = torch.ops.bitsandbytes.int8_vectorwise_dequant(theirs.data, theirs.SCB)
    np.testing.assert_array_equal(leaf.dense(False)[0], dense.numpy())


def test_a_row_of_zeros_and_one_past_float16_stay_finite():
    leaf = AtLoad("int8").quantized(jnp.array([[[0.0, 0.0], [1e6, -1e6]]]))
    np.testing.assert_array_equal(leaf.codes[0], [[0, 0], [127, -127]])
    np.testing.assert_allclose(leaf.dense(False)[0, 1], [65504, -65504], rtol=1e-6)
