"""The loss scale moves as torch's, overflowed steps leave no trace but in the counters, and a run goes on from it."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import loss_scale, train
from jaxtune.config import PrecisionSection, make_config
from jaxtune.errors import ConfigError, TrainingStopped
from jaxtune.loss_scale import advance, init, unscaled
from tests.runs import sections, stopped_after
from tests.test_step import Setup, documents, micro, rows_of

WINDOW = 4


def walk(initial, window, finite):
    """The scale after each step."""
    guard, scales, step = init(initial), [], jax.jit(advance, static_argnums=2)
    for good in finite:
        guard = step(guard, jnp.bool_(good), window)
        scales.append(float(guard["loss_scale"]))
    return scales, guard


def overflows(seed, count=60, share=0.3):
    draw = random.Random(seed)
    return [draw.random() > share for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_the_scale_is_that_of_torchs_gradscaler(seed):
    """High enough that the floor, which torch has not, is never reached."""
    torch = pytest.importorskip("torch")
    finite = overflows(seed)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=WINDOW)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = []
    for good in finite:
        optimizer.zero_grad()
        scaler.scale(weight * (1.0 if good else float("inf"))).backward()
        scaler.step(optimizer)
        scaler.update()
        theirs.append(scaler.get_scale())
    assert walk(2.0**40, WINDOW, finite)[0] == theirs


class Model:
    """What loss_scale.py promises, one sentence a line."""

    def __init__(self, scale):
        self.scale, self.good, self.bad, self.skipped = scale, 0, 0, 0

    def step(self, finite):
        if finite:
            self.bad, self.good = 0, self.good + 1
            if self.good == WINDOW:
                self.scale, self.good = self.scale * 2, 0
        else:
            self.bad += self.scale <= 1
            self.scale, self.good, self.skipped = max(self.scale / 2, 1.0), 0, self.skipped + 1

    def guard(self):
        return {
            "bad_in_a_row": self.bad,
            "skipped": self.skipped,
            "loss_scale": self.scale,
            "good_steps": self.good,
        }


@pytest.mark.parametrize("seed", range(6))
def test_every_sequence_of_overflows_ends_as_a_small_model_says(seed):
    step, draw = jax.jit(advance, static_argnums=2), random.Random(seed)
    guard, model = init(8.0), Model(8.0)
    for finite in overflows(seed, 80, draw.choice([0.05, 0.4, 0.8])):
        guard = step(guard, jnp.bool_(finite), WINDOW)
        model.step(finite)
        assert {name: value.item() for name, value in guard.items()} == model.guard()


def test_a_scale_that_would_be_infinite_stays():
    assert walk(2.0**127, 1, [True, True])[0] == [2.0**127, 2.0**127]


def test_without_scaling_the_scale_stays_and_every_bad_step_counts():
    scales, guard = walk(512.0, None, [True, False, False])
    assert scales == [512.0] * 3
    assert (int(guard["bad_in_a_row"]), int(guard["skipped"]), int(guard["good_steps"])) == (2, 2, 0)


def test_narrow_gradients_are_divided_in_float32():
    loss, grads = unscaled(jnp.float32(8), {"x": jnp.float16([6e-8, 2.0]), "y": None}, jnp.float32(65536))
    assert float(loss) == 8 / 65536 and grads["x"].dtype == jnp.float32
    np.testing.assert_array_equal(grads["x"], np.float32(np.float16([6e-8, 2.0])) / 65536)


ADAMW = {"name": "adamw", "lr": 1e-3, "clip_norm": None}


@pytest.fixture(scope="module")
def batch():
    return rows_of([[doc] for doc in documents([40, 4, 30, 3])], 48)


@pytest.fixture(scope="module")
def scaled():
    return Setup(optim=ADAMW, dtype="float16", loss_scale={"initial": 1024.0, "window": WINDOW})


def test_a_scaled_step_is_the_step_and_its_numbers_are_not_scaled(scaled, batch):
    wide = Setup(optim=ADAMW)
    (state, metrics), (expected, wide_metrics) = (setup.run(micro(batch, 2)) for setup in (scaled, wide))
    np.testing.assert_allclose(metrics["loss"], wide_metrics["loss"], rtol=2e-3)
    np.testing.assert_allclose(metrics["grad_norm"], wide_metrics["grad_norm"], rtol=2e-2)
    assert float(metrics["loss_scale"]) == 1024.0 and int(metrics["good_steps"]) == 1
    assert {x.dtype for x in jax.tree.leaves(state["trainable"])} == {jnp.dtype("float32")}
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), state["trainable"], wide.state["trainable"])
    wanted = jax.tree.map(lambda new, old: np.asarray(new - old), expected["trainable"], wide.state["trainable"])
    agree = [np.sign(a) == np.sign(b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True)]
    assert np.mean(np.concatenate([x.ravel() for x in agree])) > 0.98  # Adam's first step is the gradient's sign


def test_small_gradients_survive_that_float16_alone_would_lose(scaled, batch):
    """The loss over 2^24 times as many tokens: every gradient of a layer is then below float16's least number."""

    def gate_norm(scale):
        """Of the first moment, which a first step has from the gradient alone."""
        state = {**scaled.state, "guard": {**scaled.state["guard"], "loss_scale": jnp.float32(scale)}}
        after, metrics = scaled.step(state, scaled.frozen, micro(batch, 2), jnp.int32(1))
        moment = after["optimizer"][0].mu["stacks"]["0"]["mlp"]["gate_proj"]["weight"]
        return float(jnp.linalg.norm(moment)), metrics["loss"]

    (lost, loss), (kept, same) = gate_norm(2.0**-24), gate_norm(1024.0)
    assert lost == 0 < kept
    np.testing.assert_allclose(loss, same, rtol=1e-6)


