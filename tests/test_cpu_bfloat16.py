"""bfloat16 on a CPU: which CPUs have units for it, and that a step uses them and holds nothing in float32 beside."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import cpu_bfloat16, ops
from jaxtune.config import make_config
from jaxtune.number_types import narrower, wider
from jaxtune.quant.leaf import multiplied
from tests.programs import LORA, Stepper

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
FLAGS = {
    "flags\t\t: fpu sse avx512f avx512_bf16 avx512_vnni\n": True,
    "flags : fpu amx_bf16 amx_tile\n": True,
    "flags : fpu sse avx2 avx512f\n": False,
    "model name : a bf16 wonder\nflags : fpu avx2\n": False,
    "Features\t: fp asimd sve bf16 i8mm\n": None,
    "": None,
}


@pytest.fixture
def abilities(tmp_path, monkeypatch):
    """A function: from then on, what Linux says of the CPU."""

    def given(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(cpu_bfloat16, "ABILITIES", tmp_path / "cpuinfo")
        cpu_bfloat16.has_units.cache_clear()

    yield given
    cpu_bfloat16.has_units.cache_clear()


@pytest.fixture
def with_units(abilities):
    abilities("flags : avx512_bf16\n")


def config_of(**sections):
    return make_config({"model": {"path": "m"}, "data": {"path": "d"}, **sections})


@pytest.mark.parametrize("text", FLAGS)
def test_units_are_known_by_what_linux_says(text, abilities):
    abilities(text)
    assert cpu_bfloat16.has_units() is FLAGS[text]


def test_where_the_system_does_not_tell_nothing_is_said(abilities, tmp_path, monkeypatch):
    abilities("")
    monkeypatch.setattr(cpu_bfloat16, "ABILITIES", tmp_path / "absent")
    assert cpu_bfloat16.has_units() is None
    assert narrower(config_of(), CPU, False) is None
    assert not list(wider(config_of(precision={"compute": "bfloat16"}).precision, CPU))


def test_a_cpu_without_units_is_told_that_bfloat16_takes_no_less_time(abilities):
    abilities("flags : avx2\n")
    (note,) = wider(config_of(precision={"compute": "bfloat16"}).precision, CPU)
    assert note.startswith("this CPU has no bfloat16 units: its matmuls are computed in float32")
    assert narrower(config_of(), CPU, False) is None


def test_a_cpu_with_units_is_told_of_them_unless_a_type_was_chosen(with_units):
    assert not list(wider(config_of(precision={"compute": "bfloat16"}).precision, CPU))
    told = narrower(config_of(tune={"method": "lora"}), CPU, False)
    assert "precision.compute: bfloat16 takes less" in told and "precision.params: bfloat16 holds" in told
    full = narrower(config_of(tune={"method": "full"}), CPU, False)
    assert full == narrower(config_of(tune={"method": "lora"}), CPU, True) == told.partition(", and")[0]
    assert narrower(config_of(precision={"compute": "float32"}), CPU, False) is None
    assert narrower(config_of(precision={"matmul": "float8"}), CPU, False) is None
    assert narrower(config_of(), SimpleNamespace(platform="tpu", device_kind="TPU v5e"), False) is None


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


@pytest.mark.parametrize("has_units", [True, False])
def test_units_get_a_single_row_as_a_matrix(abilities, has_units):
    """As where a token at a time is drawn: XLA takes a row for a vector, and makes the weight float32 for it."""
    abilities("flags : avx512_bf16\n" if has_units else "flags : avx2\n")
    x, w = draw(0, 1, 64), draw(1, 32, 64)
    multiply = jax.jit(lambda x, w: ops.linear(x, w))  # traced anew
    compiled = multiply.lower(x, w).compile().as_text()
    assert (re.search(r"\[2,32\]\S* dot\(", compiled) is not None) == has_units
    np.testing.assert_allclose(*(np.float32(y) for y in (multiply(x, w), x @ w.T)), rtol=0.02, atol=0.02)


@pytest.fixture
def as_jax_0_10(with_units, monkeypatch):
    """Our own products, whatever version this is; what is traced under it is traced anew."""
    monkeypatch.setattr(cpu_bfloat16, "XLA_KNOWS", False)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_a_product_and_its_gradients_are_rounded_once(as_jax_0_10):
    x, w, d = draw(0, 2, 24, 300), draw(1, 40, 300), draw(2, 2, 24, 40)
    y, backward = jax.vjp(ops.linear, x, w)
    wide = [np.asarray(a, np.float64) for a in (x, w, d)]
    wanted = wide[0] @ wide[1].T, wide[2] @ wide[1], np.einsum("bto,bti->oi", wide[2], wide[0])
    for found, exact in zip((y, *backward(d)), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-5)


def products(function, *arguments):
    """(types of the operands, type of the result) of each matmul in what XLA is given."""
    text = jax.jit(function).lower(*arguments).as_text()
    found = re.findall(r"dot_general.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\) -> tensor<[\dx]+x(\w+)>", text)
    return sorted(found)


def test_products_are_asked_for_in_float32_and_none_of_a_frozen_weight(as_jax_0_10):
    x, w = draw(0, 24, 32), draw(1, 40, 32)
    loss = lambda x, w: ops.linear(x, w).astype(jnp.float32).sum()  # noqa: E731
    one = ("bf16", "bf16", "f32")
    assert products(loss, x, w) == [one]
    assert products(jax.value_and_grad(loss, 0), x, w) == products(jax.value_and_grad(loss, 1), x, w) == [one] * 2
    assert products(jax.value_and_grad(loss, (0, 1)), x, w) == [one] * 3


@jax.tree_util.register_dataclass
@dataclass
class Codes:
    """As much of a quantised weight as its product asks for."""

    numbers: jax.Array

    def weight(self, dtype):
        return self.numbers.astype(dtype)


def test_so_are_a_quantised_weights_products(as_jax_0_10):
    x, codes = draw(0, 2, 24, 32), Codes(jnp.ones((40, 32), jnp.int8))
    loss = lambda x: multiplied(x, codes).astype(jnp.float32).sum()  # noqa: E731
    assert products(jax.value_and_grad(loss), x) == [("bf16", "bf16", "f32")] * 2


def test_other_types_and_cpus_without_units_multiply_as_ever(as_jax_0_10, abilities):
    x, w = draw(0, 24, 32), draw(1, 40, 32)
    assert products(ops.linear, *(a.astype(jnp.float32) for a in (x, w))) == [("f32", "f32", "f32")]
    abilities("flags : avx2\n")
    jax.clear_caches()
    assert products(ops.linear, x, w) == [("bf16", "bf16", "bf16")]


def test_what_is_traced_for_another_device_is_left_to_its_compiler(as_jax_0_10):
    with cpu_bfloat16.traced_for(SimpleNamespace(platform="tpu")):
        assert products(ops.linear, draw(0, 24, 32), draw(1, 40, 32)) == [("bf16", "bf16", "bf16")]


@pytest.mark.parametrize("remat", [None, "dots"])
@pytest.mark.parametrize("tune", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_a_step_takes_less_memory_than_in_float32(tune, remat):
    """Whatever the version of jax: stacks of weights and activations are not held in float32 as well."""
    memory = {"remat": remat} if remat else {}

    def step(dtype):
        precision = {"compute": dtype, "params": dtype}
        return Stepper(tune=tune, precision=precision, memory=memory, attention="tiles", rows=4).memory

    narrow, wide = step("bfloat16"), step("float32")
    assert narrow.temp_size_in_bytes < 0.85 * wide.temp_size_in_bytes  # 0.98 to 1.08 where they are


def test_the_compiler_is_told_of_bfloat16_on_a_cpu_alone(as_jax_0_10, monkeypatch):
    told = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    assert cpu_bfloat16.compiler_options(jnp.dtype("bfloat16"), CPU) == told
    assert cpu_bfloat16.compiler_options(jnp.dtype("float32"), CPU) is None
    assert cpu_bfloat16.compiler_options(jnp.dtype("bfloat16"), SimpleNamespace(platform="gpu")) is None
    monkeypatch.setattr(cpu_bfloat16, "XLA_KNOWS", True)
    assert cpu_bfloat16.compiler_options(jnp.dtype("bfloat16"), CPU) is None
