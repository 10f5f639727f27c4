"""Operations counted in jaxprs, and those that a model asks for, against sums done by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxtune import tune
from jaxtune.config import MeshSection, tune_section
from jaxtune.mesh import make_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.tiled import BLOCK, tiled_attention
from jaxtune.models.weights import leaves_with_path, map_tree
from jaxtune.plan.flops import Flops, Place, matmul_flops, model_flops

A, B = jnp.zeros((4, 8)), jnp.zeros((8, 16))
ONE = 2 * 4 * 8 * 16  # of A @ B


def flops(function, *arguments, **options):
    return matmul_flops(jax.make_jaxpr(function)(*arguments), **options)


def test_a_matmul_is_two_operations_for_each_product():
    assert flops(jnp.matmul, A, B) == Flops(shared=ONE)
    assert (
        flops(partial(jnp.einsum, "bij,bkj->bik"), jnp.zeros((3, 4, 5)), jnp.zeros((3, 6, 5))).shared
        == 2 * 3 * 4 * 5 * 6
    )


def test_what_is_inside_a_call_counts():
    assert flops(jax.jit(lambda a: a @ B), A).shared == ONE
    assert flops(jax.checkpoint(lambda a: a @ B), A).shared == ONE


def test_a_gradient_is_two_matmuls_more_and_rematerialisation_another():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b))

    assert flops(jax.grad(loss, (0, 1)), A, B).shared == 3 * ONE
    assert flops(jax.grad(loss), A, B).shared == 2 * ONE
    assert flops(jax.grad(jax.checkpoint(loss), (0, 1)), A, B).shared == 4 * ONE


def test_a_scan_counts_as_often_as_it_runs():
    square = jnp.zeros((8, 8))

    def body(x, _):
        return x @ square, x @ square

    assert flops(lambda x: jax.lax.scan(body, x, None, length=5), square).shared == 5 * 2 * 2 * 8**3


def test_a_loop_whose_length_the_data_decide_counts_as_often_as_asked():
    square = jnp.zeros((8, 8))

    def function(x):
        return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda i, x: x @ square, x)

    assert flops(function, square).shared == 2 * 8**3
    assert flops(function, square, loop_trips=3).shared == 3 * 2 * 8**3


def test_of_a_condition_the_dearest_branch_counts():
    def function(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: (a @ B) @ B.T, lambda a: a, a)

    assert flops(function, A).shared == 2 * ONE


def test_a_condition_whose_share_is_known_counts_by_it_and_a_loop_within_it_as_a_whole():
    def often(a):
        return jax.lax.cond(a[0, 0] > 1, lambda a: a @ B @ B.T, lambda a: a, a)

    def function(a):
        inner = lambda a: jax.lax.scan(lambda a, _: (often(a), None), often(a), None, length=3)[0]  # noqa: E731
        return jax.lax.cond(a[0, 0] > 0, inner, lambda a: a, a)

    assert flops(function, A).shared == 4 * 2 * ONE
    assert flops(function, A, place=Place((0.5, 0.25))).shared == 0.5 * (0.25 + 3) * 2 * ONE


def test_a_custom_gradient_counts_what_it_computes():
    @jax.custom_vjp
    def product(a):
        return jnp.sum(a @ B)

    product.defvjp(lambda a: (jnp.sum(a @ B), None), lambda _, g: (g * jnp.ones((4, 16)) @ B.T @ B @ B.T,))
    assert flops(product, A).shared == ONE
    assert flops(jax.grad(product), A).shared == 4 * ONE


def test_inside_shard_map_the_numbers_are_one_devices():
    mesh = make_mesh(MeshSection(data=4, fsdp=2))
    spec = PartitionSpec("data")

    def function(a):
        inside = jax.shard_map(lambda a: a @ B, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(a)
        return inside @ B.T

    found = flops(function, A)
    assert found == Flops(per_device=ONE / 4, shared=ONE)
    assert found.on_each(8) == ONE / 4 + ONE / 8


CONFIG = ModelConfig("qwen2", 256, 32, 64, 2, 4, 2, 8, 256)
LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # matmul parameters: q and o, k and v, the MLP
HEAD = 256 * 32
TOKENS, TIME = 96, 48
ATTENTION = 12 * 4 * 8 * TIME  # of a layer and token


def asked(section, config=CONFIG):
    config, stacks = tune.layout(section, config)
    shape = lambda weight: jax.ShapeDtypeStruct(weight.full_shape, jnp.float32)  # noqa: E731
    params = map_tree(shape, Model.create(config, stacks).weights)
    weights = Model.create(config, stacks, hooks=tune.hooks(section, config)).weights
    shapes, mask = tune.apply(section, params, weights, 0)
    return model_flops(config, weights, mask, shapes, TOKENS, TIME)


def test_full_tuning_is_six_for_each_matmul_parameter_and_palms_attention():
    assert asked(tune_section(method="full")) == TOKENS * (6 * (2 * LAYER + HEAD) + 2 * ATTENTION)


def test_lora_is_four_for_frozen_and_six_for_trained():
    section = tune_section(rank=4, targets=["q_proj"])
    low_rank = 2 * 4 * (32 + 32)
    assert asked(section) == TOKENS * (4 * (2 * LAYER + HEAD) + 6 * low_rank + 2 * ATTENTION)


def test_layers_below_the_first_that_trains_are_forward_only():
    section = tune_section(method="freeze", freeze_embedding=True, freeze_first=1)
    assert asked(section) == TOKENS * (2 * LAYER + 6 * (LAYER + HEAD) + ATTENTION / 3 + ATTENTION)


@pytest.mark.parametrize("options", [{"method": "p_tuning"}, {"method": "prefix", "prefix_projection": True}], ids=str)
def test_an_encoder_of_virtual_tokens_multiplies_no_token(options):
    assert asked(tune_section(**options)) == TOKENS * (4 * (2 * LAYER + HEAD) + 2 * ATTENTION)


@pytest.mark.parametrize("both", [False, True])
def test_of_a_kronecker_product_the_matrices_count_that_are_there(both):
    section = tune_section(method="lokr", rank=1, targets=["q_proj"], decompose_both=both)
    a, b, c, d = 4, 8, 4, 8
    parts = (a + c if both else a * c) + (b + d)
    assert asked(section) == TOKENS * (4 * (2 * LAYER + HEAD) + 6 * 2 * parts + 2 * ATTENTION)


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_counts_as_a_head_alone(tied):
    config = ModelConfig(**{**CONFIG.__dict__, "tied": tied})
    assert asked(tune_section(method="full"), config) == TOKENS * (6 * (2 * LAYER + HEAD) + 2 * ATTENTION)


def test_the_declarations_hold_no_other_matmul():
    weights = Model.create(CONFIG).weights
    wide = [weight for path, weight in leaves_with_path(weights) if len(weight.shape) == 2 and path[0] != "embed"]
    assert sum(jnp.prod(jnp.array(weight.full_shape)) for weight in wide) == 2 * LAYER + HEAD


@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_attention_in_tiles_counts_the_tiles_of_one_document(blocks):
    time, heads, kv_heads, dim = blocks * BLOCK, 4, 2, 16
    q, k = (jax.ShapeDtypeStruct((2, time, count, dim), jnp.float32) for count in (heads, kv_heads))
    attend = lambda q, k, v: jnp.sum(tiled_attention(q, k, v, jnp.ones((2, time), jnp.int32)))  # noqa: E731
    tiles = 2 * blocks * (blocks + 1) / 2
    product = 2 * heads * BLOCK**2 * dim
    share = 2 * time * heads * 2 * dim  # of the output with its gradient: a product with ones
    forward, both = (jax.make_jaxpr(f)(q, k, k) for f in (attend, jax.grad(attend, argnums=(0, 1, 2))))
    assert matmul_flops(forward, loop_trips=1000).shared == 2 * tiles * product
    assert matmul_flops(both, loop_trips=1000).shared == 7 * tiles * product + share
