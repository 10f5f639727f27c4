"""float8 matmuls are what their definition says bit by bit, stay near the wide ones, and keep their histories."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune import float8, train
from jaxtune.config import PrecisionSection, make_config
from jaxtune.float8 import E4M3, E5M2, Float8, Watch, attach, delayed_scales, quantize, remember, scale_of
from jaxtune.models.decoder import Model
from jaxtune.number_types import has_bfloat16, has_float8, wider
from jaxtune.ops import linear
from jaxtune.tune.low_rank import LowRank
from tests.programs import CONFIG, LORA, Stepper
from tests.runs import sections
from tests.test_loss_scale import ledger, stopped_after

KINDS = {E4M3: (ml_dtypes.float8_e4m3fn, 448.0), E5M2: (ml_dtypes.float8_e5m2, 57344.0)}
CURRENT, DELAYED = {"matmul": "float8"}, {"matmul": "float8", "float8_scaling": "delayed"}


def draw(seed, *shape, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def rounded(x, scale, kind):
    """(the float8 numbers as float32, what divides them again), with numpy and ml_dtypes."""
    narrow, largest = KINDS[kind]
    return np.clip(x * scale, -largest, largest).astype(narrow).astype(np.float32), np.float32(1) / scale


def emulated(x, w, d, scales):
    """y, dx and dw of one linear map as the definition has them."""
    (x, x_un), (w, w_un), (d, d_un) = (
        rounded(a, np.float32(s), k) for a, s, k in zip((x, w, d), scales, float8.TYPES, strict=True)
    )
    return (x @ w.T) * (x_un * w_un), (d @ w) * (d_un * w_un), (d.T @ x) * (d_un * x_un)


def current(*arrays):
    return [np.float32(KINDS[kind][1]) / np.abs(array).max() for array, kind in zip(arrays, float8.TYPES, strict=True)]


def passes(x, w, d, scales=None):
    """y, dx, dw, and what is seen of the sizes."""
    y, pull = jax.vjp(lambda x, w, s: linear(x, Float8(w, s)), x, w, scales)
    return y, *pull(d)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_rounding_is_ml_dtypes(kind, dtype):
    x = (draw(0, 4000) * 10.0 ** draw(1, 4000, low=-7, high=3)).astype(dtype)
    narrow, largest = KINDS[kind]
    ours = jax.jit(lambda x: quantize(x, jnp.float32(3), kind))(x)
    theirs = np.clip(x.astype(np.float32) * np.float32(3), -largest, largest).astype(narrow)
    np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), theirs.view(np.uint8))


def test_too_large_is_the_largest_and_what_is_not_finite_stays_so():
    """An overflow of float16 has to be seen."""
    x = jnp.float32([1e9, -1e9, jnp.inf, jnp.nan])
    for kind, (_, largest) in KINDS.items():
        ours = np.asarray(quantize(x, jnp.float32(1), kind)).astype(np.float32)
        assert ours[:2].tolist() == [largest, -largest] and not np.isfinite(ours[2:]).any()


def test_scales_of_nothing_and_of_very_little_are_finite():
    sizes = jnp.float32([0.0, jnp.inf, jnp.nan, 2e-38, 2.0])
    np.testing.assert_array_equal(
        scale_of(sizes, E4M3), np.float32([1, 1, 1, np.finfo(np.float32).max, 224]), strict=True
    )


def test_all_three_matmuls_are_the_definition_in_every_bit():
    """Numbers of one size, so that float32 adds their products without rounding, in whatever order."""
    x, w, d = draw(0, 24, 64, low=0.5), draw(1, 40, 64, low=0.5), draw(2, 24, 40, low=0.5)
    y, dx, dw, _ = jax.jit(passes)(x, w, d)
    for ours, theirs in zip((y, dx, dw), emulated(x, w, d, current(x, w, d)), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_results_are_near_the_wide_ones_and_have_their_types(dtype):
    """e4m3 has 3 bits of fraction, e5m2 has 2: an error of 1/32 and 1/16 of each number, which averages out."""
    x, w, d = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 32, 96), (80, 96), (4, 32, 80)])
    )
    narrow = [array.astype(dtype) for array in (x, w, d)]
    ours = passes(*narrow)[:3]
    y, pull = jax.vjp(linear, x, w)
    for mine, wide, bound in zip(ours, (y, *pull(d)), (0.05, 0.07, 0.07), strict=True):
        assert mine.dtype == dtype and mine.shape == wide.shape
        error = jnp.linalg.norm(mine.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
        assert 0.01 < error < bound


def test_the_scales_gradient_is_what_was_seen_of_the_sizes():
    x, w, d = draw(0, 24, 64), draw(1, 40, 64), draw(2, 24, 40)
    sizes = passes(x, w, d, jnp.ones(3))[3]
    np.testing.assert_array_equal(sizes, [np.abs(array).max() for array in (x, w, d)])


def test_delayed_scaling_is_transformer_engines_over_many_steps():
    """A history in Python: the largest of the last 4 steps gives the scale; before the first step it is 1."""
    steps, seen = 4, [[], [], []]
    history = jnp.zeros((1, 3, steps))
    for step in range(10):
        size = 10.0 ** np.random.default_rng(step).integers(-3, 3)
        x, w, d = (size * draw(3 * step + i, *shape, low=0.5) for i, shape in enumerate([(8, 16), (16, 16), (8, 16)]))
        x, w, d = (array.astype(np.float32) for array in (x, w, d))
        limits = [KINDS[kind][1] for kind in float8.TYPES]
        scales = [
            np.float32(limit) / max(past[-steps:]) if past else 1 for limit, past in zip(limits, seen, strict=True)
        ]
        ours = delayed_scales(history)[0]
        np.testing.assert_array_equal(ours, np.float32(scales))
        *products, sizes = passes(x, w, d, ours)
        for mine, theirs in zip(products, emulated(x, w, d, scales), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
        for past, array in zip(seen, (x, w, d), strict=True):
            past.append(np.abs(array).max())
        history = remember(history, sizes[None])


def count(text):
    return text.count(" dot(")


def test_a_frozen_weight_has_no_weight_gradient():
    x, w = draw(0, 24, 64), draw(1, 40, 64)
    for weight in (Float8(w), Float8(w, jnp.ones(3))):
        loss = lambda x, leaf: jnp.sum(jnp.sin(linear(x, leaf)))  # noqa: E731
        both, one = (jax.jit(jax.grad(loss, argnums)).lower(x, weight).compile() for argnums in ((0, 1), 0))
        assert (count(both.as_text()), count(one.as_text())) == (3, 2)


def test_an_adapter_beside_a_float8_base_stays_in_the_compute_type():
    x, w = jnp.asarray(draw(0, 24, 64)), jnp.asarray(draw(1, 40, 64))
    leaf = LowRank(Float8(w), jnp.asarray(draw(2, 64, 4)), jnp.asarray(draw(3, 4, 40)), jnp.float32(2))
    expected = linear(x, Float8(w)) + 2 * (x @ leaf.a) @ leaf.b
    np.testing.assert_allclose(linear(x, leaf), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def lora():
    return Stepper(tune=LORA, precision=DELAYED)


def test_a_lora_step_has_the_matmuls_of_one_without_float8_and_the_blocks_alone_are_narrow(lora):
    assert count(lora.hlo) == count(Stepper(tune=LORA).hlo)
    narrow = {line.split("f8e4m3fn[")[1].split("]")[0] for line in lora.hlo.splitlines() if "f8e4m3fn[" in line}
    assert {"64,64", "128,64", "64,128"} <= narrow
    assert not any(str(size) in shape.split(",") for shape in narrow for size in (CONFIG.vocab_size // 2 + 1, 4))


def histories(stepper):
    return jax.tree.leaves(stepper.state["float8"])


MESHES = [
    {"mesh": {"fsdp": 4, "tensor": 2}},
    {"mesh": {"fsdp": 2, "tensor": 2, "context": 2, "sequence_parallel": True}},
    {"train": {"micro_batches": 4}},
]


@pytest.fixture(scope="module")
def alone():
    """Losses of two steps on one device, and the histories after the first."""

    def run(precision):
        stepper = Stepper(precision=precision)
        return stepper.run(1) + stepper.run(1, first=2), histories(stepper)

    return {"current": run(CURRENT), "delayed": run(DELAYED)}


@pytest.mark.parametrize("sections", MESHES)
def test_delayed_sizes_are_the_largest_of_all_devices_and_micro_batches(alone, sections):
    losses, expected = alone["delayed"]
    stepper = Stepper(precision=DELAYED, **sections)
    first, second = stepper.run(2)
    np.testing.assert_allclose(first, losses[0], rtol=1e-6)
    np.testing.assert_allclose(second, losses[1], rtol=1e-3)
    for ours, theirs in zip(histories(stepper), expected, strict=True):
        assert ours.shape == theirs.shape == (CONFIG.num_layers, 3, 16)
        # The first step, whose inputs' and weights' numbers are the same; gradients are rounded on their way.
        np.testing.assert_allclose(ours[:, :, 1], theirs[:, :, 1], rtol=0.2)
        np.testing.assert_allclose(ours[:, 1, 1], theirs[:, 1, 1], rtol=1e-6)
        assert (ours[:, :, 2:] == 0).all() and (ours[:, :2, :2] > 0).all()


PIPES = [
    pytest.param({"pipe": 2}, marks=pytest.mark.thorough),
    pytest.param({"pipe": 3}, marks=pytest.mark.thorough),
    {"pipe": 2, "tensor": 2, "schedule": "interleaved", "virtual_stages": 2},
]


@pytest.mark.parametrize("mesh", PIPES)
def test_the_stages_of_a_pipeline_keep_the_histories_of_their_layers(alone, mesh):
    """In layer order, as a checkpoint has them; the second step's scales are those of the first."""
    sections = {"train": {"micro_batches": 4}, "precision": DELAYED}
    one, pipe = Stepper(**sections), Stepper(mesh={"fsdp": 1, **mesh}, **sections)
    expected, losses = one.run(2), pipe.run(2)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(losses[1], expected[1], rtol=1e-3)
    saved = pipe.program.saved(pipe.state)["float8"]
    for ours, theirs in zip(jax.tree.leaves(saved), histories(one), strict=True):
        np.testing.assert_allclose(ours[:, 1, 1], theirs[:, 1, 1], rtol=1e-6)
        np.testing.assert_allclose(ours[:, :, 1], theirs[:, :, 1], rtol=0.2)
    back = pipe.program.loaded({**pipe.program.saved(pipe.state)})
    jax.tree.map(np.testing.assert_array_equal, back["float8"], pipe.state["float8"])


