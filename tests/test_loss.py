"""The chunked loss equals the plain one, and costs what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import loss as loss_module
from jaxtune.loss import cross_entropy, token_losses
from jaxtune.ops import Noise, dropout
from jaxtune.tune.low_rank import LowRank

BATCH, TIME, FEATURES, VOCAB = 4, 50, 16, 96


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (BATCH, TIME, FEATURES))
    head = jax.random.normal(keys[1], (VOCAB, FEATURES))
    targets = jax.random.randint(keys[2], (BATCH, TIME), 0, VOCAB)
    weights = (jax.random.uniform(keys[3], (BATCH, TIME)) < 0.4) * 0.01
    return hidden, head, targets, weights


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 16)


def plain(hidden, head, targets, weights):
    logprobs = jax.nn.log_softmax(hidden @ head.T)
    return -jnp.sum(jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0] * weights)


def test_loss_and_gradients_equal_the_plain_ones(inputs):
    hidden, head, targets, weights = inputs
    ours = jax.jit(jax.value_and_grad(lambda h, w: cross_entropy(h, w, targets, weights), argnums=(0, 1)))
    expected = jax.value_and_grad(lambda h, w: plain(h, w, targets, weights), argnums=(0, 1))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours(hidden, head), expected)


def test_without_gradients_the_loss_is_the_same(inputs):
    np.testing.assert_allclose(cross_entropy(*inputs), plain(*inputs), rtol=1e-6)


def test_low_rank_head_gets_the_gradients_of_its_parts_alone(inputs):
    hidden, head, targets, weights = inputs
    a = jax.random.normal(jax.random.key(7), (FEATURES, 3))
    b = jax.random.normal(jax.random.key(8), (3, VOCAB))

    def low(a, b):
        return LowRank(head, a, b, jnp.float32(2.0))

    ours = jax.jit(jax.grad(lambda a, b: cross_entropy(hidden, low(a, b), targets, weights), argnums=(0, 1)))(a, b)
    expected = jax.grad(lambda a, b: plain(hidden, head + 2 * (a @ b).T, targets, weights), argnums=(0, 1))(a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ours, expected)


def test_all_tokens_unsupervised_gives_zero_and_zero_gradients(inputs):
    hidden, head, targets, weights = inputs
    value, grad = jax.value_and_grad(lambda h: cross_entropy(h, head, targets, weights * 0))(hidden)
    assert value == 0 and not grad.any()


def test_every_token_supervised(inputs):
    hidden, head, targets, _ = inputs
    ones = jnp.ones((BATCH, TIME))
    np.testing.assert_allclose(
        cross_entropy(hidden, head, targets, ones), plain(hidden, head, targets, ones), rtol=1e-6
    )


def test_gradient_scales_with_the_cotangent(inputs):
    hidden, head, targets, weights = inputs
    once = jax.grad(lambda h: cross_entropy(h, head, targets, weights))(hidden)
    thrice = jax.grad(lambda h: 3 * cross_entropy(h, head, targets, weights))(hidden)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_huge_logits_do_not_overflow():
    logits = jnp.array([[1e30, 0.0], [-1e30, 0.0]])
    np.testing.assert_allclose(token_losses(logits, jnp.array([0, 1])), [0.0, 0.0])


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_gradient_is_as_exact_for_large_logits_as_for_small_ones(offset):
    logits = np.random.default_rng(0).normal(offset, 1, (4, 1000)).astype(np.float32)
    targets = np.array([0, 1, 500, 999])
    found = jax.grad(lambda x: token_losses(x, targets).sum())(logits)
    wide = logits.astype(np.float64)
    shares = np.exp(wide - wide.max(-1, keepdims=True))
    wanted = shares / shares.sum(-1, keepdims=True) - (np.arange(1000) == targets[:, None])
    np.testing.assert_allclose(found, wanted, atol=5e-7)


def test_a_frozen_head_has_no_weight_gradient_and_the_whole_logits_never_exist(inputs):
    hidden, head, targets, weights = inputs
    grad = jax.jit(jax.grad(lambda h, w: cross_entropy(h, w, targets, weights)))
    compiled = grad.lower(hidden, head).compile().as_text()
    products = set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", compiled))
    # The logits of a chunk or of a part of one, and their gradient.
    sizes = range(2, 17, 2)
    assert products == {f"{size},{width}" for size in sizes for width in (VOCAB, FEATURES)}
    assert f"{BATCH * TIME},{VOCAB}" not in compiled and f"{BATCH},{TIME},{VOCAB}" not in compiled


def test_a_trained_head_has_one_weight_gradient_a_chunk(inputs):
    hidden, head, targets, weights = inputs
    grad = jax.jit(jax.grad(lambda h, w: cross_entropy(h, w, targets, weights), argnums=1))
    products = re.findall(r"f32\[([\d,]+)\]\S* dot\(", grad.lower(hidden, head).compile().as_text())
    assert f"{VOCAB},{FEATURES}" in products or f"{FEATURES},{VOCAB}" in products


def test_dropout_before_a_low_rank_head_reaches_the_adapter_alone(inputs):
    hidden, head, targets, weights = inputs
    key, a, b = (
        Noise(jax.random.key(5), jnp.arange(BATCH * TIME).reshape(BATCH, TIME)),
        jnp.ones((FEATURES, 2)) * 0.1,
        jnp.ones((2, VOCAB)) * jnp.arange(VOCAB) / VOCAB,
    )
    dropped = dropout(hidden, 0.5, key)

    def expected(hidden, dropped, a, b):
        logits = hidden @ head.T + 2 * dropped @ a @ b
        return jnp.sum(token_losses(logits, targets) * weights)

    def ours(hidden, a, b, key):
        return cross_entropy(hidden, LowRank(head, a, b, jnp.float32(2.0), 0.5), targets, weights, key)

    np.testing.assert_allclose(ours(hidden, a, b, key), expected(hidden, dropped, a, b), rtol=1e-6)
    np.testing.assert_allclose(ours(hidden, a, b, None), expected(hidden, hidden, a, b), rtol=1e-6)
    pairs = zip(
        jax.grad(ours, (1, 2))(hidden, a, b, key), jax.grad(expected, (2, 3))(hidden, dropped, a, b), strict=True
    )
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    through = lambda h: expected(h, dropout(h, 0.5, key), a, b)  # noqa: E731
    np.testing.assert_allclose(jax.grad(ours)(hidden, a, b, key), jax.grad(through)(hidden), rtol=1e-4, atol=1e-6)


def test_an_accelerator_takes_more_tokens_at_once_but_no_more_logits_than_fit(monkeypatch, small_chunks):
    monkeypatch.undo()
    assert loss_module.chunk_of(151_936) == 256
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [loss_module.chunk_of(size) for size in (1000, 151_936, 10**7)] == [2048, 768, 256]


@pytest.mark.parametrize(("gigabytes", "tokens"), [(18, 768), (36, 768), (64, 1664), (106, 2048)])
def test_a_device_with_more_memory_takes_more_tokens_at_once(monkeypatch, small_chunks, gigabytes, tokens):
    monkeypatch.undo()
    device = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": gigabytes * 10**9}})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert loss_module.chunk_of(151_936) == tokens


def test_a_chunk_is_cut_by_the_vocabulary_of_the_head(monkeypatch, inputs):
    monkeypatch.setattr(loss_module, "chunk_of", lambda vocab_size: {VOCAB: 40}[vocab_size])
    np.testing.assert_allclose(cross_entropy(*inputs), plain(*inputs), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 16, 17, 25])
def test_any_number_of_supervised_tokens_gives_the_loss_and_its_gradient(inputs, count):
    """The last chunk is of 2, 4, ..., 16 tokens."""
    hidden, head, targets, _ = inputs
    chosen = np.random.default_rng(count).permutation(BATCH * TIME)[:count]
    weights = jnp.zeros(BATCH * TIME).at[chosen].set(1.5).reshape(BATCH, TIME)
    ours, theirs = (
        jax.jit(jax.value_and_grad(loss))(hidden, head, targets, weights) for loss in (cross_entropy, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
