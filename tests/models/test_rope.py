"""The frequencies and the rotation are those of transformers' rotary embedding classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxtune.models.config import Rope
from jaxtune.models.rope import attention_factor, cos_sin, frequencies, rotate

HEAD_DIM, MAX = 16, 128
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What a config says in rope_parameters, and the Rope that says the same.
CASES = {
    "default": ({"rope_type": "default"}, Rope()),
    "linear": ({"rope_type": "linear", "factor": 2.5}, Rope("linear", factor=2.5)),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, Rope("dynamic", factor=3.0)),
    "yarn": (YARN, Rope("yarn", factor=4.0, original_max_positions=32)),
    "yarn, not truncated": (
        YARN | {"truncate": False},
        Rope("yarn", factor=4.0, original_max_positions=32, truncate=False),
    ),
    "yarn, own betas": (
        YARN | {"beta_fast": 8, "beta_slow": 2},
        Rope("yarn", factor=4.0, original_max_positions=32, beta_fast=8, beta_slow=2),
    ),
    "yarn, attention factor": (
        YARN | {"attention_factor": 1.5},
        Rope("yarn", factor=4.0, original_max_positions=32, attention_factor=1.5),
    ),
    "yarn, mscale": (
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
        Rope("yarn", factor=4.0, original_max_positions=32, mscale=0.7, mscale_all_dim=1.1),
    ),
    "llama3": (
        LLAMA3 | {"original_max_position_embeddings": 64},
        Rope("llama3", factor=8.0, original_max_positions=64),
    ),
    "llama3, wide blend": (
        LLAMA3 | {"original_max_position_embeddings": 100, "low_freq_factor": 0.5, "high_freq_factor": 16.0},
        Rope("llama3", factor=8.0, original_max_positions=100, low_freq_factor=0.5, high_freq_factor=16.0),
    ),
}


def peer(parameters: dict, head_dim: int = HEAD_DIM) -> LlamaRotaryEmbedding:
    parameters = {"rope_theta": 10000.0, **parameters}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=MAX, rope_parameters=parameters
        )
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 128])
def test_frequencies_are_those_of_transformers(name, theta, head_dim):
    parameters, rope = CASES[name]
    rotary = peer(parameters | {"rope_theta": theta}, head_dim)
    rope = Rope(**{**vars(rope), "theta": theta})
    inverse, scale = frequencies(rope, head_dim, MAX)
    np.testing.assert_allclose(inverse, rotary.inv_freq.numpy(), rtol=5e-7)
    assert scale == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert inverse.dtype == np.float32


def test_every_kind_differs_from_the_default():
    plain = frequencies(Rope(), HEAD_DIM, MAX)[0]
    for name, (_, rope) in CASES.items():
        changed = frequencies(rope, HEAD_DIM, MAX, 4 * MAX)
        assert name == "default" or not np.allclose(changed[0], plain) or changed[1] != 1.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [8, MAX, MAX + 1, 5 * MAX])
def test_cos_and_sin_are_those_of_transformers_at_any_length(name, length):
    parameters, rope = CASES[name]
    positions = np.stack([np.arange(length), np.maximum(np.arange(length) - 3, 0)])
    cos, sin = jax.jit(lambda p: cos_sin(rope, HEAD_DIM, MAX, p))(jnp.asarray(positions))
    want_cos, want_sin = peer(parameters)(torch.zeros(1), torch.from_numpy(positions))
    np.testing.assert_allclose(cos, want_cos[..., : HEAD_DIM // 2].numpy(), atol=3e-4)
    np.testing.assert_allclose(sin, want_sin[..., : HEAD_DIM // 2].numpy(), atol=3e-4)
    assert cos.dtype == sin.dtype == jnp.float32


def test_dynamic_stretches_by_the_largest_position_and_not_by_padding():
    rope = Rope("dynamic", factor=3.0)
    positions = np.zeros((1, 4 * MAX), np.int32)
    positions[0, : MAX + 9] = np.arange(MAX + 9)
    cos, _ = cos_sin(rope, HEAD_DIM, MAX, jnp.asarray(positions))
    inverse, _ = frequencies(rope, HEAD_DIM, MAX, MAX + 9)
    np.testing.assert_allclose(cos[0, MAX], np.cos(MAX * inverse), atol=1e-4)


def test_dynamic_is_the_plain_rope_up_to_the_models_own_length():
    for length in (1, MAX):
        inverse, _ = frequencies(Rope("dynamic", factor=3.0), HEAD_DIM, MAX, length)
        np.testing.assert_allclose(inverse, frequencies(Rope(), HEAD_DIM, MAX)[0], rtol=1e-6)


def test_dynamic_needs_no_new_compilation_for_a_longer_sequence():
    traced = jax.jit(lambda n: frequencies(Rope("dynamic", factor=3.0), HEAD_DIM, MAX, n)[0])
    for length in (5, MAX + 40):
        want = frequencies(Rope("dynamic", factor=3.0), HEAD_DIM, MAX, length)[0]
        np.testing.assert_allclose(traced(length), want, rtol=2e-6)
    assert traced._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_is_that_of_transformers(dtype):
    time, heads = 9, 3
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, time, heads, HEAD_DIM)), dtype)
    positions = np.stack([np.arange(time), np.arange(time)[::-1]])
    turned = rotate(x, *cos_sin(Rope(), HEAD_DIM, MAX, jnp.asarray(positions)))
    torch_x = torch.tensor(np.asarray(x, np.float32)).transpose(1, 2)
    cos, sin = peer({"rope_type": "default"})(torch_x, torch.tensor(positions.copy()))
    want = apply_rotary_pos_emb(torch_x, torch_x, cos, sin)[0].transpose(1, 2).numpy()
    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(np.asarray(turned, np.float32), want, atol=tolerance, rtol=tolerance)
    assert turned.dtype == dtype


def test_positions_past_bfloat16_stay_apart_when_the_activations_are_bfloat16():
    x = jnp.ones((1, 2, 1, HEAD_DIM), jnp.bfloat16)
    cos, sin = cos_sin(Rope(), HEAD_DIM, MAX, jnp.asarray([[4096, 4097]], jnp.int32))
    first, second = np.asarray(rotate(x, cos, sin), np.float32)[0]
    assert np.abs(first - second).max() > 0.1


def test_rotation_keeps_lengths_and_depends_on_distances_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, HEAD_DIM)), jnp.float32) for _ in range(2))
    turn = lambda x, p: rotate(x, *cos_sin(Rope(), HEAD_DIM, MAX, jnp.asarray([[p]])))  # noqa: E731
    np.testing.assert_allclose(jnp.linalg.norm(turn(q, 77)), jnp.linalg.norm(q), rtol=1e-6)
    near, far = (jnp.vdot(turn(q, p + 5), turn(k, p)) for p in (0, 90))
    np.testing.assert_allclose(near, far, rtol=1e-4)


def test_yarns_attention_factor_grows_with_the_stretch():
    assert attention_factor(Rope("yarn", factor=1.0)) == 1.0
    assert attention_factor(Rope("yarn", factor=4.0)) == pytest.approx(0.1 * np.log(4) + 1)
    assert attention_factor(Rope("yarn", factor=4.0, attention_factor=0.5)) == 0.5