@pytest.mark.parametrize("sections", [*MESHES[:2], {"mesh": {"fsdp": 1, "pipe": 2}, "train": {"micro_batches": 2}}])
def test_current_scales_are_those_of_whole_tensors_on_any_mesh(alone, sections):
    expected = alone["current"][0]
    if "train" in sections:
        expected = Stepper(precision=CURRENT, train=sections["train"]).run(2)
    first, second = Stepper(precision=CURRENT, **sections).run(2)
    np.testing.assert_allclose(first, expected[0], rtol=1e-6)
    np.testing.assert_allclose(
        second, expected[1], rtol=1e-3
    )  # Adam's first step is each gradient's sign, however small


@pytest.mark.parametrize("remat", ["none", "dots", "block", "full"])
def test_what_is_kept_for_the_backward_pass_changes_nothing(alone, remat):
    (first, second), expected = Stepper(precision=CURRENT, memory={"remat": remat}).run(2), alone["current"][0]
    np.testing.assert_allclose(first, expected[0], rtol=1e-6)
    np.testing.assert_allclose(second, expected[1], rtol=1e-3)


def test_bottleneck_adapters_stay_in_the_compute_type():
    section = {"method": "houlsby", "reduction_factor": 2.6}  # 24 wide, as nothing else is
    stepper = Stepper(tune=section, precision=DELAYED)
    np.testing.assert_allclose(stepper.run(2), Stepper(tune=section).run(2), rtol=1e-2)
    narrow = {line.split("f8e4m3fn[")[1].split("]")[0] for line in stepper.hlo.splitlines() if "f8e4m3fn[" in line}
    assert {"64,64", "128,64"} <= narrow and not any("24" in shape.split(",") for shape in narrow)
    assert "hooks" not in stepper.state["float8"]["stacks"]["0"]


