"""Every way that attention is computed, forward and backward, beside the formula written out plainly."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtune.doctor.check import Check, NotHere
from jaxtune.doctor.machine import require_close
from jaxtune.models import trial
from jaxtune.models.attention import MIN_BLOCK, attention
from jaxtune.models.kernels import NAMES, PLATFORMS
from jaxtune.parallel.context import KINDS, spread_attention
from jaxtune.parallel.zigzag import AXIS, into_zigzag, out_of_zigzag
from jaxtune.segments import PADDING, SHARED

ROWS, HEADS, KV_HEADS, DIM = 2, 8, 2, 16
PARTS = 8  # devices at most that a sequence is split over
SHORT, LONG = 96, 2 * MIN_BLOCK + 32  # tokens: one block of queries, and several; both split into 2 x PARTS
FUSED_DIM = 64  # of a fused kernel's heads, which are real ones' size
TOLERANCE = 1e-4  # matmuls and exponentials of accelerators
ADVICE = "do not train with it on these devices: report it, with this table"
XLA = "a run takes plain XLA by itself where this fails; report it, with this table"
Arrays = list[jax.Array]


def checks() -> list[Check]:
    """One for each way."""
    found = [Check(f"attention, {name}", partial(whole, time), ADVICE) for name, time in WHOLE.items()]
    found += [Check(f"attention, {NAMES[kernel]}", partial(fused, kernel), XLA) for kernel in PLATFORMS.values()]
    return found + [Check(f"attention, {kind}", partial(spread, kind), ADVICE) for kind in KINDS]


WHOLE = {"at once": SHORT, "in blocks": LONG}


def whole(time: int) -> str:
    """One device has the sequence."""
    segments = packed(time)
    return compare(lambda q, k, v: attention(q, k, v, segments, segments), time)


def fused(kernel: str) -> str:
    """One device has the sequence, and a kernel that never has the scores in memory: what a run tries at its start."""
    here = jax.default_backend()
    if PLATFORMS.get(here) != kernel:
        raise NotHere(f"{NAMES[kernel]} is not for a {here}")
    shape, is_splash = (HEADS, KV_HEADS, FUSED_DIM), kernel == "splash"
    largest = trial.trial(kernel, *shape, jnp.bfloat16, share_prefix=not is_splash, one_document=True)
    return f"plain XLA's numbers to {largest:.1e} of the largest, forward and backward, packed and unpacked"


def spread(kind: str) -> str:
    """The sequence is split over devices."""
    parts = 1 << (min(jax.local_device_count(), PARTS).bit_length() - 1)
    if parts == 1:
        raise NotHere("there is one device, and a sequence is split over several")
    mesh = jax.make_mesh((parts,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:parts])
    split = P(None, AXIS)
    own = jax.shard_map(
        partial(spread_attention, kind), mesh=mesh, in_specs=(split,) * 4, out_specs=split, check_vma=False
    )

    def attend(*qkv: jax.Array) -> jax.Array:
        ordered = [into_zigzag(x, parts, 1) for x in (*qkv, packed(LONG))]
        return out_of_zigzag(own(*ordered), parts, 1)

    return f"{compare(attend, LONG)}, on {parts} devices"


def compare(attend: Callable[..., jax.Array], time: int) -> str:
    """The output and the three gradients beside the formula's, on packed sequences.

    attend: (q, k, v) -> output, [rows, time, heads, dim] each.

    Raises:
        Problem: one of them differs.
    """
    plain = partial(formula, segments=packed(time))
    with jax.default_matmul_precision("highest"):
        found, wanted = (with_gradients(function, time) for function in (attend, plain))
    for name, ours, theirs in zip(("the output", "dq", "dk", "dv"), found, wanted, strict=True):
        require_close(name, ours, np.asarray(theirs), TOLERANCE)
    return f"output and gradients of {ROWS} packed rows of {time} tokens are the formula's"


def with_gradients(attend: Callable[..., jax.Array], time: int) -> Arrays:
    """[output, dq, dk, dv] for random queries, keys, values and a random gradient of the output."""
    draw = np.random.default_rng(0)
    shapes = [(ROWS, time, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]

    @jax.jit
    def both(*qkv_dout: jax.Array) -> Arrays:
        out, backward = jax.vjp(attend, *qkv_dout[:3])
        return [out, *backward(qkv_dout[3])]

    return both(*(draw.standard_normal(shape).astype(np.float32) for shape in shapes))


def packed(time: int) -> jax.Array:
    """Segment ids [ROWS, time]: three documents in the first row; a shared start, two and no padding in the second."""
    cuts = [(time // 5, time // 2, time - 7), (time // 3, 2 * time // 3, time)]
    steps = np.arange(time)
    rows = [np.where(steps < end, 1 + (steps >= first) + (steps >= second), PADDING) for first, second, end in cuts]
    rows[1][rows[1] == 1] = SHARED
    return jnp.asarray(np.stack(rows), jnp.int32)


def formula(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, segments: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v under the causal and the segments' mask.

    Padding sees padding, and every document what is shared.
    """
    repeats, time = q_BTHD.shape[2] // k_BTKD.shape[2], q_BTHD.shape[1]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKD, v_BTKD))
    scores = jnp.einsum("bthd,bshd->bhts", q_BTHD, k) / np.sqrt(q_BTHD.shape[-1])
    queries, keys = segments[:, None, :, None], segments[:, None, None, :]
    sees = np.tri(time, dtype=bool) & ((queries == keys) | (keys == SHARED) & (queries != PADDING))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1, where=sees), v)
