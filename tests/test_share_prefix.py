"""A start that conversations share gives every one of them the loss and the gradients that it has by itself."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import make_config
from jaxtune.data.dataset import Dataset
from jaxtune.data.examples import join
from jaxtune.errors import ConfigError
from jaxtune.parallel.checks import check_windows
from tests.programs import CONFIG, FULL, LORA, VOCAB, Stepper

START, COUNT, TIME, ROWS = 17, 12, 64, 4
PLAIN = {"name": "sgd", "lr": 1.0, "schedule": "constant", "warmup": 0, "clip_norm": None}
METHODS = {
    "full": FULL,
    "lora": {**LORA, "dropout": 0.0, "init": "gaussian"},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4},
    "prefix": {"method": "prefix", "num_virtual_tokens": 4},
}
MESHES = {
    "fsdp, tensor": {"fsdp": 2, "tensor": 2},
    "ring": {"context": 2, "fsdp": 2},
    "ulysses": {"context": 2, "context_attention": "ulysses"},
    "pipe": {"pipe": 2, "fsdp": 2},
}


def examples():
    draw = np.random.default_rng(0)
    start, parts = draw.integers(0, VOCAB, START), []
    for length in draw.integers(4, 20, COUNT):
        tokens = np.concatenate([start, draw.integers(0, VOCAB, length)]).astype(np.int32)
        mask = draw.random(len(tokens)) < 0.5
        mask[: START + 1], mask[-1] = False, True
        parts.append((tokens, mask))
    return join(parts)


def stepped(method: str, share: bool, attention="xla", **sections):
    """What trains after one step on all examples, by name, and the step's loss."""
    stepper = Stepper(CONFIG, tune=METHODS[method], optim=PLAIN, attention=attention, std=0.3, **sections)
    rows, micro = ROWS if share else COUNT, stepper.config.train.micro_batches
    made = Dataset(
        examples(),
        time=TIME,
        batch_size=rows,
        micro_batches=micro,
        packing=share,
        share_prefix=share,
        virtual=stepper.model.virtual_ids,
        epochs=1,
    )
    assert made.steps == 1 and bool(made.shared) == share
    batch = stepper.program.put(made.batch(1).arrays())
    state, metrics = stepper.program.train_step(stepper.state, stepper.frozen, batch, jnp.int32(1))
    return jax.tree.map(np.asarray, state["trainable"]), float(metrics["loss"])


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_packs_that_share_is_the_step_on_rows_of_their_own(method):
    assert_same(stepped(method, True), stepped(method, False))


@pytest.mark.parametrize("mesh", MESHES)
def test_so_it_is_on_a_mesh(mesh):
    train = {"micro_batches": 2} if mesh == "pipe" else {}
    assert_same(stepped("full", True, mesh=MESHES[mesh], train=train), stepped("full", False))


def test_so_it_is_in_tiles(monkeypatch):
    from jaxtune.models import kernels, tiled

    monkeypatch.setattr(tiled, "BLOCK", 16)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    assert_same(stepped("full", True, attention="tiles"), stepped("full", False))


def test_a_window_that_would_hide_the_start_is_refused_and_a_wide_one_is_not():
    config = make_config({"model": {"path": "-"}, "data": {"path": "-", "share_prefix": True, "max_length": 64}})
    with pytest.raises(ConfigError, match=r"data\.share_prefix: .* sees 63 places back.* 64 \(data\.max_length\)"):
        check_windows(config, SimpleNamespace(windows=(None, 63)))
    check_windows(config, SimpleNamespace(windows=(None, 64)))
    check_windows(config, SimpleNamespace(windows=()))
