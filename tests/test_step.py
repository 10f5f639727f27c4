"""A step is the same however its batch is cut or packed, and a bad one changes nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.config import ModelConfig, Rope
from tests.programs import Stepper

VOCAB, TIME = 256, 48
CONFIG = ModelConfig("qwen2", VOCAB, 32, 64, 2, 4, 2, 8, 256, tied=True, qkv_bias=True, windows=(None, 16))


class Setup:
    """A random model and a plain gradient step on it: the change of the weights is the gradient itself."""

    def __init__(self, section=None, optim=None, seed=0, dtype="float32", model=CONFIG, **precision):
        sections = {"train": {"seed": seed}, "precision": {"compute": dtype, **precision}}
        plain = {"name": "sgd", "lr": 1.0, "schedule": "constant", "warmup": 0, "clip_norm": None}
        stepper = Stepper(model, std=0.3, tune=section or {"method": "full"}, optim=optim or plain, **sections)
        self.model, self.state, self.frozen = stepper.model, stepper.state, stepper.frozen
        self.step, self.eval_step = jax.jit(stepper.program.train_step.__wrapped__), stepper.program.eval_step

    def run(self, batch, step=1):
        return self.step(self.state, self.frozen, batch, jnp.int32(step))


def documents(lengths, seed=0):
    """Random (tokens, supervised) documents."""
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, VOCAB, n), draw.random(n) < 0.5) for n in lengths]


def rows_of(groups, time):
    """A batch of rows, each the documents of one group one after another."""
    names = ("tokens", "targets", "mask", "positions", "segments")
    batch = {name: np.zeros((len(groups), time), np.float32 if name == "mask" else np.int32) for name in names}
    for row, group in enumerate(groups):
        at = 0
        for number, (tokens, supervised) in enumerate(group, 1):
            here, last = slice(at, at + len(tokens)), at + len(tokens) - 1
            batch["tokens"][row, here] = tokens
            batch["targets"][row, at:last] = tokens[1:]
            batch["mask"][row, at:last] = supervised[1:]
            batch["positions"][row, here] = np.arange(len(tokens))
            batch["segments"][row, here] = number
            at += len(tokens)
    return batch


def micro(batch, count):
    return {name: jnp.asarray(x.reshape(count, -1, x.shape[-1])) for name, x in batch.items()}


def assert_same_step(ours, theirs):
    (state, metrics), (expected, expected_metrics) = ours, theirs
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), state["trainable"], expected["trainable"])


@pytest.fixture(scope="module")
def full():
    return Setup()


@pytest.fixture(scope="module")
def whole_batch():
    """Rows with very different numbers of supervised tokens: what a mean of means would get wrong."""
    docs = documents([40, 4, 30, 3])
    return rows_of([[doc] for doc in docs], TIME)


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_give_the_same_step(full, whole_batch, count):
    assert_same_step(full.run(micro(whole_batch, count)), full.run(micro(whole_batch, 1)))


def test_micro_batches_of_a_dynamic_rope_are_all_scaled_by_the_longest(whole_batch):
    stretched = Setup(model=replace(CONFIG, max_positions=8, rope=Rope("dynamic", factor=4.0)))
    cut, whole = (stretched.run(micro(whole_batch, count)) for count in (4, 1))
    assert_same_step(cut, whole)
    losses = [
        stretched.eval_step(stretched.state["trainable"], stretched.frozen, micro(whole_batch, count))
        for count in (4, 1)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_packed_rows_give_the_same_step_as_rows_of_their_own(full):
    docs = documents([20, 15, 13, 30, 18])
    packed = rows_of([docs[:3], docs[3:]], TIME)
    alone = rows_of([[doc] for doc in docs], 32)
    assert_same_step(full.run(micro(packed, 1)), full.run(micro(alone, 1)))


def test_padding_rows_change_nothing(full, whole_batch):
    longer = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in whole_batch.items()}
    assert_same_step(full.run(micro(longer, 1)), full.run(micro(whole_batch, 1)))


def test_several_stacks_are_the_same_model(whole_batch):
    section = {"method": "freeze", "freeze_first": 1}
    split = Setup(section)
    assert len(split.model.stacks) == 2
    one = Setup()
    ours, theirs = (s.eval_step(s.state["trainable"], s.frozen, micro(whole_batch, 1)) for s in (split, one))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_evaluation_is_the_loss_without_dropout(whole_batch):
    lora = Setup({"method": "lora", "rank": 4, "dropout": 0.5, "targets": "all-linear", "init": "gaussian"})
    total, number = lora.eval_step(lora.state["trainable"], lora.frozen, micro(whole_batch, 2))
    plain = Setup()
    _, metrics = plain.run(micro(whole_batch, 1))
    np.testing.assert_allclose(total / number, metrics["loss"], rtol=1e-5)  # B is zero: no adapter yet


def with_noise(setup):
    """B away from zero, so that dropout has something to do."""
    state = jax.tree.map(lambda x: x + 0.1 if x.dtype == jnp.float32 else x, setup.state)
    return lambda batch, step: setup.step(state, setup.frozen, batch, jnp.int32(step))[1]["loss"]


def test_dropout_depends_on_step_and_seed_alone(whole_batch):
    section = {"method": "lora", "rank": 4, "dropout": 0.5, "targets": "all-linear"}
    batch = micro(whole_batch, 1)
    first, again, other_seed = (with_noise(Setup(section, seed=seed)) for seed in (0, 0, 1))
    assert first(batch, 3) == again(batch, 3)
    assert len({float(first(batch, 3)), float(first(batch, 4)), float(other_seed(batch, 3))}) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_a_step_that_is_not_finite_changes_no_bit_and_is_counted(whole_batch, optimizer):
    setup = Setup(optim={"name": optimizer, "lr": 0.1})
    state, _ = setup.run(micro(whole_batch, 1))
    poisoned = micro({**whole_batch, "mask": np.where(whole_batch["mask"] > 0, np.inf, 0).astype(np.float32)}, 1)
    after, metrics = setup.step(state, setup.frozen, poisoned, jnp.int32(2))
    for name in ("trainable", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    assert (int(metrics["bad_in_a_row"]), int(metrics["skipped"])) == (1, 1)
    after, metrics = setup.step(after, setup.frozen, micro(whole_batch, 1), jnp.int32(3))
    assert (int(metrics["bad_in_a_row"]), int(metrics["skipped"])) == (0, 1)
    assert not np.array_equal(after["trainable"]["norm"]["weight"], state["trainable"]["norm"]["weight"])


def test_bfloat16_compute_is_close_and_leaves_float32_weights(whole_batch):
    narrow = Setup(dtype="bfloat16")
    state, metrics = narrow.run(micro(whole_batch, 1))
    _, wide = Setup().run(micro(whole_batch, 1))
    np.testing.assert_allclose(metrics["loss"], wide["loss"], rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(state["trainable"])} == {jnp.dtype("float32")}


def test_frozen_layers_below_the_first_trained_one_have_no_backward_pass(whole_batch):

    def matmuls(pattern):
        setup = Setup({"method": "freeze", "train_patterns": [pattern]})
        lowered = setup.step.lower(setup.state, setup.frozen, micro(whole_batch, 1), jnp.int32(1))
        return lowered.compile().as_text().count(" dot(")

    assert matmuls(r"layers\.1\.") < matmuls(r"layers\.0\.")