def test_overflows_at_given_steps_change_nothing_and_training_recovers(scaled, batch):
    """The scale is set so high before steps 2 and 3 that they overflow."""
    state, metrics = scaled.run(micro(batch, 1))
    before = jax.tree.map(np.asarray, state)
    state["guard"]["loss_scale"] = jnp.float32(2.0**40)
    for step in (2, 3):
        state, metrics = scaled.step(state, scaled.frozen, micro(batch, 1), jnp.int32(step))
        for name in ("trainable", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, state[name], before[name])
    assert float(metrics["loss_scale"]) == 2.0**38
    assert (int(metrics["skipped"]), int(metrics["bad_in_a_row"]), int(metrics["good_steps"])) == (2, 0, 0)
    for step in range(4, 40):
        state, metrics = scaled.step(state, scaled.frozen, micro(batch, 1), jnp.int32(step))
        if np.isfinite(metrics["grad_norm"]):
            break
    assert int(metrics["good_steps"]) == 1 and 2.0**10 < float(metrics["loss_scale"]) < 2.0**35
    assert not np.array_equal(state["trainable"]["norm"]["weight"], before["trainable"]["norm"]["weight"])


def config(model, home, **precision):
    tree = sections(model, home, steps=8, tune={"method": "full"}, precision={"compute": "float16", **precision})
    return make_config({**tree, "optim": {"lr": 1e-3, "schedule": "constant", "warmup": 0}})


def ledger(home):
    return [json.loads(line) for line in (home / "run" / "ledger.jsonl").read_text().splitlines()]


def test_a_float16_run_finds_its_scale_and_goes_on_from_it(tiny_model, tmp_path, capsys):
    """Its first scale overflows float32 itself, so the first steps are skipped; then it trains."""
    model, scale = tiny_model("qwen2"), {"initial": 2.0**100, "window": 2}
    whole = train(config(model, tmp_path / "whole", loss_scale={"initial": 2.0**19, "window": 3}))
    assert all(row["loss_scale"] >= 1 for row in whole)
    assert whole[-1]["loss"] < whole[0]["loss"]
    with pytest.raises(SystemExit):
        stopped_after(4, config(model, tmp_path / "cut", loss_scale={"initial": 2.0**19, "window": 3}))
    train(config(model, tmp_path / "cut", loss_scale={"initial": 2.0**19, "window": 3}))
    assert ledger(tmp_path / "cut") == ledger(tmp_path / "whole")
    assert "was applied" not in capsys.readouterr().out
    lost = train(config(model, tmp_path / "lost", loss_scale=scale))
    assert [row["bad_steps"] for row in lost] == list(range(1, 9))
    assert [row["loss_scale"] for row in lost] == [2.0 ** (99 - i) for i in range(8)]
    assert "none of the 8 steps was applied (8 skipped)" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_goes_on_in_float16_or_with_another_first_scale_begins_with_that(tiny_model, tmp_path):
    def scales(steps, **precision):
        tree = sections(tiny_model("qwen2"), tmp_path, steps=steps, precision=precision)
        return [row.get("loss_scale") for row in train(tree)]

    scales(2)
    assert scales(4, compute="float16", loss_scale={"initial": 1024, "window": 3})[2:] == [1024, 1024]
    assert scales(6, compute="float16", loss_scale={"initial": 256, "window": 3})[4:] == [256, 256]


def test_a_run_that_overflows_at_scale_one_is_stopped_with_what_to_do(tiny_model, tmp_path, monkeypatch):
    settings = config(tiny_model("qwen2"), tmp_path, loss_scale={"initial": 4.0})
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"max_bad_steps": 2})})
    monkeypatch.setattr(loss_scale, "unscaled", lambda loss, grads, scale: (loss * jnp.nan, grads))
    with pytest.raises(TrainingStopped, match=r"2 steps in a row.*Set precision\.compute to bfloat16"):
        train(settings)
    assert len(ledger(tmp_path)) == 4  # from 4 to 2, to 1, and twice at 1


def test_a_scale_without_float16_and_float16_weights_are_refused():
    with pytest.raises(ValueError, match="loss_scale belongs to compute float16"):
        PrecisionSection(compute="bfloat16", loss_scale={"initial": 2.0})
    with pytest.raises(ConfigError, match=r"precision\.params"):
        make_config({"model": {"path": "m"}, "data": {"path": "d"}, "precision": {"params": "float16"}})
    with pytest.raises(ConfigError, match=r"precision\.loss_scale\.initial"):
        make_config(
            {
                "model": {"path": "m"},
                "data": {"path": "d"},
                "precision": {"compute": "float16", "loss_scale": {"initial": 0.5}},
            }
        )
