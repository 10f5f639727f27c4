"""8-bit moments are bitsandbytes': its codes, its rounding, its steps; and they are sharded as their weights are."""

import functools
import importlib.util
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtune import eight_bit
from jaxtune.checkpoint import Checkpointer
from jaxtune.config import MeshSection, OptimSection
from jaxtune.eight_bit import BLOCK, Moment, dequantize, dynamic_codes, dynamic_map, quantize
from jaxtune.mesh import RULES, make_mesh, spec
from jaxtune.models.weights import Weight
from jaxtune.optim import descend, make_optimizer, state_shardings

SIGNED = pytest.mark.parametrize("signed", [True, False])


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(scope="module")
def peer_quantize(functional):
    """bitsandbytes' own definition of block-wise quantisation: (numbers, codes' values, block) -> (codes, absmax).

    It is the PyTorch code in backends/default/ops.py, which every device without a kernel runs: exact, and the same on
    any machine. What torch calls on a CPU is a C++ kernel that approximates it since 0.50: the code is looked up in
    65536 equal steps of [-1, 1], and what is nearer to 0 than such a step has a code hundreds of times too large (0
    itself, 131 in place of 127). The CUDA kernels compare with the same middles, but for numbers on a middle.
    PyTorch's dispatcher keeps the function, which has no name, behind the CPU's: here the file is run once more.
    """
    from bitsandbytes import _ops
    from bitsandbytes.backends.default import ops

    kernels = {}
    again = importlib.util.spec_from_file_location(f"{ops.__name__}_again", ops.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "register_kernel", lambda name, _: functools.partial(kernels.__setitem__, name))
        again.loader.exec_module(importlib.util.module_from_spec(again))
    return kernels["bitsandbytes::quantize_blockwise"]


def numbers(shape, signed, seed=0):
    """Of every size between 1e-6 and 1e3."""
    random = np.random.default_rng(seed)
    x = (random.standard_normal(shape) * 10.0 ** random.uniform(-6, 3, shape)).astype(np.float32)
    return x if signed else np.abs(x)


@pytest.mark.filterwarnings("ignore")
class TestAgainstBitsandbytes:
    @SIGNED
    def test_the_codes_are_its_dynamic_map(self, functional, signed):
        np.testing.assert_array_equal(dynamic_codes(signed), functional.create_dynamic_map(signed).numpy())

    @SIGNED
    @pytest.mark.parametrize("shape", [(7, 512), (300,), (3, 4, 256)])
    def test_codes_scales_and_numbers_are_its_own_bit_for_bit(self, functional, peer_quantize, signed, shape):
        import torch

        table, x = dynamic_map(signed), numbers(shape, signed)
        whole = np.pad(x.ravel(), (0, -x.size % BLOCK))  # it divides a last block that is shorter, and no other
        theirs, absmax = peer_quantize(torch.tensor(whole), torch.tensor(table.codes), BLOCK)
        ours = jax.jit(lambda x: quantize(x, table))(x)
        np.testing.assert_array_equal(ours.codes.ravel(), theirs.numpy()[: x.size])
        np.testing.assert_array_equal(ours.absmax.ravel(), absmax.numpy())
        # Back again every path of its is one multiplication.
        back = functional.dequantize_blockwise(theirs, absmax=absmax, code=torch.tensor(table.codes), blocksize=BLOCK)
        np.testing.assert_array_equal(jax.jit(lambda m: dequantize(m, table))(ours).ravel(), back.numpy()[: x.size])

    @SIGNED
    @pytest.mark.parametrize("largest", [1.0, 3.1])
    def test_numbers_at_every_middle_have_its_codes(self, peer_quantize, signed, largest):
        import torch

        table = dynamic_map(signed)
        middles = (table.codes[:-1] + table.codes[1:]) / np.float32(2)
        near = [np.nextafter(middles, np.float32(2)), middles, np.nextafter(middles, np.float32(-2))]
        x = np.stack([np.append(row, np.float32(1)) for row in near]) * np.float32(largest)
        theirs, _ = peer_quantize(torch.tensor(x), torch.tensor(table.codes), BLOCK)
        np.testing.assert_array_equal(jax.jit(lambda x: quantize(x, table))(x).codes, theirs.numpy())

    @SIGNED
    def test_narrow_numbers_have_its_codes(self, peer_quantize, signed):
        import torch

        x, table = torch.tensor(numbers((8, 1024), signed)).bfloat16(), dynamic_map(signed)
        theirs, _ = peer_quantize(x, torch.tensor(table.codes), BLOCK)
        np.testing.assert_array_equal(quantize(jnp.asarray(x.float().numpy()), table).codes, theirs.numpy())

    @pytest.mark.parametrize(("betas", "flips"), [((0.5, 0.5), 0), ((0.9, 0.999), 4)])
    def test_ten_steps_of_adamw_are_its_steps(self, functional, peer_quantize, betas, flips):
        """Half of a number is exact, so that moments cannot differ; of others the last bit depends on the CPU.

        There a code may then be the next one, in no more than `flips` of 163,840.
        """
        import torch

        weights = {"head": {"weight": Weight((16, 512), ("vocab", "embed"), "head")}}
        beta1, beta2 = betas
        section = OptimSection(name="adamw_8bit", weight_decay=0.1, beta1=beta1, beta2=beta2)
        optimizer = make_optimizer(section, weights)
        params = {"head": {"weight": jnp.asarray(numbers((16, 512), True, seed=9))}}
        state, step = optimizer.init(params), stepper(optimizer)
        theirs = torch.tensor(np.asarray(params["head"]["weight"]))
        m, v, apart = torch.zeros(16, 512), torch.zeros(16, 512), []
        for count in range(1, 11):
            grad = numbers((16, 512), True, seed=count)
            params, state = step(params, state, {"head": {"weight": jnp.asarray(grad)}})
            m = beta1 * m + (1 - beta1) * torch.tensor(grad)
            v = beta2 * v + (1 - beta2) * torch.tensor(grad) ** 2
            theirs = theirs * (1 - 1e-2 * 0.1)
            denominator = v.sqrt() / (1 - beta2**count) ** 0.5 + 1e-8
            theirs = theirs - 1e-2 / (1 - beta1**count) * m / denominator
            # A step is about 1e-2, and another code in it 1e-4 and more; rounding depends on how a compiler contracts.
            np.testing.assert_allclose(params["head"]["weight"], theirs.numpy(), rtol=1e-5, atol=4e-6)
            ours = (state[0].mu["head"]["weight"], True), (state[0].nu["head"]["weight"], False)
            apart += [codes_apart(moment, x, peer_quantize, s) for (moment, s), x in zip(ours, (m, v), strict=True)]
            m, v = (peer_numbers(functional, moment, s) for moment, s in ours)
        apart = np.concatenate(apart)
        assert np.count_nonzero(apart) <= flips and np.abs(apart).max() <= 1


