"""NF4, FP4 and int4: numbers in and out. The peers are bitsandbytes' torch implementation and GPTQ's grid."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ModelError
from jaxtune.quant import four_bit
from jaxtune.quant.scheme import AtLoad
from tests.quant.support import kernel

SHAPES = [(24, 128), (64, 96), (30, 34), (3, 448)]  # whole blocks; rows that share blocks; an incomplete last block


@pytest.fixture(scope="module")
def peer():
    import torch
    from bitsandbytes import functional

    return torch, functional


def weight(shape, seed=0):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.02
    w[0] = 0  # blocks of nothing but zeros
    w.flat[-3:] = (1.0, -1.0, 0.5)  # ends of the tables
    return w


def double(torch, functional, absmax, mean=None):
    """(codes, nested absmax, offset) as functional.quantize_4bit makes them with the definition's kernels."""
    offset = absmax.mean() if mean is None else torch.tensor(mean)
    return *kernel("quantize_blockwise")(absmax - offset, functional.create_dynamic_map(), 256), offset


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes_in_every_bit(peer, kind, shape):
    torch, _ = peer
    w = weight(shape)
    packed, absmax = kernel("quantize_4bit")(torch.tensor(w), 64, kind, torch.uint8)
    ours = jax.jit(partial(four_bit.quantize, kind=kind, double=False))(w)
    np.testing.assert_array_equal(ours.packed, packed.numpy()[:, 0])
    # Of an incomplete block of zeros alone bitsandbytes keeps 1e-38 as its absmax.
    np.testing.assert_array_equal(ours.absmax, absmax.numpy())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_number_halfway_between_two_codes_has_the_lower_one(peer, kind):
    torch, _ = peer
    table = np.sort(four_bit.CODES[kind])
    near = [(table[:-1] + table[1:]) / np.float32(2)]
    near += [np.nextafter(near[0], np.float32(end)) for end in (-2, 2)]
    w = np.concatenate([*near, table, [-0.0, 1.0, 0.0]]).astype(np.float32)[None]
    w = np.where(np.abs(w) < np.finfo(np.float32).tiny, 0, w)  # a CPU may take such small numbers for zero
    packed, _ = kernel("quantize_4bit")(torch.tensor(w), 64, kind, torch.uint8)
    np.testing.assert_array_equal(four_bit.quantize(jnp.array(w), kind, False).packed, packed.numpy()[:, 0])


@pytest.mark.parametrize("shape", [(64, 96), (896, 256)], ids=str)
def test_double_quantisation_is_that_of_bitsandbytes_in_every_bit_from_the_same_mean(peer, shape):
    torch, functional = peer
    blocks = four_bit.quantize(jnp.array(weight(shape)), "nf4", False)
    absmax = torch.tensor(np.asarray(blocks.absmax))
    codes, nested, offset = double(torch, functional, absmax)
    ours = jax.jit(four_bit.quantize_scales)(blocks, offset.item())
    np.testing.assert_array_equal(ours.absmax, codes.numpy())
    np.testing.assert_array_equal(ours.nested, nested.numpy())


@pytest.mark.parametrize("size", [1, 7, 3584])
def test_the_mean_of_the_scales_is_rounded_from_the_exact_one(peer, size):
    torch, _ = peer
    x = np.random.default_rng(size).uniform(0.01, 0.1, size).astype(np.float32)
    ours, exact = float(jax.jit(four_bit.exact_mean)(x)), float(np.mean(x.astype(np.float64)))
    ulp = float(np.spacing(np.float32(exact)))
    assert abs(ours - exact) <= ulp
    assert abs(torch.tensor(x).mean().item() - ours) <= 4 * ulp  # whose own depends on the device


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("with_double", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_dequantised_numbers_are_those_of_bitsandbytes_in_every_bit(peer, kind, with_double, shape):
    from bitsandbytes.backends.default import ops

    torch, functional = peer
    scheme = AtLoad(kind, with_double)
    leaf = jax.jit(scheme.quantized)(np.stack([weight(shape), weight(shape, 1)]))
    dense = np.asarray(jax.jit(lambda leaf: leaf.dense(False))(leaf))
    for layer in range(2):
        w = torch.tensor(weight(shape, layer))
        packed, absmax = kernel("quantize_4bit")(w, 64, kind, torch.uint8)
        if with_double:
            codes, nested, offset = double(torch, functional, absmax, float(leaf.offset[layer]))
            absmax = ops._dequantize_blockwise_compute.__wrapped__(
                codes, nested, functional.create_dynamic_map(), 256, torch.float32
            )
            absmax = absmax + offset
        theirs = ops._dequantize_4bit_compute.__wrapped__(
            packed.reshape(-1), absmax, functional.get_4bit_type(kind, "cpu"), 64, shape, torch.float32
        )
        np.testing.assert_array_equal(dense[layer], theirs.numpy())


def test_int4_is_the_symmetric_grid_of_gptq_by_group():
    w = weight((6, 192))
    leaf = jax.jit(AtLoad("int4").quantized)(w[None])
    assert leaf.block == 64  # 128 does not divide 192
    groups = w.reshape(-1, 64)
    scale = np.abs(groups).max(1, keepdims=True) * np.float32(2 / 15)
    ratio = groups / np.where(scale > 0, scale, 1)
    steps = np.clip(np.round(ratio), -8, 7)
    ties = (np.abs(np.abs(ratio) - 7.5) < 1e-4).reshape(
        w.shape
    )  # a group's largest number: both neighbours are as near
    difference = np.abs(leaf.dense(False)[0] - (steps * scale).reshape(w.shape))
    assert difference[~ties].max() == 0
    assert (difference <= scale.max()).all()
    assert steps.min() <= -7 and steps.max() == 7


def test_bytes_of_a_weight_are_those_of_the_table_in_the_docs():
    shape = jax.ShapeDtypeStruct((2, 512, 1024), jnp.bfloat16)
    bits = {"nf4": 4 + 32 / 64, "fp4": 4 + 32 / 64, "int4": 4 + 32 / 128, "int8": 8 + 32 / 1024}
    for kind, expected in bits.items():
        assert bits_of(AtLoad(kind), shape) == expected
    nested = 4 + 8 / 64 + 32 / (64 * 256)
    assert bits_of(AtLoad("nf4", True), shape) == pytest.approx(nested + 32 / (512 * 1024), abs=1e-9)


def bits_of(scheme, shape) -> float:
    leaf = jax.eval_shape(scheme.quantized, shape)
    return 8 * sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(leaf)) / shape.size


def test_rows_of_odd_length_are_refused():
    with pytest.raises(ModelError, match=r"k_proj has rows of 63 numbers.*even"):
        four_bit.check_shape((8, 63), "k_proj")
