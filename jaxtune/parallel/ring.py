"""Ring attention: queries stay, and every device's keys and values pass by on their way round the context axis.

After Liu et al. 2023 (arXiv 2310.01889), in zigzag order. Scores exist one tile at a time, forward and backward, so
memory falls with the size of the ring. To be called inside a shard_map that is manual over the context axis; with one
device on that axis, or without a shard_map, the ring is the whole sequence's own tiles.

Legend: that of models/tile.py; T tokens of this device, R = B * K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.tile import (
    Partial,
    Tokens,
    attend,
    attend_backward,
    cut_keys,
    cut_queries,
    empty_columns,
    join_keys,
    join_queries,
    outputs_share,
    scaled,
    visible,
)
from jaxtune.models.tiled import SAVED
from jaxtune.parallel import local
from jaxtune.parallel.tiles import NOWHERE, Grid, may_see
from jaxtune.parallel.zigzag import AXIS, positions_of


def ring_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """What `jaxtune.models.attention` gives for the whole sequence, of this device's part: [B, T, H, D].

    All arguments are this device's parts, in zigzag order. window: how many keys back a query sees, itself counted;
    None: all of them. Statistics and sums are float32. A query that sees nothing gives zeros.

    Under jax.checkpoint with a policy that keeps the name `attended`, the backward pass does not go round a second
    time for what the forward pass knew.
    """
    return _ring(q_BTHD, k_BTKD, v_BTKD, segments_BT, None if window is None else jnp.asarray(window, jnp.int32))


@jax.custom_vjp
def _ring(q_BTHD, k_BTKD, v_BTKD, segments_BT, window):
    return _forward(q_BTHD, k_BTKD, v_BTKD, segments_BT, window)[0]


def _forward(q_BTHD, k_BTKD, v_BTKD, segments_BT, window):
    ring = _Ring.of(q_BTHD, k_BTKD, segments_BT, window)
    q, kv = ring.queries(scaled(q_BTHD)), ring.keys(k_BTKD, v_BTKD)

    def tile(mask, q_RXD, kv, part, _):
        k_RsD, v_RsD = kv
        return attend(part, q_RXD, k_RsD, v_RsD.swapaxes(1, 2), mask), ()

    part, _ = ring.go_round(tile, q, kv, Partial.empty(q.shape), ())
    out, logsum = jax.vmap(Partial.finish)(part)
    out, logsum = (checkpoint_name(x, SAVED) for x in (ring.whole(out).astype(v_BTKD.dtype), logsum))
    return out, (q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out, logsum)


def _backward(saved, dout_BTHD):
    q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out_BTHD, logsum = saved
    ring = _Ring.of(q_BTHD, k_BTKD, segments_BT, window)
    q, dout, kv = ring.queries(scaled(q_BTHD)), ring.queries(dout_BTHD), ring.keys(k_BTKD, v_BTKD)
    delta = outputs_share(ring.queries(out_BTHD), dout)

    def tile(mask, fixed, kv, dq, dkv):
        k_RsD, v_RsD = kv
        here, *more = attend_backward(*fixed, k_RsD, k_RsD.swapaxes(1, 2), v_RsD, mask)
        return dq + here, dkv + jnp.stack(more)

    zeros = empty_columns(q.shape), jnp.zeros(kv.shape, jnp.float32)
    dq, dkv = ring.go_round(tile, (q, dout, logsum, delta), kv, *zeros)
    dk, dv = (ring.whole_keys(dkv[:, n]) for n in range(2))
    return scaled(ring.whole(dq)).astype(q_BTHD.dtype), dk.astype(k_BTKD.dtype), dv.astype(v_BTKD.dtype), None, None


_ring.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Ring:
    """One device's place in the ring, and the queries that stay there."""

    size: int
    rank: jax.Array
    grid: Grid
    heads: tuple[int, int]  # B, K
    groups: int  # G
    segments: jax.Array  # [B, T]
    window: jax.Array | None

    @classmethod
    def of(cls, q_BTHD, k_BTKD, segments_BT, window) -> "_Ring":
        size, (batch, time, heads, _) = local.size(AXIS), q_BTHD.shape
        grid = Grid.of(time, 1 if size == 1 else 2, batch * heads)
        kv_heads = k_BTKD.shape[2]
        return cls(size, local.index(AXIS), grid, (batch, kv_heads), heads // kv_heads, segments_BT, window)

    def queries(self, x_BTHD: jax.Array) -> jax.Array:
        """[N, R, X, D]."""
        cut = cut_queries(self.grid.filled(x_BTHD, 1), self.heads[1], self.grid.block)
        return jax.lax.collapse(cut.swapaxes(0, 1), 1, 3)

    def whole(self, x_NRDX: jax.Array) -> jax.Array:
        """What tiles made for them: [B, T, H, D]."""
        split = x_NRDX.reshape(-1, *self.heads, *x_NRDX.shape[2:]).swapaxes(0, 1)
        return self.grid.emptied(join_queries(split, self.grid.block), 1)

    def keys(self, *arrays_BTKD: jax.Array) -> jax.Array:
        """Keys and values as one message: [N, 2, R, s, D]."""
        cut = [cut_keys(self.grid.filled(x, 1), self.grid.block).swapaxes(0, 1) for x in arrays_BTKD]
        return jnp.stack([jax.lax.collapse(x, 1, 3) for x in cut], axis=1)

    def whole_keys(self, x_NRsD: jax.Array) -> jax.Array:
        """Back, of keys or values: [B, T, K, D]."""
        split = x_NRsD.reshape(-1, *self.heads, *x_NRsD.shape[2:]).swapaxes(0, 1)
        return self.grid.emptied(join_keys(split), 1)

    def go_round(self, tile: Callable, fixed: Any, kv: jax.Array, resident: Any, cargo: Any) -> tuple[Any, Any]:
        """Take every part's keys and values past the queries here.

        tile(mask, fixed, kv, resident, cargo) -> (resident, cargo), of one block of queries and one of keys: `fixed`
        and `resident` belong to the queries and stay, `cargo` belongs to the keys and ends on the device that they
        come from. The next part is on its way while one is dealt with, and so is the cargo of the last one.
        """
        guest = kv, self.segments
        following = self._send(guest)
        own = jnp.asarray(self.grid.own_tiles())
        resident, cargo = self._visit(tile, own, self.rank, fixed, guest, resident, cargo)
        if self.size == 1:
            return resident, cargo
        earlier, later = self.grid.guest_tiles()

        def receive(step, guest, resident, cargo):
            source = (self.rank - step) % self.size
            tiles = jnp.where(source < self.rank, earlier, later)
            arriving, nothing = self._send(cargo), jax.tree.map(jnp.zeros_like, cargo)
            resident, more = self._visit(tile, tiles, source, fixed, guest, resident, nothing)
            return resident, jax.tree.map(jnp.add, arriving, more)

        def pass_on(step, carry):
            guest, resident, cargo = carry
            return self._send(guest), *receive(step, guest, resident, cargo)

        last = self.size - 1
        guest, resident, cargo = jax.lax.fori_loop(1, last, pass_on, (following, resident, cargo))
        resident, cargo = receive(last, guest, resident, cargo)
        return resident, self._send(cargo)

    def _visit(self, tile, tiles, source, fixed, guest, resident, cargo):
        """Go through the tiles with one part's keys; one in which nothing is seen costs nothing."""
        kv, segments = guest
        queries = self._tokens(self.rank, self.segments, NOWHERE["queries"]).spread(self.groups)
        keys = self._tokens(source, segments, NOWHERE["keys"])

        def one(n, carry):
            resident, cargo = carry
            i, j = tiles[n]
            asked = _block(queries, i), _block(keys, j), self.window
            before = _block(resident, i), _block(cargo, j)
            # Only blocks go in and out of the branches, for what does is copied.
            after = jax.lax.cond(
                may_see(*asked), lambda: tile(visible(*asked), _block(fixed, i), kv[j], *before), lambda: before
            )
            return _with_block(resident, after[0], i), _with_block(cargo, after[1], j)

        return jax.lax.fori_loop(0, len(tiles), one, (resident, cargo))

    def _tokens(self, rank: jax.Array, segments: jax.Array, beyond: int) -> Tokens:
        return self.grid.tokens(positions_of(rank, segments.shape[1], self.size), segments, beyond)

    def _send(self, tree: Any) -> Any:
        """To the next device of the ring."""
        if self.size == 1:
            return tree
        return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % self.size) for i in range(self.size)])


def _block(tree: Any, index: jax.Array) -> Any:
    """Of arrays [N, ...]."""
    return jax.tree.map(lambda x: x[index], tree)


def _with_block(tree: Any, parts: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x, part: x.at[index].set(part), tree, parts)