def codes_apart(moment, x, peer_quantize, signed):
    """How far ours are from those that bitsandbytes gives the numbers x."""
    import torch

    theirs, _ = peer_quantize(x, torch.tensor(dynamic_codes(signed)), BLOCK)
    return np.asarray(moment.codes, np.int32).ravel() - theirs.numpy().astype(np.int32).ravel()


def peer_numbers(functional, moment, signed):
    """A moment as bitsandbytes reads it."""
    import torch

    codes, absmax = torch.tensor(np.asarray(moment.codes)), torch.tensor(np.asarray(moment.absmax).ravel())
    return functional.dequantize_blockwise(
        codes, absmax=absmax, code=torch.tensor(dynamic_codes(signed)), blocksize=BLOCK
    )


def stepper(optimizer, **settings):
    def step(params, state, grads):
        direction, state = optimizer.update(grads, state, params)
        return descend(params, direction, 1e-2), state

    return jax.jit(step, **settings)


@SIGNED
def test_a_number_takes_the_nearest_code_and_halfway_the_lower(signed):
    table = dynamic_map(signed)
    x = np.random.default_rng(0).uniform(-1 if signed else 0, 1, 50_000).astype(np.float32)
    nearest = np.abs(x[:, None].astype(np.float64) - table.codes).argmin(axis=1)
    np.testing.assert_array_equal(codes_of(x, table), nearest)
    np.testing.assert_array_equal(codes_of(table.codes, table), np.arange(256))
    middles = (table.codes[:-1] + table.codes[1:]) / np.float32(2)
    np.testing.assert_array_equal(codes_of(middles, table), np.arange(255))
    np.testing.assert_array_equal(codes_of(np.nextafter(middles, np.float32(2)), table), np.arange(1, 256))


def codes_of(x, table):
    """Of numbers of [-1, 1] as they are: each block ends with 1, the largest in it, so that nothing is scaled."""
    padded = np.pad(x, (0, -len(x) % (BLOCK - 1))).reshape(-1, BLOCK - 1)
    blocks = np.pad(padded, [(0, 0), (0, 1)], constant_values=1)
    return np.asarray(quantize(jnp.asarray(blocks), table).codes)[:, :-1].ravel()[: len(x)]


def test_the_last_block_of_a_row_is_shorter():
    moment = quantize(jnp.asarray(numbers((2, 300), True)), dynamic_map(True))
    assert moment.absmax.shape == (2, 2)
    np.testing.assert_array_equal(moment.absmax[:, 1], np.abs(numbers((2, 300), True)[:, 256:]).max(axis=1))


@SIGNED
def test_zeros_stay_zeros(signed):
    table = dynamic_map(signed)
    for moment in (eight_bit.zeros((2, 300), table), quantize(jnp.zeros((2, 300)), table)):
        np.testing.assert_array_equal(dequantize(moment, table), np.zeros((2, 300)))


WEIGHTS = {
    "norm": {"weight": Weight((64,), ("norm",), "norm")},
    "head": {"weight": Weight((72, 64), ("vocab", "embed"), "head")},
    "stacks": {
        "0": {
            "up": {"weight": Weight((80, 448), ("mlp", "embed"), "{layer}.up", layers=range(32))},
            "small": {"weight": Weight((16, 64), ("mlp", "embed"), "{layer}.small", layers=range(32))},
        }
    },
}


