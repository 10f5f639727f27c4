"""What is compiled for a LoRA gradient: no gradient of a frozen matrix, never W + B A, nothing below the adapters."""

import re
from collections import Counter
from unittest.mock import patch

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jaxtune import loss, ops
from jaxtune.config import TuneSection, tune_section
from jaxtune.leaves import combine, partition
from jaxtune.models.weights import leaves_with_path
from jaxtune.ops import Noise
from jaxtune.step import batch_loss, token_numbers
from jaxtune.tune.low_rank import LowRank
from tests.tune.support import TOKENS, tuned

RANK = 3  # no size of the model, so that shapes tell adapters from weights
# No part of a chunk of the head has as many tokens as a weight has rows.
whole_chunks = patch.object(loss, "PARTS", 1)


def gradient(section: TuneSection, **base):
    """(function, its argument): the gradient of a training loss with respect to what trains, dropout on."""
    made = tuned(section, **base)
    trainable, frozen = partition(made.params, made.mask)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    batch = {"tokens": TOKENS, "targets": TOKENS, "mask": ones, "positions": positions, "segments": ones}

    def objective(trainable, frozen):
        noise = Noise(jax.random.key(0), token_numbers(0, *TOKENS.shape))
        return batch_loss(made.model, combine(trainable, frozen), batch, 1.0, jnp.float32, noise)

    return jax.grad(objective), (trainable, frozen), matrices(made)


def matrices(made) -> set[tuple[int, ...]]:
    """The shapes of the model's matrices, either way round, of one layer and of a stack."""
    shapes = {weight.shape for _, weight in leaves_with_path(made.model.weights) if len(weight.shape) == 2}
    shapes |= {shape[::-1] for shape in shapes}
    return shapes | {(made.model.config.num_layers, *shape) for shape in shapes}


def equations(jaxpr):
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@whole_chunks
def made_in_program(section: TuneSection, **base) -> Counter:
    """(operation, shape) of every result as large as a weight matrix, as the program is traced."""
    function, arguments, shapes = gradient(section, **base)
    found: Counter = Counter()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        for out in equation.outvars:
            if getattr(out.aval, "shape", None) in shapes:
                found[equation.primitive.name, out.aval.shape] += 1
    return found


@whole_chunks
def products_compiled(section: TuneSection, **base) -> set[tuple[int, ...]]:
    """Shapes of the results of all matrix products in the compiled program that are shapes of weights."""
    function, arguments, shapes = gradient(section, **base)
    text = jax.jit(function).lower(*arguments).compile().as_text()
    results = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(", text)
    assert results, "no matrix product found: the compiled text has changed"
    return {tuple(int(size) for size in sizes.split(",") if size) for sizes in results} & shapes


ARITHMETIC = {"dot_general", "add", "add_any", "mul", "sub", "pjit", "scatter-add"}
ADAPTERS = {
    "the recipe": {"targets": ["q_proj", "v_proj"]},
    "every linear map": {"targets": "all-linear"},
    "the head": {"targets": ["q_proj", "lm_head"]},
    "dropout and biases": {"targets": "all-linear", "dropout": 0.5, "bias": "all"},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_no_arithmetic_makes_anything_as_large_as_a_frozen_matrix(settings):
    found = made_in_program(tune_section(rank=RANK, **settings))
    assert not {name: count for name, count in found.items() if name[0] in ARITHMETIC}


def test_full_tuning_does_make_them():
    found = made_in_program(tune_section(method="full"))
    assert {("dot_general", shape) for shape in ((32, 32), (16, 32), (40, 32), (32, 40))} <= set(found)


def test_a_forward_pass_that_forms_the_sum_would_be_seen(monkeypatch):
    plain = ops.linear

    def forming(x, weight, bias=None, key=None):
        if isinstance(weight, LowRank):
            weight = weight.base + weight.scale * (weight.a @ weight.b).T
        return plain(x, weight, bias, key)

    monkeypatch.setattr(ops, "linear", forming)
    found = made_in_program(tune_section(rank=RANK))
    assert {("add", (32, 32)), ("dot_general", (32, 32)), ("add", (16, 32))} <= set(found)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_no_compiled_product_has_the_shape_of_a_frozen_matrix(settings):
    assert not products_compiled(tune_section(rank=RANK, **settings))


def test_full_tuning_compiles_them():
    found = {shape[-2:] for shape in products_compiled(tune_section(method="full"))}
    assert all({shape, shape[::-1]} & found for shape in ((32, 32), (16, 32), (40, 32)))


def test_a_saved_matrix_has_a_gradient_and_the_others_have_none():
    found = made_in_program(tune_section(rank=RANK, modules_to_save=["up_proj"]))
    assert {name for name in found if name[0] == "dot_general"} == {("dot_general", (40, 32))}


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, [3]),
        ({"layers": [1, 2]}, [2]),
        ({"layers": [2]}, [1]),
        ({"targets": ["lm_head"]}, []),
        ({"targets": ["q_proj", "embed_tokens"]}, [3]),
    ],
    ids=str,
)
def test_the_backward_pass_ends_at_the_lowest_layer_that_trains(settings, lengths):
    function, arguments, _ = gradient(tune_section(rank=RANK, **settings))
    scans = [e for e in equations(jax.make_jaxpr(function)(*arguments).jaxpr) if e.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans if scan.params["reverse"]] == lengths
