"""Checkpoints that bitsandbytes quantised. The peer is transformers with bitsandbytes: it writes them, and its logits
with the weights that bitsandbytes dequantises are what ours are compared with."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxtune
from jaxtune.assemble import FULL, Source, assemble
from jaxtune.config import ModelSection
from jaxtune.errors import ConfigError, ModelError
from jaxtune.mesh import single_device_mesh
from jaxtune.models.weights import Weight, leaves_with_path
from jaxtune.quant.checkpoints import format_of
from tests.quant.support import dequantized_logits, edit_config, write_quantized

TOKENS = np.random.default_rng(0).integers(0, 384, (2, 16))
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 stored as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """checkpoint(name) -> a directory that transformers wrote; do not write in it."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = write_quantized(tiny_model(), tmp_path_factory.mktemp("quantised"), **KINDS[name])
        return made[name]

    return make


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(name) -> one to write in."""
    return lambda name: shutil.copytree(checkpoint(name), tmp_path / "copy")


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_weights_that_bitsandbytes_dequantises(checkpoint, name):
    ours = jaxtune.load_model(checkpoint(name)).logits(TOKENS)
    theirs = dequantized_logits(checkpoint(name), TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs).max() > 1


def test_the_codes_are_the_file_s_and_nothing_is_quantised_again(checkpoint):
    directory = checkpoint("fp4 double")
    made = assemble(Source.open(ModelSection(path=str(directory))), FULL, single_device_mesh())
    leaf = made.params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    with safe_open(directory / "model.safetensors", framework="np") as file:
        key = "model.layers.1.self_attn.q_proj.weight"
        np.testing.assert_array_equal(leaf.codes[1].reshape(-1), file.get_tensor(key)[:, 0])
        np.testing.assert_array_equal(leaf.scales[1].reshape(-1), file.get_tensor(f"{key}.absmax"))
        np.testing.assert_array_equal(leaf.nested[1], file.get_tensor(f"{key}.nested_absmax"))
    assert leaf.offset.shape == (2,)


@pytest.mark.parametrize("name", ["nf4 stored as bfloat16", "int8"])
def test_a_checkpoint_lies_in_shards_and_computes_the_same(checkpoint, name):
    alone, spread = (jaxtune.load_model(checkpoint(name), mesh=mesh) for mesh in (None, {"fsdp": 4, "tensor": 2}))
    np.testing.assert_allclose(spread.logits(TOKENS), alone.logits(TOKENS), atol=1e-5)
    for _, leaf in leaves_with_path(spread.params["stacks"]):
        if hasattr(leaf, "codes"):
            assert leaf.codes.addressable_shards[0].data.size * 4 <= leaf.codes.size
    assert spread.generate("hello", max_new_tokens=3) == alone.generate("hello", max_new_tokens=3)


def test_a_model_quantised_as_it_is_loaded_is_the_checkpoint(checkpoint, tiny_model):
    section = ModelSection(path=str(tiny_model()), quantize="nf4")
    made, read = (
        assemble(Source.open(one), FULL, single_device_mesh())
        for one in (section, ModelSection(path=str(checkpoint("nf4"))))
    )
    for ours, theirs in zip(jax.tree.leaves(made.params), jax.tree.leaves(read.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert made.source.scheme.name == "model.quantize: nf4" and read.source.scheme.name == "bitsandbytes nf4"


def test_model_quantize_may_agree_with_a_checkpoint_and_not_contradict_it(checkpoint):
    path = str(checkpoint("nf4"))
    assert Source.open(ModelSection(path=path, quantize="nf4")).scheme.kind == "nf4"
    for section in ({"quantize": "int8"}, {"quantize": "nf4", "double_quant": True}):
        with pytest.raises(ConfigError, match="is quantised already, as bitsandbytes nf4"):
            Source.open(ModelSection(path=path, **section))
    with pytest.raises(ConfigError, match=r"model\.init random"):
        Source.open(ModelSection(path=path, init="random"))


REFUSED = {
    "marlin": ({"quant_method": "marlin"}, "quant_method is 'marlin'; supported: bitsandbytes"),
    "no method": ({"quant_method": None}, "quant_method is None"),
    "both": ({"load_in_8bit": True}, "expected one of the two to be true"),
    "kind": ({"bnb_4bit_quant_type": "af4"}, "supported: nf4, fp4"),
    "fp16": ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    "storage": ({"bnb_4bit_quant_storage": "int64"}, "supported: uint8"),
    "unknown": ({"bnb_5bit": 1}, "bnb_5bit is 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_read_are_refused_by_name(name):
    changes, message = REFUSED[name]
    with pytest.raises(ModelError) as refusal:
        format_of({"quant_method": "bitsandbytes", **KINDS["nf4"], **changes}, "here/config.json")
    assert message in str(refusal.value) and "here/config.json" in str(refusal.value)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_that_are_to_be_skipped_alone_are_named(kind):
    weight = Weight((96, 64), ("mlp", "embed"), "model.layers.{layer}.mlp.up_proj.weight", layers=range(2))
    settings = {"quant_method": "bitsandbytes", **KINDS[kind], "llm_int8_skip_modules": ["layers.0"]}
    with pytest.raises(ModelError) as refusal:
        format_of(settings, "here/config.json").stored(weight, None)
    assert "here/config.json: llm_int8_skip_modules: quantised: model.layers.1." in str(refusal.value)
    assert "; not quantised: model.layers.0.mlp.up_proj.weight; the layers" in str(refusal.value)


def rewrite(directory, change):
    with safe_open(directory / "model.safetensors", framework="np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"


def state_with(**changes):
    def change(tensors):
        key = f"{Q}.quant_state.bitsandbytes__nf4"
        state = json.loads(tensors[key].tobytes()) | changes
        tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def broken_state(tensors):
    tensors[f"{Q}.quant_state.bitsandbytes__nf4"] = np.zeros(9, np.uint8)


def another_table(tensors):
    tensors[f"{Q}.quant_map"] = tensors[f"{Q}.quant_map"] * np.float32(1.001)


def no_scales(tensors):
    del tensors[f"{Q}.absmax"]


def infinite_scale(tensors):
    tensors[f"{Q}.absmax"] = np.full_like(tensors[f"{Q}.absmax"], np.inf)


def plain_layer(tensors):
    for key in [key for key in tensors if key.startswith(Q)]:
        del tensors[key]
    tensors[Q] = np.zeros((64, 64), np.float32)


DAMAGES = {
    "shape": (state_with(shape=[64, 32]), "its quant_state has shape [64, 32]; expected [64, 64]"),
    "blocks": (state_with(blocksize=128), "expected one even number"),
    "state": (broken_state, "is no JSON object"),
    "table": (another_table, "quant_map is not bitsandbytes' table of 16 numbers"),
    "missing": (no_scales, f"missing weights (1): {Q}.absmax"),
    "infinite": (infinite_scale, "not finite"),
    "mixed": (plain_layer, f"quantised: {Q.replace('0', '1')}; not quantised: {Q}; the layers of a model must be"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_is_not_what_it_says_is_refused(copy, name):
    change, message = DAMAGES[name]
    directory = copy("nf4")
    rewrite(directory, change)
    with pytest.raises(ModelError) as refusal:
        jaxtune.load_model(directory)
    assert message in str(refusal.value)


def test_codes_that_the_config_says_nothing_of_are_refused(copy):
    directory = copy("nf4")
    edit_config(directory, quant_method="bitsandbytes", load_in_4bit=False, load_in_8bit=True)
    with pytest.raises(ModelError, match="unknown weights"):
        jaxtune.load_model(directory)
