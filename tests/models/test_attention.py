"""Attention in blocks equals attention by the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import attention as module
from jaxtune.models.attention import attention, visible
from jaxtune.segments import SHARED

B, T, H, K, D = 2, 24, 4, 2, 8
PACKED = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [6, 6, 6, 6], axis=1).reshape(2, 24)
SHARING = np.repeat([[SHARED, 1, 2, 0], [SHARED, SHARED, 1, 2]], [6, 6, 6, 6], axis=1).reshape(2, 24)


def by_definition(q, k, v, q_segments, k_segments, offset=0, window=None):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(k.shape[1])
            if s <= t + offset
            and (window is None or t + offset - s < window)
            and (k_segments[b, s] == q_segments[b, t] or (k_segments[b, s] == -1 and q_segments[b, t] != 0))
        ]
        if not seen:
            continue
        head = h // (q.shape[2] // k.shape[2])
        scores = k[b, seen, head] @ q[b, t, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, head]
    return out


def draw(time=T, keys=T, seed=0):
    q, k, v = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(q, (B, time, H, D)),
        jax.random.normal(k, (B, keys, K, D)),
        jax.random.normal(v, (B, keys, K, D)),
    )


@pytest.fixture(params=[128, 7], ids=lambda size: f"block{size}")
def block(request, monkeypatch):
    monkeypatch.setattr(module, "MIN_BLOCK", request.param)
    monkeypatch.setattr(module, "MAX_BLOCKS", 100)


@pytest.mark.parametrize("segments", [PACKED, SHARING], ids=["packed", "shared start"])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_packed_causal_windowed(block, window, segments):
    inputs = draw()
    ours = attention(*inputs, segments, segments, window=window)
    np.testing.assert_allclose(ours, by_definition(*inputs, segments, segments, window=window), atol=1e-5)


def test_window_may_be_traced(block):
    inputs = draw()
    ours = jax.jit(lambda w: attention(*inputs, PACKED, PACKED, window=w))(jnp.int32(3))
    np.testing.assert_allclose(ours, by_definition(*inputs, PACKED, PACKED, window=3), atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_queries_that_start_late_see_the_cache_before_them(window):
    q, k, v = draw(time=3, keys=16)
    k_segments = np.array([[0, 0] + [1] * 14, [1] * 16])
    q_segments = np.ones((B, 3), np.int32)
    ours = jax.jit(lambda offset: attention(q, k, v, q_segments, k_segments, offset, window))(jnp.int32(9))
    np.testing.assert_allclose(ours, by_definition(q, k, v, q_segments, k_segments, 9, window), atol=1e-5)


def test_a_document_s_output_and_gradient_do_not_depend_on_its_neighbours(block):
    q, k, v = draw()
    other = draw(seed=1)
    inside = (PACKED == 2)[:, :, None, None]
    mixed = [jnp.where(inside, mine, theirs) for mine, theirs in zip((q, k, v), other)]

    def second(q, k, v):
        return jnp.sum(jnp.where(inside, attention(q, k, v, PACKED, PACKED), 0.0) ** 2)

    ours, theirs = (jax.jit(jax.value_and_grad(second, argnums=(0, 1, 2)))(*x) for x in ((q, k, v), mixed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_a_query_that_sees_nothing_gives_numbers():
    q, k, v = draw()
    nowhere = np.full((B, T), 9)
    assert np.isfinite(attention(q, k, v, nowhere, PACKED)).all()


def test_bfloat16_keeps_its_type_and_is_close():
    inputs = [x.astype(jnp.bfloat16) for x in draw()]
    ours = attention(*inputs, PACKED, PACKED)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), by_definition(*inputs, PACKED, PACKED), atol=3e-2)


def test_blocks_above_the_diagonal_are_not_computed(monkeypatch):
    monkeypatch.setattr(module, "MIN_BLOCK", 8)
    q, k, v = draw()
    text = jax.jit(lambda *x: attention(*x, PACKED, PACKED)).lower(q, k, v).as_text()
    rows = H // K * 8
    assert all(f"x{H // K}x8x{keys}xf32" in text or f"x{rows}x{keys}xf32" in text for keys in (8, 16, 24))
    assert f"x{T}x{T}xf32" not in text


def test_the_mask_of_a_window_counts_the_token_itself():
    ones = np.ones((1, 4), np.int32)
    mask = visible(ones, ones, 0, 2)[0].astype(int)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