def test_a_skipped_step_leaves_the_histories_and_evaluation_does_not_read_them(lora):
    lora.run(1)
    before = [np.asarray(history) for history in histories(lora)]
    assert all((history[:, :2, 0] > 0).all() for history in before)
    batch = lora.batch(2)
    poisoned = {**batch, "mask": jnp.where(batch["mask"] > 0, jnp.inf, 0.0)}
    lora.state, metrics = lora.compiled(
        lora.state, lora.frozen, jax.device_put(poisoned, lora.program.rows), jnp.int32(2)
    )
    assert int(metrics["skipped"]) == 1
    for ours, theirs in zip(histories(lora), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    total, tokens = lora.program.eval_step(lora.state["trainable"], lora.frozen, batch)
    assert 4 < total / tokens < 9


def test_stacks_below_the_first_that_trains_are_not_watched():
    section = {"method": "freeze", "train_patterns": [r"layers\.[23]\.mlp"]}
    stepper = Stepper(tune=section, precision=DELAYED)
    assert [len(stack) for stack in stepper.model.stacks] == [2, 2]
    assert set(stepper.state["float8"]["stacks"]) == {"1"}
    with_embedding = Stepper(tune={"method": "freeze", "train_patterns": ["embed"]}, precision=DELAYED)
    assert set(with_embedding.state["float8"]["stacks"]) == {"0"}
    assert np.isfinite(stepper.run(2)).all()


def test_only_linear_maps_of_layers_are_watched_and_attached():
    weights = Model.create(CONFIG).weights
    mask = jax.tree.map(lambda _: True, weights)
    watch = Watch.of(weights, mask, 5)
    assert {path[2:] for path in watch.layers} == {
        *[("attention", f"{name}_proj", "weight") for name in "qkvo"],
        *[("mlp", f"{name}_proj", "weight") for name in ("gate", "up", "down")],
    }
    params = attach(jax.tree.map(lambda weight: jnp.zeros(weight.full_shape), weights), delayed_scales(watch.init()))
    typed = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Float8))
    assert sum(isinstance(leaf, Float8) for leaf in typed) == len(watch.layers) == 7


