"""Attention of whole sequences by platform: tiles on a CPU, cuDNN on an NVIDIA GPU, splash on a TPU; which a run takes.

The scores never exist in the device's memory. What is computed is what `jaxtune.models.attention` computes; that it is
so on the devices at hand, models/trial.py looks at before a run.

Legend: B batch, T time, H query heads, K key/value heads, G = H / K, D head size.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.attention import attention, visible
from jaxtune.models.config import ModelConfig
from jaxtune.models.tiled import BLOCK, SAVED, padded, tiled_attention

NAMES = {"xla": "plain XLA", "tiles": "XLA in tiles", "cudnn": "cuDNN", "splash": "splash"}
PLATFORMS = {"cpu": "tiles", "gpu": "cudnn", "tpu": "splash"}  # jax's name of the platform -> its kernel
OWNERS = {"tiles": "CPUs", "cudnn": "NVIDIA GPUs", "splash": "TPUs"}
CUDNN_DIM = 256  # the largest head; before Hopper 128, which cuDNN says itself when it is tried
CUDNN_MULTIPLE = 128  # of T where there is a mask: at 64 more, low scores give its backward pass nan (trl issue 7181)
SPLASH_BLOCK = 512  # tokens of a tile at most
LANES = 128  # of a TPU: T comes in multiples of it


def attend(
    kernel: str,
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    window: jax.Array | int | None = None,
    one_document: bool = False,
) -> jax.Array:
    """`attention` of a whole sequence by the kernel xla, tiles, cudnn or splash: [B, T, H, D].

    one_document: no row has two, and padding stands behind them: what padding is given does not matter then.
    For the backward pass, `policy` tells what has to be kept that the forward kernel is not run again.
    """
    if kernel == "cudnn":
        return cudnn_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, window, one_document)
    if kernel == "splash":
        assert window is None, "no splash where a layer has a window: obstacle says so"
        return splash_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT)
    if kernel == "tiles" and q_BTHD.shape[1] > BLOCK:
        return tiled_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, window)
    return checkpoint_name(attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, segments_BT, window=window), SAVED)


def cudnn_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    window: jax.Array | int | None = None,
    one_document: bool = False,
    implementation: str = "cudnn",
) -> jax.Array:
    """Segments and window go in as a mask [B, 1, T, T], which all heads share; that it is causal is said besides, for
    then nothing above the diagonal is computed. With one document a row and no window there is no mask,
    whose reading takes a third of the time.

    implementation: of jax.nn.dot_product_attention; `xla` computes the same call anywhere.
    """
    time, has_mask = q_BTHD.shape[1], not one_document or window is not None
    multiple = CUDNN_MULTIPLE if has_mask else 2
    q, k, v, segments = (padded(x, multiple) for x in (q_BTHD, k_BTKD, v_BTKD, segments_BT))
    mask = visible(segments, segments, 0, window)[:, None] if has_mask else None
    # cuDNN's own packing of sequences, in place of a mask, gives nan where a row has several segments.
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
    return out[:, :time]


def splash_attention(
    q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """Tiles above the diagonal are skipped; one of which every key is of another segment is not.

    interpret: run the kernel as plain operations, anywhere.
    """
    time, kv_heads = q_BTHD.shape[1], k_BTKD.shape[2]
    multiple = min(SPLASH_BLOCK, _up(time, LANES))
    q, k, v, segments = (padded(x, multiple) for x in (q_BTHD, k_BTKD, v_BTKD, segments_BT))
    q = q * (1.0 / math.sqrt(q.shape[-1]))  # the kernel has no scale of its own
    q_BKGTD = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    k_BKTD, v_BKTD = (x.transpose(0, 2, 1, 3) for x in (k, v))
    heads = jax.vmap(_splash(q_BKGTD.shape[2], segments.shape[1], multiple, interpret), in_axes=(0, 0, 0, None))
    out_BKGTD = jax.vmap(heads)(q_BKGTD, k_BKTD, v_BKTD, segments)
    return out_BKGTD.transpose(0, 3, 1, 2, 4).reshape(*q.shape)[:, :time]


def _splash(group: int, time: int, block: int, interpret: bool) -> Callable[..., jax.Array]:
    """Of the query heads that share a key head: ([G, T, D], [T, D], [T, D], segments [T]) -> [G, T, D]."""
    # Pallas takes a second to import, and is for those who have a TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sides = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash.make_splash_mqa(
        masks.MultiHeadMask([masks.CausalMask((time, time))] * group),
        block_sizes=splash.BlockSizes(**dict.fromkeys(sides, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    return lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def keeps(kernel: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """What a layer keeps for its backward pass where `names` were asked for: with a kernel, also what it has made.

    The backward kernel needs the output and the log-sum of each row. jax.checkpoint would run the whole forward kernel
    again for them, whose output is the size of the queries. Plain XLA's blocks make their scores again in any case.
    """
    return names if kernel == "xla" else tuple(dict.fromkeys((*names, SAVED)))


def policy(kernel: str, names: tuple[str, ...]) -> Any:
    """jax.checkpoint's policy that keeps these names."""
    policies = jax.checkpoint_policies
    if kernel != "cudnn" or SAVED not in names:
        return policies.save_only_these_names(*names)
    # cuDNN's call has no names for its two results, so they are known by the primitive that makes them.
    own = lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd")  # noqa: E731
    return policies.save_from_both_policies(policies.save_only_these_names(*names), own)


def obstacle(
    kernel: str, config: ModelConfig, dtype: Any, platform: str, ring: int, share_prefix: bool = False
) -> str | None:
    """Why a kernel cannot be taken, or None. dtype: of computing. ring: devices that a sequence goes round."""
    dtype = jnp.dtype(dtype)
    if kernel == "xla":
        return None
    if PLATFORMS.get(platform) != kernel:
        return f"{NAMES[kernel]} is for {OWNERS[kernel]}, and this is a {platform}"
    if ring > 1:
        return "mesh.context splits the sequences, and the ring has its own tiles; context_attention: ulysses takes it"
    if kernel == "splash" and any(config.windows):
        return "splash knows no window that differs between layers, and the model has sliding windows"
    if kernel == "splash" and share_prefix:
        return "splash has no mask for data.share_prefix, by which a token sees two segments"
    if kernel == "cudnn" and dtype.name not in ("bfloat16", "float16"):
        return f"cuDNN computes in bfloat16 or float16, and precision.compute is {dtype.name}"
    if kernel == "cudnn" and (config.head_dim % 8 or config.head_dim > CUDNN_DIM):
        return f"cuDNN takes heads of a multiple of 8 up to {CUDNN_DIM}, and the model's have {config.head_dim}"
    return None
