"""LoftQ's start: what quantising a weight loses, fitted by the low-rank product, as peft's loftq_init does it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.assemble import Source, assemble
from jaxtune.config import MeshSection, ModelSection, tune_section
from jaxtune.errors import ConfigError
from jaxtune.mesh import make_mesh, single_device_mesh
from jaxtune.quant.four_bit import FourBit
from jaxtune.quant.scheme import AtLoad
from jaxtune.tune import check
from jaxtune.tune.loftq import _split
from jaxtune.tune.low_rank import LowRank
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_config import read_config
from jaxtune.tune.peft_io import save_adapter
from tests.quant.support import as_defined
from tests.tune.support import difference, logits

W = jnp.array(np.random.default_rng(0).normal(size=(64, 96)) * 0.1, jnp.float32)


def parts(times, kind="nf4", scale=1.0, w=W):
    base, a, b = _split(w, 8, jnp.float32(scale), quantize=AtLoad(kind).layer, times=times, width=8)
    return base.weight(jnp.float32), scale * (a @ b).T


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_the_product_makes_up_for_what_quantising_loses_and_more_so_with_every_round(kind):
    plain = jnp.linalg.norm(W - AtLoad(kind).layer(W).weight(jnp.float32))
    left = [float(jnp.linalg.norm(W - sum(parts(times, kind)))) for times in (1, 2, 5)]
    assert 0.9 * plain > left[0] > left[1] > left[2]


def test_the_scale_of_the_adapter_changes_nothing():
    for one, other in zip(parts(3), parts(3, scale=2.5), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("times", [1, 3])
def test_the_start_is_peft_s(monkeypatch, times):
    """The dequantised weight and B A of peft's loftq_init, whose quantisation to NF4 is bitsandbytes'. It asks for a
    CUDA device, so that here the requests for one are taken away."""
    import bitsandbytes as bnb
    import torch
    from peft.utils import loftq_utils

    as_defined()

    class OnCpu:
        def __init__(self, data, **settings):
            assert settings["quant_type"] == "nf4" and not settings["compress_statistics"]
            self.data, self.quant_state = bnb.functional.quantize_4bit(data, quant_type="nf4")

        def to(self, device):
            return self

    plain = torch.Tensor.to

    def here(self, *args, **rest):
        args = [value for value in args if value != "cuda"]
        rest = {name: value for name, value in rest.items() if value != "cuda"}
        return plain(self, *args, **rest) if args or rest else self

    monkeypatch.setattr(torch.Tensor, "to", here)
    monkeypatch.setattr(bnb.nn, "Params4bit", OnCpu)
    monkeypatch.setattr(loftq_utils, "is_bnb_available", lambda: True)
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: True)
    weight, a, b = loftq_utils.loftq_init(torch.tensor(np.asarray(W)), 4, 8, times)
    base, product = parts(times)
    np.testing.assert_allclose(base, weight, atol=1e-6)
    np.testing.assert_allclose(product, (b @ a).numpy(), atol=1e-5)


def assembled(path, mesh=None, section=None, quantize="nf4", init="pretrained", double_quant=False):
    source = Source.open(ModelSection(path=str(path), quantize=quantize, double_quant=double_quant))
    section = section or tune_section(method="loftq", rank=4, loftq_iter=2, layers=[1], targets=["q_proj", "down_proj"])
    where = single_device_mesh() if mesh is None else make_mesh(MeshSection(**mesh), jax.devices()[:8])
    return assemble(source, section, where, init=init)


def leaf(made, block="attention", name="q_proj"):
    found = [stack[block][name]["weight"] for stack in made.params["stacks"].values()]
    return next(one for one in found if isinstance(one, LowRank))


def test_a_model_is_nearer_to_what_it_was_than_a_quantised_one(tiny_model):
    path = tiny_model("qwen2")
    whole, plain = (assembled(path, section=tune_section(method="lora"), quantize=q) for q in (None, "nf4"))
    made = assembled(path, section=tune_section(method="loftq", rank=8, loftq_iter=3, targets="all-linear"))
    assert isinstance(leaf(made).base, FourBit)
    expected, coarse, ours = (logits(one.model, one.params) for one in (whole, plain, made))
    assert difference(ours, expected) < 0.8 * difference(coarse, expected)
    assert difference(logits(made.model, merged(made.params)), ours) < 1e-5


def test_every_mesh_starts_alike(tiny_model):
    path = tiny_model("qwen2")
    one, many = assembled(path), assembled(path, {"fsdp": 4, "tensor": 2})
    for names in (("attention", "q_proj"), ("mlp", "down_proj")):
        np.testing.assert_allclose(ops.dense(leaf(many, *names)), ops.dense(leaf(one, *names)), atol=1e-5)
        np.testing.assert_array_equal(leaf(many, *names).base.codes, leaf(one, *names).base.codes)
    shapes = assembled(path, {"fsdp": 4, "tensor": 2}, init="shapes")
    assert jax.tree.map(lambda x: (x.shape, x.sharding), shapes.params) == jax.tree.map(
        lambda x: (x.shape, x.sharding), many.params
    )


@pytest.mark.parametrize(("times", "method"), [(1, "lora"), (2, "loftq")])
def test_an_adapter_is_a_plain_one_where_the_base_is_plainly_quantised(tiny_model, tmp_path, times, method):
    path = tiny_model("qwen2")
    made = assembled(path, section=tune_section(method="loftq", rank=4, loftq_iter=times))
    save_adapter(
        tmp_path / "adapter", tune_section(method="loftq", rank=4, loftq_iter=times), made.model.weights, made.params
    )
    section = read_config(tmp_path / "adapter")
    assert section.method == method and getattr(section, "loftq_iter", 1) == times
    again = assembled(path, section=section)
    np.testing.assert_array_equal(logits(again.model, again.params), logits(made.model, made.params))


@pytest.mark.parametrize(
    ("quantize", "double", "stored"),
    [("nf4", False, 4), ("int8", False, 8), ("int4", False, "int4"), ("fp4", True, "fp4 double_quant")],
)
@pytest.mark.filterwarnings("ignore:::peft")
def test_an_adapter_whose_base_peft_would_make_otherwise_is_refused_by_peft_and_told_of(
    tiny_model, tmp_path, quantize, double, stored
):
    """PEFT's loftq_init knows bitsandbytes' nf4, its scales as they are, and int8."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, bits = tiny_model("qwen2"), 8 if quantize == "int8" else 4
    section = tune_section(method="loftq", rank=4, targets=["q_proj"], loftq_iter=2, loftq_bits=bits)
    made = assembled(path, section=section, quantize=quantize, double_quant=double)
    save_adapter(tmp_path / "adapter", section, made.model.weights, made.params)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["loftq_config"] == {
        "loftq_bits": stored,
        "loftq_iter": 2,
    }
    assert read_config(tmp_path / "adapter").loftq_bits == bits
    once = section.model_copy(update={"loftq_iter": 1})
    assert check(once, made.source.config, made.source.scheme) == []
    told = check(section, made.source.config, made.source.scheme)
    if stored == bits:
        assert told == []
        return
    assert f"tune.loftq_iter 2 over {stored}: PEFT" in told[0] and "--onto dequantized" in told[0]
    with pytest.raises(ValueError, match="Only nf4 and int8 quantization is supported"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "quantize", "words"),
    [
        ({}, None, "q_proj is not quantised as it is loaded; set model.quantize"),
        ({"targets": ["lm_head"]}, "nf4", "lm_head is not quantised"),
        ({"loftq_bits": 8}, "nf4", "tune.loftq_bits 8: model.quantize: nf4 has 4"),
    ],
    ids=str,
)
def test_a_base_that_is_not_quantised_here_is_refused(tiny_model, settings, quantize, words):
    with pytest.raises(ConfigError, match=words):
        assembled(tiny_model("qwen2"), section=tune_section(method="loftq", **settings), quantize=quantize)