def tree(seed, dtype=np.float32):
    return jax.tree.map(
        lambda weight: jnp.asarray(numbers(weight.full_shape, True, seed), dtype),
        WEIGHTS,
        is_leaf=lambda node: isinstance(node, Weight),
    )


def eight_bit_optimizer(sizes=None):
    return make_optimizer(OptimSection(name="adamw_8bit", weight_decay=0.1), WEIGHTS, sizes)


def test_only_weights_of_4096_numbers_in_a_layer_have_8_bit_moments():
    moments = jax.eval_shape(eight_bit_optimizer().init, tree(0))[0].mu
    assert isinstance(moments["head"]["weight"], Moment)
    assert isinstance(moments["stacks"]["0"]["up"]["weight"], Moment)
    assert moments["stacks"]["0"]["small"]["weight"].dtype == moments["norm"]["weight"].dtype == jnp.float32


def test_a_stack_has_8_bit_moments_where_every_layer_has_numbers_enough_of_its_own():
    def moment(*ranks):
        shapes = {("stacks", "0", "a"): [*((64, rank) for rank in ranks), (0,)]}
        optimizer = eight_bit.scale_by_adam_8bit(0.9, 0.999, 1e-8, shapes=shapes)
        array = {"stacks": {"0": {"a": jax.ShapeDtypeStruct((3, 64, max(ranks)), jnp.float32)}}}
        return jax.eval_shape(optimizer.init, array).mu["stacks"]["0"]["a"]

    assert isinstance(moment(128, 64), Moment)
    assert moment(128, 63).dtype == jnp.float32


def test_a_large_weight_has_two_bytes_of_state_for_each_number():
    weight = {"head": {"weight": jax.ShapeDtypeStruct((1000, 1024), jnp.float32)}}
    state = jax.eval_shape(make_optimizer(OptimSection(name="adamw_8bit"), WEIGHTS).init, weight)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size / (1000 * 1024) == pytest.approx(2 + 2 * 4 / BLOCK, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_do_as_well(dtype):
    optimizer, grads = eight_bit_optimizer(), jax.tree.map(lambda x: jnp.clip(x, -9, 9).astype(dtype), tree(1))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    (ours, _), (expected, _) = (optimizer.update(g, optimizer.init(tree(0)), tree(0)) for g in (grads, wide))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def on_mesh(section, devices):
    """Parameters and state after three steps on a mesh, where they lie, and the compiled step."""
    mesh = make_mesh(section, jax.devices()[:devices])
    optimizer = eight_bit_optimizer(mesh.shape)
    leaf = {"is_leaf": lambda node: isinstance(node, Weight)}
    homes = jax.tree.map(lambda weight: NamedSharding(mesh, spec(weight.full_axes, RULES)), WEIGHTS, **leaf)
    params = jax.device_put(tree(0), homes)
    where = state_shardings(jax.eval_shape(optimizer.init, params), params, homes)
    state = jax.jit(optimizer.init, out_shardings=where)(params)
    step = stepper(optimizer, out_shardings=(homes, where)).lower(params, state, params).compile()
    for seed in (1, 2, 3):
        params, state = step(params, state, jax.device_put(tree(seed), homes))
    return params, state, step


def test_every_mesh_gives_the_same_bits_and_moves_a_few_scales_alone():
    whole = on_mesh(MeshSection(fsdp=1), 1)
    for section in (MeshSection(fsdp=8), MeshSection(fsdp=4, tensor=2), MeshSection(pipe=2, fsdp=2, tensor=2)):
        params, state, step = on_mesh(section, 8)
        jax.tree.map(np.testing.assert_array_equal, (params, state), whole[:2])
        up = state[0].mu["stacks"]["0"]["up"]["weight"]
        assert up.codes.sharding == params["stacks"]["0"]["up"]["weight"].sharding
        shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-|reduce-)", step.as_text())
        moved = [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes]
        assert moved and max(moved) <= up.codes[0].size / 4  # fewer than the numbers of one of 32 layers


def test_codes_come_back_from_a_checkpoint(tmp_path):
    optimizer = eight_bit_optimizer()
    _, state = stepper(optimizer)(tree(0), optimizer.init(tree(0)), tree(1))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpointer(tmp_path, 1, 2) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, shapes), state)


def test_moments_of_a_large_weight_are_never_whole_in_float32(monkeypatch):
    """Slice by slice, a step needs memory for the gradients and directions, and little else."""
    optimizer = eight_bit_optimizer()
    shapes = jax.eval_shape(lambda: (tree(0), optimizer.init(tree(0))))

    def temporary():
        def step(params, state, size):
            direction, state = optimizer.update(jax.tree.map(lambda x: x * size, params), state, params)
            return descend(params, direction, 1e-2), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes, jnp.float32(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    moment = 4 * sum(x.size for x in jax.tree.leaves(shapes[0]))
    assert temporary() < (2.25 if jax.__version__.startswith("0.10.") else 2.6) * moment
    monkeypatch.setattr(eight_bit, "LARGE", 1 << 40)
    assert temporary() > 4 * moment
