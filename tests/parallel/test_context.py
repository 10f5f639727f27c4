"""Attention over a split sequence equals attention over the whole of it, whichever way it is done."""

import re
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune.config import MeshSection
from jaxtune.models.attention import attention
from jaxtune.parallel.context import KINDS, spread_attention
from jaxtune.parallel.zigzag import AXIS, unzigzag, zigzag
from tests.parallel.support import (
    PACKED,
    SHARING,
    K,
    T,
    assert_same,
    draw,
    on_parts,
    random_segments,
    split,
    whole,
)

NONE = 2**30  # a window that hides nothing, as a stack gives to its layers without one


@pytest.fixture(params=list(KINDS))
def attend(request):
    return KINDS[request.param]


def test_the_kinds_are_those_of_the_configuration():
    assert set(KINDS) == set(get_args(MeshSection.model_fields["context_attention"].annotation))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_packed_sequences(attend, parts):
    assert_same(split(attend, parts, *draw(), PACKED), whole(*draw(), PACKED))


@pytest.mark.parametrize("parts", [2, 8])
def test_a_start_that_documents_share(attend, parts):
    assert_same(split(attend, parts, *draw(), SHARING), whole(*draw(), SHARING))


@pytest.mark.parametrize("window", [1, 3, 17, 45, NONE])
@pytest.mark.parametrize("parts", [2, 8])
def test_windows_within_a_chunk_and_across_chunks(attend, parts, window):
    inputs = *draw(), PACKED, jnp.int32(window)
    assert_same(split(attend, parts, *inputs), whole(*inputs))


def test_a_window_may_be_a_number(attend):
    windowed = partial(attend, window=13)
    assert_same(split(windowed, 2, *draw(), PACKED), whole(*draw(), PACKED, 13))


def test_random_layouts(attend):
    for seed in range(20):
        generator = np.random.default_rng(seed)
        inputs = *draw(seed=seed), random_segments(generator), jnp.int32(generator.integers(1, T))
        assert_same(split(attend, 8, *inputs), whole(*inputs))


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_one_key_head_and_as_many_as_queries(attend, kv_heads):
    inputs = *draw(kv_heads=kv_heads), PACKED
    assert_same(split(attend, 2, *inputs), whole(*inputs))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_stay_and_are_close(attend, dtype):
    ours = split(attend, 2, *draw(dtype=dtype), PACKED)
    assert {x.dtype for x in ours} == {jnp.dtype(dtype)}
    wide = [x.astype(jnp.float32) for x in draw(dtype=dtype)]
    assert_same(ours, whole(*wide, PACKED), {jnp.bfloat16: 4e-2, jnp.float16: 5e-3}[dtype])


def layers(attend, policy, x, windows):
    """A stack as the decoder has it: a scan over layers that are computed again in the backward pass."""

    @partial(jax.checkpoint, policy=policy)
    def layer(x, window):
        q, k, v = jnp.sin(x), x[:, :, :K], jnp.cos(x[:, :, -K:])
        return x + attend(q, k, v, window), None

    return jax.lax.scan(layer, x, windows)[0]


@pytest.mark.parametrize("saved", [None, "attended"])
def test_in_a_scan_over_layers_with_rematerialisation(attend, saved):
    policy = saved and jax.checkpoint_policies.save_only_these_names(saved)
    windows, x = jnp.array([5, NONE, 30], jnp.int32), draw()[0]

    def gradient(attend, x):
        return jax.grad(lambda x: jnp.sum(layers(attend, policy, x, windows) ** 2))(x)

    theirs = jax.jit(partial(gradient, lambda *a: attention(*a[:3], PACKED, PACKED, 0, a[3])))(x)
    ours = on_parts(lambda x, s: gradient(lambda *a: attend(*a[:3], s, a[3]), x), 2)
    order, back = zigzag(T, 2), unzigzag(T, 2)
    np.testing.assert_allclose(ours(x[:, order], PACKED[:, order])[:, back], theirs, atol=1e-4, rtol=1e-5)


def test_the_output_has_its_name_once(attend):
    """So a policy that keeps it does not keep a copy, and one that does not has nothing to look for elsewhere."""
    text = str(jax.make_jaxpr(on_parts(attend, 2))(*draw()[:3], PACKED))
    assert len(re.findall(r"f32\[2,40,8,8\] = name\[name=attended\]", text)) == 1


def test_rows_split_over_another_axis_too():
    mesh = jax.make_mesh((2, 4), ("data", AXIS), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    both = P("data", AXIS)
    order, back = zigzag(T, 4), unzigzag(T, 4)
    q, k, v, dout = draw()
    for kind in KINDS:
        run = jax.shard_map(partial(spread_attention, kind), mesh=mesh, in_specs=both, out_specs=both, check_vma=False)
        ours = jax.jit(run)(*(x[:, order] for x in (q, k, v, PACKED)))[:, back]
        np.testing.assert_allclose(ours, whole(q, k, v, dout, PACKED)[0], atol=1e-5)


def test_parts_in_another_order_give_another_result():
    """So the comparisons above would notice a sequence that was never put in order."""
    q, k, v, dout = draw()
    wrong = on_parts(partial(spread_attention, "ring"), 2)(q, k, v, PACKED)
    assert not np.allclose(wrong, whole(q, k, v, dout, PACKED)[0], atol=1e-2)
