"""Ring attention: queries stay, and every device's keys and values pass by on their way round the context axis.

After Liu et al. 2023 (arXiv 2310.01889), in zigzag order. Scores exist one tile at a time, forward and backward, so
memory falls with the size of the ring. To be called inside a shard_map that is manual over the context axis; with one
device on that axis, or without a shard_map, the ring is the whole sequence's own tiles.

Legend: B batch, T tokens of this device, H query heads, K key/value heads, G = H / K, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.tiled import SAVED
from jaxtune.parallel import local
from jaxtune.parallel.tiles import LATEST, Grid, Partial, Tokens, attend, attend_backward, may_see, visible
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
    q, kv = _grouped(q_BTHD, k_BTKD.shape[2]), _stacked(k_BTKD, v_BTKD)

    def tile(mask, fixed, kv, part, _):
        return attend(part, *fixed, *kv, mask), ()

    part, _ = _Ring.of(q, segments_BT, window).go_round(tile, (q,), kv, Partial.empty(q.shape), ())
    out, logsum = part.finish()
    out, logsum = checkpoint_name(_ungrouped(out).astype(v_BTKD.dtype), SAVED), checkpoint_name(logsum, SAVED)
    return out, (q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out, logsum)


def _backward(saved, dout_BTHD):
    q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out_BTHD, logsum = saved
    q, dout, out = (_grouped(x, k_BTKD.shape[2]) for x in (q_BTHD, dout_BTHD, out_BTHD))
    kv = _stacked(k_BTKD, v_BTKD)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

    def tile(mask, fixed, kv, dq, dkv):
        q, *rest = fixed
        here = attend_backward(q, *kv, mask, *rest)
        return dq + here[0], dkv + here[1]

    zeros = jnp.zeros(q.shape, jnp.float32), jnp.zeros(kv.shape, jnp.float32)
    dq, dkv = _Ring.of(q, segments_BT, window).go_round(tile, (q, dout, logsum, delta), kv, *zeros)
    dk, dv = dkv.transpose(0, 1, 3, 2, 4)
    return _ungrouped(dq).astype(q.dtype), dk.astype(k_BTKD.dtype), dv.astype(v_BTKD.dtype), None, None


_ring.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Ring:
    """One device's place in the ring, and the queries that stay there."""

    size: int
    rank: jax.Array
    grid: Grid
    queries: Tokens
    window: jax.Array | None

    @classmethod
    def of(cls, q_BKGTD, segments_BT, window) -> "_Ring":
        size, rank, time = local.size(AXIS), local.index(AXIS), segments_BT.shape[1]
        grid = Grid.of(time, 1 if size == 1 else 2, q_BKGTD[..., 0, 0].size)
        return cls(size, rank, grid, Tokens(positions_of(rank, time, size), segments_BT), window)

    def go_round(self, tile: Callable, fixed: Any, kv: jax.Array, resident: Any, cargo: Any) -> tuple[Any, Any]:
        """Take every part's keys and values past the queries here.

        tile(mask, fixed, kv, resident, cargo) -> (resident, cargo), of one block of queries and one of keys: `fixed`
        and `resident` belong to the queries and stay, `cargo` belongs to the keys and ends on the device that they
        come from. The next part is on its way while one is dealt with, and so is the cargo of the last one.
        """
        guest = kv, self.queries.segments
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
        keys = Tokens(positions_of(source, segments.shape[1], self.size), segments)
        cut, put = self.grid.cut, self.grid.put

        def one(n, carry):
            resident, cargo = carry
            i, j = tiles[n]
            asked = self.grid.tokens(self.queries, i, -1), self.grid.tokens(keys, j, LATEST), self.window
            before = cut(resident, i), cut(cargo, j)
            # Only blocks go in and out of the branches, for what does is copied.
            after = jax.lax.cond(
                may_see(*asked), lambda: tile(visible(*asked), cut(fixed, i), cut(kv, j), *before), lambda: before
            )
            return put(resident, after[0], i), put(cargo, after[1], j)

        return jax.lax.fori_loop(0, len(tiles), one, (resident, cargo))

    def _send(self, tree: Any) -> Any:
        """To the next device of the ring."""
        if self.size == 1:
            return tree
        return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % self.size) for i in range(self.size)])


def _grouped(x_BTHD: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, G, T, D]: the queries that share a key head side by side."""
    batch, time, heads, dim = x_BTHD.shape
    return x_BTHD.reshape(batch, time, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTD: jax.Array) -> jax.Array:
    batch, _, _, time, dim = x_BKGTD.shape
    return x_BKGTD.transpose(0, 3, 1, 2, 4).reshape(batch, time, -1, dim)


def _stacked(k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
    """[2, B, K, T, D]: keys and values as one message."""
    return jnp.stack([k_BTKD, v_BTKD]).transpose(0, 1, 3, 2, 4)
