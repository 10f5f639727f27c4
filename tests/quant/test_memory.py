"""What a quantised base costs: nothing dequantised is kept, loading peaks one weight higher, plans count the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from jaxtune import cpu_bfloat16, leaves
from jaxtune.mesh import make_mesh
from jaxtune.models.families import parse_config
from jaxtune.models.weights import leaves_with_path
from jaxtune.plan.estimate import Facts
from jaxtune.plan.memory import Compiled, tree_bytes
from jaxtune.plan.program import make_step
from jaxtune.quant import leaf
from jaxtune.quant.scheme import AtLoad, Quantizer
from tests.quant.support import CONFIG, configuration, quantized

QWEN = {  # Qwen2.5-0.5B
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def dequantised_residuals(remat) -> tuple[list[tuple[int, ...]], list[str]]:
    """Of what a forward pass keeps: shapes of floating-point numbers that are as large as a weight, and where codes
    come from."""
    made = quantized(configuration("nf4", True, memory={"remat": remat}), init="shapes")
    trainable, frozen = leaves.partition(made.params, made.mask)
    tokens = jax.ShapeDtypeStruct((2, 11), jnp.int32)  # 22: no side of a weight

    def hidden(trainable, frozen, tokens):
        params, ones = leaves.combine(trainable, frozen), jnp.ones_like(tokens)
        return made.model.hidden(params, tokens, ones, ones)[0]

    weights = [weight.shape for _, weight in leaves_with_path(made.model.weights) if weight.is_linear]
    found = saved_residuals(hidden, trainable, frozen, tokens)
    floats = [aval.shape for aval, _ in found if jnp.issubdtype(aval.dtype, jnp.floating)]
    codes = [origin for aval, origin in found if aval.dtype == jnp.uint8]
    return [shape for shape in floats if shape[-2:] in weights or shape[-2:][::-1] in weights], codes


@pytest.mark.parametrize("remat", ["none", "dots", "block", ["query", "gate"]], ids=str)
def test_no_dequantised_weight_is_kept_for_the_backward_pass(remat):
    dequantised, codes = dequantised_residuals(remat)
    assert dequantised == []
    assert codes
    assert remat == "none" or all("from the argument" in origin for origin in codes)  # themselves, no copies


def test_a_plain_product_would_keep_one(monkeypatch):
    plain = lambda x, leaf: jax.lax.dot_general(x, leaf.weight(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))  # noqa: E731
    monkeypatch.setattr(leaf, "multiplied", plain)
    assert dequantised_residuals("none")[0]


def test_loading_holds_one_unquantised_weight_above_the_quantised_model(monkeypatch):
    held = []
    own = Quantizer.loaded

    def watched(self, weight, array):
        held.append(live())
        made = own(self, weight, array)
        held.append(live())
        return made

    def live():
        return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())

    monkeypatch.setattr(Quantizer, "loaded", watched)
    before = live()
    made = quantized(configuration("nf4", True))
    model = sum(array.nbytes for array in jax.tree.leaves(made.params))
    unquantised = {path: 4 * np.prod(w.full_shape) for path, w in leaves_with_path(made.model.weights) if w.is_linear}
    assert len(held) > 2 * len(unquantised)
    assert max(held) - before <= model + max(unquantised.values()) + 4096
    assert model < sum(unquantised.values())  # else this would show nothing


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_quantising_needs_little_beside_what_goes_in_and_comes_out(kind):
    stack = jax.ShapeDtypeStruct((32, 128, 256), jnp.float32)
    compiled = jax.jit(AtLoad(kind, kind == "nf4").quantized).lower(stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 4 * 128 * 256  # a few layers' worth, of 32


def test_a_plan_counts_the_codes():
    config = configuration("nf4", True)
    step = make_step(config, CONFIG, make_mesh(config.mesh, jax.devices()[:1]))
    held = Facts(step).held(dict(step.mesh.shape), 3)
    real = quantized(config)
    assert held.bytes == sum(array.nbytes for array in jax.tree.leaves(real.params))
    assert held.bytes == sum(tree_bytes(real.params).values())
    plain = configuration()
    assert held.bytes < 0.6 * Facts(make_step(plain, CONFIG, step.mesh)).held(dict(step.mesh.shape), 3).bytes


def test_a_quantised_model_has_as_many_parameters_as_before():
    ours, plain = (quantized(configuration(kind), init="shapes") for kind in ("nf4", None))
    assert leaves.count(ours.params) == leaves.count(plain.params)
    trainable, frozen = leaves.partition(ours.params, ours.mask)
    assert leaves.count(trainable) + leaves.count(frozen) == leaves.count(ours.params)


@pytest.mark.slow
def test_qlora_saves_the_bytes_of_its_codes_and_takes_no_more_beside_them():
    """Qwen2.5-0.5B's shape, bfloat16, 4 sequences of 384 tokens.

    Of the arguments the share is 0.466: 272 MB are the embedding, which stays bfloat16. Beside them nothing is held of
    the weights' size: by itself, jax 0.10's XLA holds 840 MB over codes, and 2.3 GB over the weights themselves. On a
    CPU without units for bfloat16 it makes a float32 matrix for each product, of which the head's has 545 MB.
    """
    step, plain = (qwen_step(*quantize) for quantize in (("nf4", True), (None, False)))
    ours, theirs = (Compiled.of(one.trace().lower().compile()) for one in (step, plain))
    assert ours.arguments <= 0.47 * theirs.arguments
    assert ours.temporaries <= 1.01 * theirs.temporaries
    whole, base = ours.arguments + ours.temporaries, theirs.arguments + theirs.temporaries
    if cpu_bfloat16.has_units():
        assert ours.temporaries <= 0.35e9
        assert whole <= 0.6 * base <= 0.8e9
    elif not cpu_bfloat16.XLA_KNOWS:
        assert whole <= 0.75 * base <= 1.5e9


def qwen_step(quantize, double):
    sections = {"precision": {"params": "bfloat16", "compute": "bfloat16"}, "memory": {"remat": "block"}}
    tune, train = {"method": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]}, {"batch_size": 4}
    config = configuration(quantize, double, tune=tune, train=train, data={"max_length": 384, "path": "-"}, **sections)
    return make_step(config, parse_config(QWEN), make_mesh(config.mesh, jax.devices()[:1]))