def test_a_run_with_delayed_scales_goes_on_bit_for_bit(tiny_model, tmp_path):
    def config(home):
        return make_config(sections(tiny_model("qwen2"), home, steps=6, precision=DELAYED))

    whole = train(config(tmp_path / "whole"))
    assert whole[-1]["loss"] < whole[0]["loss"]
    with pytest.raises(SystemExit):
        stopped_after(3, config(tmp_path / "cut"))
    train(config(tmp_path / "cut"))
    assert ledger(tmp_path / "cut") == ledger(tmp_path / "whole")


def test_float8_without_float8_units_is_said(tiny_model, tmp_path, capsys):
    train(make_config(sections(tiny_model("qwen2"), tmp_path, steps=1, precision=CURRENT)))
    printed = capsys.readouterr()
    assert "no float8 units" in " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "expected"),
    [
        ("gpu", "NVIDIA H100", "9.0", True),
        ("gpu", "NVIDIA B200", "10.0", True),
        ("gpu", "NVIDIA A100", "8.0", False),
        ("gpu", "AMD MI300X", "gfx942", True),
        ("gpu", "AMD MI250", "gfx90a", False),
        ("tpu", "TPU v7", None, True),
        ("tpu", "TPU v5e", None, False),
        ("cpu", "cpu", None, False),
    ],
)
def test_devices_that_multiply_float8(platform, kind, capability, expected):
    device = type("Device", (), {"platform": platform, "device_kind": kind, "compute_capability": capability})
    assert has_float8(device) == expected


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "7.5", False),
        ("gpu", "6.1", False),
        ("gpu", "8.0", True),
        ("gpu", "12.0", True),
        ("gpu", "gfx90a", True),
        ("tpu", None, True),
    ],
)
def test_a_gpu_before_ampere_is_told_of_float16(platform, capability, expected):
    device = type("Device", (), {"platform": platform, "device_kind": "it", "compute_capability": capability})
    config = make_config({"model": {"path": "m"}, "data": {"path": "d"}, "precision": {"compute": "bfloat16"}})
    assert has_bfloat16(device) == expected
    told = [("no bfloat16 units" in text, "float16 uses the units" in text) for text in wider(config.precision, device)]
    assert told == [(True, capability == "7.5")] * (not expected)


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match="float8_scaling belongs to matmul float8"):
        PrecisionSection(float8_scaling="delayed")
    with pytest.raises(ValueError, match="float8_history belongs to float8_scaling delayed"):
        PrecisionSection(matmul="float8", float8_history=8)
