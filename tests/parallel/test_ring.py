"""What makes ring attention a ring: where its keys go, what it computes, and what it keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.tile import Partial, Tokens, visible
from jaxtune.parallel import tiles
from jaxtune.parallel.ring import ring_attention
from jaxtune.parallel.tiles import Grid, may_see
from jaxtune.parallel.zigzag import positions_of
from tests.parallel.support import (
    PACKED,
    SPLIT,
    B,
    T,
    assert_same,
    draw,
    on_parts,
    random_segments,
    split,
    whole,
    with_gradients,
)


def lowered(parts, time=T, heads=8, kv_heads=2, dim=8, batch=2):
    """Output and gradients, ready to compile; nothing is allocated."""
    shapes = [jax.ShapeDtypeStruct((batch, time, n, dim), jnp.float32) for n in (heads, kv_heads, kv_heads, heads)]
    segments = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    return on_parts(partial(with_gradients, ring_attention), parts, (SPLIT,) * 5).lower(*shapes, segments)


def test_keys_go_round_and_nothing_is_gathered():
    text = lowered(4).compile().as_text()
    assert "collective-permute(" in text
    for other in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter"):
        assert f"{other}(" not in text and f"{other}-start(" not in text


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("block", [3, 4, 5])
def test_in_blocks_that_divide_a_chunk_and_that_do_not(monkeypatch, block, parts):
    monkeypatch.setattr(tiles, "MIN_BLOCK", block)
    monkeypatch.setitem(tiles.SCORES, "cpu", 1)
    inputs = *draw(), PACKED, jnp.int32(23)
    attend = partial(ring_attention)  # not the one that was compiled in whole chunks
    assert_same(split(attend, parts, *inputs), whole(*inputs))


def test_a_query_that_sees_nothing_gives_numbers():
    ours = split(ring_attention, 2, *draw(), PACKED, jnp.int32(0))
    assert all(np.all(np.asarray(x) == 0) for x in ours)


def pairs(grid, table):
    """[blocks, blocks]: True where a table has the tile; no tile may stand in it twice."""
    mask = np.zeros((grid.chunks * grid.blocks,) * 2, int)
    np.add.at(mask, tuple(np.asarray(table).T), 1)
    assert mask.max() == 1
    return mask.astype(bool)


@pytest.mark.parametrize("parts", [2, 5])
def test_just_the_tiles_that_causality_leaves_are_computed_as_many_on_every_device(parts):
    grid = Grid(chunks=2, chunk=6, block=2)
    counts = set()
    for rank in range(parts):
        count = 0
        for source in range(parts):
            q, k = (np.asarray(positions_of(r, 12, parts)).reshape(-1, 2) for r in (rank, source))
            needed = q[:, None].max(-1) >= k[None].min(-1)
            table = grid.own_tiles() if source == rank else grid.guest_tiles()[int(source > rank)]
            np.testing.assert_array_equal(pairs(grid, table), needed)
            count += len(table)
        counts.add(count)
    assert len(counts) == 1


def test_tiles_are_bounded_in_bytes_and_cover_every_chunk():
    for chunk in (1, 5, 127, 128, 129, 1031, 4096, 5000, 100_003):
        for rows in (1, 4, 32, 512):
            grid = Grid.of(2 * chunk, 2, rows)
            assert grid.chunk == chunk and (grid.blocks - 1) * grid.block < chunk <= grid.blocks * grid.block
            assert grid.block <= tiles.MIN_BLOCK or 4 * rows * grid.block**2 <= tiles.SCORES["cpu"]


def test_a_tile_in_which_something_is_seen_is_not_skipped_and_most_others_are():
    generator, skipped, empty = np.random.default_rng(0), 0, 0
    for _ in range(200):
        segments = random_segments(generator)
        i, j = sorted(generator.integers(0, 8, 2), reverse=True)
        window = int(generator.integers(1, T)) if generator.random() < 0.5 else None
        q, k = (Tokens(np.arange(10 * n, 10 * n + 10), segments[:, 10 * n : 10 * n + 10]) for n in (i, j))
        seen = bool(visible(q, k, window).any())
        assert may_see(q, k, window) or not seen
        skipped += not may_see(q, k, window)
        empty += not seen
    assert skipped > 0.7 * empty > 0


def test_nothing_met_gives_zeros_and_a_finite_logarithm():
    out, logsum = Partial.empty((2, 3, 5)).finish()
    assert not out.any() and not logsum.any()


def temporary(parts, **shape):
    return lowered(parts, **shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("time", "scores", "factor"),
    [
        pytest.param(2048, tiles.SCORES["cpu"], 2.5, id="tiles are whole chunks and shrink with them"),
        pytest.param(8192, 1 << 18, 1.7, id="tiles are small and tokens count"),
    ],
)
def test_temporary_memory_falls_with_the_ring_and_scores_never_exist(monkeypatch, time, scores, factor):
    monkeypatch.setitem(tiles.SCORES, "cpu", scores)
    heads = 4
    sizes = [temporary(parts, time=time, heads=heads, kv_heads=2, dim=64, batch=1) for parts in (2, 4, 8)]
    assert sizes[0] > factor * sizes[1] > factor**2 * sizes[2]
    for size, parts in zip(sizes, (2, 4, 8), strict=True):
        assert size < 4 * heads * time**2 / parts  # the scores of the queries of one device
    assert sizes[-1] < 4 * heads * time**2 / 16


def test_what_is_kept_by_name_is_not_computed_again():
    def permutes(policy):
        attend = jax.checkpoint(ring_attention, policy=policy)
        run = on_parts(partial(with_gradients, attend), 4, (SPLIT,) * 5)
        return run.lower(*draw(), PACKED).as_text().count("stablehlo.collective_permute")

    names = jax.checkpoint_policies.save_only_these_names
    forward = on_parts(ring_attention, 4).lower(*draw()[:3], PACKED).as_text().count("stablehlo.collective_permute")
    assert permutes(names("query")) - permutes(names("attended")) == forward > 0


def test_without_a_region_a_sequence_is_its_own_ring():
    q, k, v, dout = draw(time=T - 1)
    segments = PACKED[:, 1:]
    ours = jax.jit(partial(with_gradients, lambda q, k, v: ring_attention(q, k, v, segments)))(q, k, v, dout)
    assert_same(ours, whole(q, k, v, dout, segments))


def test_padding_that_differs_from_row_to_row():
    segments = np.ones((B, T), np.int32)
    segments[0, 11:] = 0
    inputs = *draw(), segments
    assert_same(split(ring_attention, 8, *inputs), whole(*inputs))
