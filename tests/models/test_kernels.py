"""Fused attention computes what plain XLA does, is chosen where it can be, and says why where not.

No GPU or TPU is here: the same calls run by other means on a CPU, and are lowered for the platforms that they are for.
"""

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.attention_kernel import choose
from jaxtune.errors import ConfigError
from jaxtune.models import kernels
from jaxtune.models.attention import attention
from jaxtune.models.kernels import CUDNN_MULTIPLE, cudnn_attention, keeps, policy, splash_attention
from jaxtune.segments import SHARED
from tests.programs import CONFIG, FULL, ROWS, TIME, Stepper

B, H, K, D = 2, 4, 2, 16
ON_CPU = {
    "cudnn": partial(cudnn_attention, implementation="xla"),
    "splash": partial(splash_attention, interpret=True),
}
FORWARD, BACKWARD = "@__cudnn$fmhaScaleBiasSoftmax(", "@__cudnn$fmhaScaleBiasSoftmaxBackward("


@pytest.fixture
def cudnn_is_found(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100)


def packed(time, start=0):
    """Three documents and padding; and two that fill the row. start: tokens that they share."""
    steps = np.arange(time)
    first = np.where(steps < time - 5, 1 + (steps >= 9) + (steps >= time // 2), 0)
    segments = np.stack([first, 1 + (steps >= time // 3)])
    return np.where(steps < start, SHARED, segments).astype(np.int32)


def with_gradients(attend, time, window=None, start=0):
    draw = np.random.default_rng(0)
    q, k, v, dout = (draw.standard_normal((B, time, heads, D)).astype(np.float32) for heads in (H, K, K, H))
    segments, more = packed(time, start), () if window is None else (window,)

    @jax.jit
    def both(q, k, v, dout):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments, *more), q, k, v)
        return out, *backward(dout)

    return both(q, k, v, dout)


def plain(q, k, v, segments, window=None):
    return attention(q, k, v, segments, segments, window=window)


# An odd number of tokens, which cuDNN pads; for splash, more than one tile's multiple; heads are 4 to 2 in both.
@pytest.mark.parametrize(("kernel", "time", "window"), [("cudnn", 33, None), ("cudnn", 33, 4), ("splash", 140, None)])
def test_a_kernel_gives_what_plain_attention_gives_forward_and_backward_on_packed_rows(kernel, time, window):
    found, wanted = with_gradients(ON_CPU[kernel], time, window), with_gradients(plain, time, window)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_cudnn_takes_no_mask_where_no_row_has_two_documents(cudnn_is_found):
    """Rows of one document with padding behind it: what real tokens give and are given does not change."""
    draw, lengths = np.random.default_rng(0), (33, 20)
    q, k, v, dout = (draw.standard_normal((B, 33, heads, D)).astype(np.float32) for heads in (H, K, K, H))
    segments = (np.arange(33) < np.array(lengths)[:, None]).astype(np.int32)
    real = segments[..., None, None]

    def results(attend):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out * real, *backward(dout * real)

    for ours, theirs in zip(results(partial(ON_CPU["cudnn"], one_document=True)), results(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    masks = r"tensor<\d+x1x\d+x\d+xbf16>"
    assert re.search(masks, lowered("cudnn", "cuda", NAMES))
    assert not re.search(masks, lowered("cudnn", "cuda", NAMES, one_document=True))


def test_cudnn_lets_documents_see_the_start_that_they_share():
    found, wanted = (with_gradients(attend, 33, start=7) for attend in (ON_CPU["cudnn"], plain))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def lowered(kernel, platform, names, time=256, **more):
    """The text of two layers' gradient, of which `names` are kept. time: tokens."""

    def layer(x_BTE, _):
        heads = lambda n: x_BTE[..., : n * D].reshape(*x_BTE.shape[:2], n, D)  # noqa: E731
        q, k, v = (
            jax.ad_checkpoint.checkpoint_name(heads(n), name) for n, name in ((H, "query"), (K, "key"), (K, "value"))
        )
        out = kernels.attend(kernel, q, k, v, jnp.ones(x_BTE.shape[:2], jnp.int32), **more)
        return x_BTE + out.reshape(x_BTE.shape), None

    def loss(x_BTE):
        kept = jax.checkpoint(layer, policy=policy(kernel, names))
        return jax.lax.scan(kept, x_BTE, None, length=2)[0].astype(jnp.float32).sum()

    shape = jax.ShapeDtypeStruct((B, time, H * D), jnp.bfloat16)
    return jax.jit(jax.grad(loss)).trace(shape).lower(lowering_platforms=(platform,)).as_text()


NAMES = ("query", "key", "value")


def test_cudnn_is_called_once_forward_and_once_backward_where_its_results_are_kept(cudnn_is_found):
    text = lowered("cudnn", "cuda", keeps("cudnn", NAMES))
    assert (text.count(FORWARD), text.count(BACKWARD)) == (1, 1)
    assert text.count(r"mask_type\22: \22CAUSAL") == 2  # else the whole square would be computed
    again = lowered("cudnn", "cuda", NAMES)
    assert (again.count(FORWARD), again.count(BACKWARD)) == (2, 1)


def test_splash_is_called_once_forward_and_twice_backward_where_its_results_are_kept():
    calls = [lowered("splash", "tpu", names).count("@tpu_custom_call(") for names in (keeps("splash", NAMES), NAMES)]
    assert calls == [3, 4]  # keys' and values' gradients are one kernel, queries' another


def test_plain_attention_keeps_the_names_that_were_asked_for():
    assert keeps("xla", NAMES) == NAMES


def test_a_step_on_a_mesh_calls_cudnn_for_each_devices_own_rows_and_heads(cudnn_is_found):
    mesh, precision = {"fsdp": 4, "tensor": 2}, {"compute": "bfloat16"}
    step = Stepper(attention="cudnn", mesh=mesh, tune=FULL, precision=precision)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), step.batch(1))
    traced = step.program.train_step.trace(step.state, step.frozen, shapes, jnp.int32(1))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    [line] = [line for line in text.splitlines() if FORWARD in line]
    time = -(-TIME // CUDNN_MULTIPLE) * CUDNN_MULTIPLE
    assert f"tensor<{ROWS // 4}x{time}x{CONFIG.num_heads // 2}x{CONFIG.head_dim}xbf16>" in line and BACKWARD in text


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxtune.models.kernels import attend
from jaxtune.plan.target import quiet
with quiet():
    home = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
q, k, v = (jax.ShapeDtypeStruct((2, 200, heads, 64), jnp.bfloat16, sharding=home) for heads in (4, 2, 2))
segments = jax.ShapeDtypeStruct((2, 200), jnp.int32, sharding=home)
loss = lambda q, k, v, segments: attend("splash", q, k, v, segments).astype(jnp.float32).sum()
jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, segments).compile()
print("compiled")
"""


def test_splash_compiles_for_a_tpu_with_heads_of_64(libtpu):
    env = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **libtpu}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, timeout=600)
    assert done.stdout == "compiled\n", done.stderr


def chosen(asked="auto", dtype="bfloat16", platform="gpu", ring=1, share_prefix=False, **model):
    return choose(asked, replace(CONFIG, **{"head_dim": 64, **model}), dtype, platform, ring, share_prefix)


def test_auto_takes_the_platforms_kernel():
    assert chosen() == ("cudnn", None)
    assert chosen(platform="tpu", dtype="float32") == ("splash", None)
    assert chosen(platform="cpu", dtype="float32") == ("tiles", None)
    assert chosen("xla") == ("xla", None)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": "float32"}, "precision.compute is float32"),
        ({"head_dim": 60}, "the model's have 60"),
        ({"head_dim": 512}, "the model's have 512"),
        ({"ring": 2}, "mesh.context splits the sequences"),
        ({"platform": "tpu", "windows": (None, 32, None, 32)}, "sliding windows"),
        ({"platform": "tpu", "share_prefix": True}, "data.share_prefix"),
    ],
)
def test_auto_takes_plain_xla_and_says_why_and_a_name_is_refused_with_the_same_words(asked, reason):
    kernel, why = chosen(**asked)
    assert kernel == "xla" and reason in why
    name = "splash" if asked.get("platform") == "tpu" else "cudnn"
    with pytest.raises(
        ConfigError, match=rf"memory\.attention: {name}: .*{reason}.*; set memory\.attention to auto or xla"
    ):
        chosen(name, **asked)


def test_a_shared_start_is_no_obstacle_to_cudnn_and_tiles():
    assert chosen(share_prefix=True) == ("cudnn", None)
    assert chosen(platform="cpu", dtype="float32", share_prefix=True) == ("tiles", None)


def test_a_window_is_no_obstacle_to_cudnn_and_another_platform_is_one():
    assert chosen(windows=(32, None, 32, None)) == ("cudnn", None)
    with pytest.raises(ConfigError, match="cuDNN is for NVIDIA GPUs, and this is a cpu"):
        chosen("cudnn", platform="cpu")
