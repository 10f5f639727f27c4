"""Attention in tiles: what it gives is attention, what it leaves out is not seen, and it keeps no scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import tiled
from jaxtune.models.attention import _block
from jaxtune.models.tiled import Mask, tiled_attention
from jaxtune.segments import SHARED

B, T, H, K, D = 2, 45, 6, 2, 8  # T is no multiple of a block
PACKED = np.stack([np.repeat([1, 2, 3, 0], [21, 1, 18, 5]), np.repeat([1, 2], [4, 41])]).astype(np.int32)
SHARED_START = np.stack([np.repeat([SHARED, 1, 2, 3, 0], [11, 10, 2, 17, 5]), np.repeat([SHARED, 1, 2], [3, 20, 22])])
SHUFFLED = np.random.default_rng(0).permutation(PACKED.T).T  # no run of tokens: nothing can be left out
SEGMENTS = {"packed": PACKED, "shuffled": SHUFFLED, "one": np.ones_like(PACKED), "shared start": SHARED_START}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 8)


def draw(dtype=jnp.float32):
    sizes = [(B, T, heads, D) for heads in (H, K, K, H)]
    return [jax.random.normal(jax.random.key(n), size).astype(dtype) for n, size in enumerate(sizes)]


def with_gradients(function, *qkv_dout):
    @jax.jit
    def both(q, k, v, dout):
        out, backward = jax.vjp(function, q, k, v)
        return out, *backward(dout)

    return both(*qkv_dout)


@pytest.mark.parametrize("window", [None, 1, 5, 9, 100])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_output_and_gradients_are_those_of_the_whole_mask(segments, window):
    ours = with_gradients(lambda *qkv: tiled_attention(*qkv, segments, window), *draw())
    plain = with_gradients(lambda *qkv: _block(*qkv, segments, segments, 0, window), *draw())
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), ours, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, err_msg=name)


def test_a_window_may_be_traced():
    jitted = jax.jit(lambda window, *qkv: tiled_attention(*qkv, PACKED, window))
    plain = _block(*draw()[:3], PACKED, PACKED, 0, 5)
    np.testing.assert_allclose(jitted(jnp.int32(5), *draw()[:3]), plain, atol=2e-5)


def test_scores_of_any_size_give_numbers():
    q, k, v, dout = draw()
    found = with_gradients(lambda *qkv: tiled_attention(*qkv, PACKED), 300 * q, 300 * k, v, dout)
    assert all(np.isfinite(x).all() for x in found)


def test_bfloat16_keeps_its_type():
    found = with_gradients(lambda *qkv: tiled_attention(*qkv, PACKED), *draw(jnp.bfloat16))
    plain = with_gradients(lambda *qkv: _block(*qkv, PACKED, PACKED, 0, None), *draw())
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    for mine, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.1)


@pytest.mark.parametrize("hidden_by", ["segment", "window"])
def test_a_tile_that_nobody_sees_is_not_computed(hidden_by):
    """nan times a weight of zero would be nan."""
    segments = np.repeat([[1, 2]], [16, 29], axis=1).repeat(B, axis=0).astype(np.int32)
    segments = segments if hidden_by == "segment" else np.ones_like(segments)
    q, k, v, dout = draw()
    k, v = k.at[:, :8].set(jnp.nan), v.at[:, :8].set(jnp.nan)
    function = lambda *qkv: tiled_attention(*qkv, segments, 9 if hidden_by == "window" else None)  # noqa: E731
    out, dq, dk, dv = with_gradients(function, q, k, v, dout.at[:, :16].set(0.0))
    assert np.isfinite(out[:, 16:]).all() and np.isfinite(dq[:, 16:]).all()
    assert np.isfinite(dk[:, 16:]).all() and np.isfinite(dv[:, 16:]).all()


def test_which_blocks_are_seen():
    queries = Mask.of(jnp.asarray(np.repeat([[1, 2, 0]], [8, 32, 8], axis=1)), None, 8).queries(2)
    np.testing.assert_array_equal(queries.first, [0, 1, 1, 1, 1, 5])
    np.testing.assert_array_equal(queries.whole, [0, 1, 1, 1, 1, 5])  # of its own segment, every block is whole
    queries = Mask.of(jnp.asarray(np.repeat([[1, 2]], [12, 28], axis=1)), None, 8).queries(2)
    np.testing.assert_array_equal(queries.first, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(queries.whole, [0, 1, 2, 2, 2])
    shared = np.repeat([[SHARED, 1, 2, 3, 0]], [18, 6, 8, 16, 8], axis=1)
    queries = Mask.of(jnp.asarray(shared), None, 8).queries(2)
    np.testing.assert_array_equal(queries.shared, [0, 0, 0, 3, 3, 3, 0])  # beside those from `first` on
    np.testing.assert_array_equal(queries.first, [0, 0, 0, 3, 4, 4, 6])
    np.testing.assert_array_equal(queries.whole, [0, 0, 2, 3, 4, 4, 6])
    queries = Mask.of(jnp.ones((1, 40), jnp.int32), jnp.int32(17), 8).queries(2)
    np.testing.assert_array_equal(queries.first, [0, 0, 0, 1, 2])
    np.testing.assert_array_equal(queries.whole, [0, 0, 1, 2, 3])


def test_no_scores_of_the_whole_sequence_exist_and_none_are_kept():
    segments, (q, k, v, _) = jnp.asarray(PACKED), draw()
    padded = 48

    def loss(q, k, v):
        return jnp.sum(tiled_attention(q, k, v, segments) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).as_text()
    shapes = {tuple(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)*\d+)xf32>", text)}
    assert max(np.prod(shape) for shape in shapes) <= B * padded * H * D


def test_a_policy_that_keeps_the_name_runs_the_forward_pass_once():
    q, k, v, _ = draw()

    def products(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        attend = jax.checkpoint(lambda *qkv: jnp.sum(tiled_attention(*qkv, PACKED) ** 2), policy=policy)
        return str(jax.make_jaxpr(jax.grad(attend))(q, k, v)).count("dot_general")

    forward = 2 * 2  # two products for a tile, masked or not
    assert products("query") - products(tiled.SAVED) == forward


def test_xla_for_cpus_can_vectorise_what_is_not_a_product(monkeypatch):
    """Sums run down columns, and masks are made in the order of the scores: not over [s, G, t] and then counted out."""
    monkeypatch.setattr(tiled, "BLOCK", 128)
    segments = jnp.asarray(np.repeat([[1, 2]], [100, 156], axis=1).astype(np.int32))
    q, k, v, dout = (jnp.ones((1, 256, heads, 16)) for heads in (H, K, K, H))

    def both(q, k, v, dout):
        out, backward = jax.vjp(lambda *qkv: tiled_attention(*qkv, segments), q, k, v)
        return out, *backward(dout)

    program = jax.jit(both).lower(q, k, v, dout).compile().as_text()
    loops = re.split(r"\n(?=%)", program)
    assert sum("exponential(" in loop for loop in loops) >= 4, "of a tile with and without a mask, forward and backward"
    assert f"[1,128,{H // K * 128}]" in program
    assert f"128,{H // K},128]" not in program
    last = r"f32\[(?:1,)?256,6\]\S* reduce\("  # a sum over D of [B, T, H, D]
    assert not re.search(last, program)
