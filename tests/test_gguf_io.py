"""A .gguf gives the same settings and weights as the Hugging Face directory that it was made from."""

import dataclasses
import json
import logging
import shutil

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxtune.errors import ModelError
from jaxtune.gguf_file import read_gguf
from jaxtune.hf_io import load_params, open_source, write_model
from jaxtune.models.config import Rope
from jaxtune.models.decoder import Model
from jaxtune.models.families import read_config
from jaxtune.models.rope import frequencies
from jaxtune.models.weights import leaves_with_path, map_tree
from tests.gguf_peer import write_gguf

logging.getLogger("gguf").setLevel(logging.ERROR)


def whole(source, key):
    return source.read(key, tuple(slice(0, size) for size in source.shapes[key]))


def refusal(path, read=read_config) -> str:
    with pytest.raises(ModelError) as caught:
        read(path)
    return str(caught.value)


def same_settings(path, directory, **but):
    """Compare the configs that the file and the directory give; floats have a float32's digits in the file."""
    ours, theirs = read_config(path), dataclasses.replace(read_config(directory), **but)
    assert ours.norm_eps == pytest.approx(theirs.norm_eps)
    assert ours.rope.theta == pytest.approx(theirs.rope.theta)
    rope = dataclasses.replace(theirs.rope, theta=ours.rope.theta)
    # The initialiser's width is no setting of a trained model, and the file does not have it.
    assert ours == dataclasses.replace(theirs, norm_eps=ours.norm_eps, rope=rope, init_std=ours.init_std)


FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, own head size": {"head_dim": 32},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3, biases": {"attention_bias": True, "head_dim": 32},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_and_weights_are_those_of_the_directory(tiny_model, tmp_path, name):
    directory = tiny_model(name.split(",")[0], **FAMILIES[name])
    path = write_gguf(tmp_path / "m.gguf", directory)
    same_settings(path, directory)
    ours, theirs = open_source(path), open_source(directory)
    assert ours.shapes == theirs.shapes
    for key in theirs.shapes:
        np.testing.assert_array_equal(whole(ours, key), whole(theirs, key), err_msg=key)


def test_a_mistral_without_a_window_is_written_as_a_llama(tiny_model, tmp_path):
    directory = tiny_model("mistral", sliding_window=None)
    path = write_gguf(tmp_path / "m.gguf", directory)
    same_settings(path, directory, model_type="llama")
    key = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(whole(open_source(path), key), whole(open_source(directory), key))


def test_a_mistral_with_a_window_keeps_it(tiny_model, tmp_path):
    directory = tiny_model("mistral", sliding_window=8)
    same_settings(write_gguf(tmp_path / "m.gguf", directory, fields={"attention.sliding_window": 8}), directory)


@pytest.mark.parametrize("width", [0, 8])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_makes_no_mistral_of_another_family(tiny_model, tmp_path, family, width):
    windows = {"use_sliding_window": True, "sliding_window": width, "max_window_layers": 0} if width else {}
    directory = tiny_model(family, head_dim=16, **windows)
    same_settings(write_gguf(tmp_path / "m.gguf", directory, fields={"attention.sliding_window": width}), directory)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_heads_that_the_file_says_nothing_of_are_llama_cpps(tiny_model, tmp_path, family):
    directory = tiny_model(family, num_key_value_heads=4, head_dim=16)
    lacks = dict.fromkeys(["attention.head_count_kv", "attention.key_length", "attention.value_length"])
    same_settings(write_gguf(tmp_path / "m.gguf", directory, fields=lacks), directory)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_any_part_of_a_weight_is_that_part_of_the_whole(tiny_model, tmp_path, family):
    source = open_source(write_gguf(tmp_path / "m.gguf", tiny_model(family), "Q8_0"))
    for key, shape in source.shapes.items():
        full = whole(source, key)
        for rows in (slice(0, 1), slice(3, 29), slice(shape[0] - 1, shape[0]), slice(5, 5)):
            index = (rows, slice(7, 33)) if len(shape) == 2 else (rows,)
            np.testing.assert_array_equal(source.read(key, index), full[index], err_msg=key)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_types_are_read_as_the_library_reads_them(tiny_model, tmp_path, kind):
    directory = tiny_model("qwen2")
    source = open_source(write_gguf(tmp_path / "m.gguf", directory, kind))
    key = "model.layers.0.mlp.up_proj.weight"
    kept = gguf.quantize(load_file(directory / "model.safetensors")[key], GGMLQuantizationType[kind])
    np.testing.assert_array_equal(whole(source, key), gguf.dequantize(kept, GGMLQuantizationType[kind]))
    assert whole(source, key).dtype == np.float32


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS"])
def test_types_that_the_library_only_reads_are_read_too(tiny_model, tmp_path, kind):
    """Any bytes are a matrix, and the library says which."""
    kind = GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Halves of small exponent keep the scales in the blocks finite.
    data = np.random.default_rng(0).integers(0, 60, (96, 256 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "m.gguf")
    key = "model.layers.0.mlp.up_proj.weight"
    assert source.shapes == {key: (96, 256)}
    rows = source.read(key, (slice(10, 20), slice(0, 256)))
    np.testing.assert_array_equal(rows, gguf.dequantize(data, kind)[10:20])


def test_integers_are_no_weights(tiny_model, tmp_path):
    tensors = {"blk.0.ffn_up.weight": np.ones((96, 64), np.int32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), tensors=tensors)
    assert "blk.0.ffn_up.weight is I32, which cannot be read" in refusal(
        path, lambda p: whole(open_source(p), "model.layers.0.mlp.up_proj.weight")
    )


def test_the_arrays_load_and_the_model_written_from_them_is_the_directory_again(tiny_model, tmp_path):
    directory = tiny_model("llama", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", directory)
    config = read_config(path)
    weights = Model.create(config).weights
    here = map_tree(lambda _: SingleDeviceSharding(jax.devices()[0]), weights)
    params = load_params(open_source(path), weights, here, "float32")
    write_model(tmp_path / "out", params, weights, config, path, "float32")
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (directory, tmp_path / "out"))
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert {"tokenizer.json", "chat_template.jinja"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_tensor_that_the_decoder_does_not_have_is_an_unknown_weight(tiny_model, tmp_path):
    tensors = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), tensors=tensors)
    weights = Model.create(read_config(path)).weights
    with pytest.raises(ModelError, match=r"unknown weights \(1\): blk\.0\.attn_sinks\.weight"):
        load_params(open_source(path), weights, weights, "float32")


ROPES = {
    "linear": (
        {"rope_type": "linear", "factor": 2.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 128},
    ),
    "linear, old": ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.finetuned": True,
        },
    ),
    "none": ({"rope_type": "default"}, {"rope.scaling.type": "none"}),
    "none, with a factor": ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "no type": ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.factor": 4.0}),
    "no type, old and new": (
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},
    ),
    "no type, and no factor to speak of": ({"rope_type": "default"}, {"rope.scaling.factor": 0.0}),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_is_that_of_the_directory(tiny_model, tmp_path, name):
    rope, fields = ROPES[name]
    directory = tiny_model("qwen2", rope_parameters={"rope_theta": 1e6, **rope})
    same_settings(write_gguf(tmp_path / "m.gguf", directory, fields=fields), directory)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_is_found_again_from_the_factors_in_the_file(tiny_model, tmp_path, factor):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **LLAMA3}
    directory = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16384)
    ours = read_config(directory).rope
    plain, scaled = (frequencies(r, 16, 16384)[0] for r in (Rope(theta=ours.theta), ours))
    tensors = {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    path = write_gguf(tmp_path / "m.gguf", directory, tensors=tensors)
    same_settings(path, directory)
    assert "rope_freqs.weight" not in open_source(path).shapes


@pytest.mark.parametrize("factors", [np.ones((8, 1)), np.zeros(8), np.full(8, np.nan)], ids=["2-d", "0", "nan"])
@pytest.mark.filterwarnings("error")
def test_damaged_rope_factors_are_told(tiny_model, tmp_path, factors):
    path = write_gguf(
        tmp_path / "m.gguf", tiny_model("llama"), tensors={"rope_freqs.weight": factors.astype("float32")}
    )
    assert "rope_freqs.weight is no row of factors above 0" in refusal(path)


def test_other_rope_factors_are_refused(tiny_model, tmp_path):
    tensors = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tensors=tensors)
    assert "rope_freqs.weight is not that of a Llama 3 model" in refusal(path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"expert_count": 8}, "qwen2.expert_count is 8"),
        ({"attention.scale": 0.5}, "qwen2.attention.scale is 0.5"),
        ({"attention.head_count_kv": [2, 1]}, "attention.head_count_kv is [2, 1]"),
        ({"attention.value_length": 8}, "attention.value_length is 8, the head size 16"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8, the head size 16"),
        ({"rope.scaling.type": "longrope"}, "supported: none, linear, yarn"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 0.5}, "yarn with attn_factor"),
        ({"rope.scaling.attn_factor": 0.5}, "none with attn_factor"),
        ({"block_count": None}, "num_hidden_layers is missing"),
        ({"attention.head_count": 0}, "num_attention_heads is 0"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_a_field_that_cannot_be_followed_is_refused_by_name(tiny_model, tmp_path, fields, says):
    message = refusal(write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), fields=fields))
    assert str(tmp_path / "m.gguf") in message
    assert says in message


def test_another_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2moe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = refusal(tmp_path / "m.gguf")
    assert "general.architecture is 'qwen2moe'; supported: llama, qwen2, qwen3" in message


def test_every_truncation_is_refused(tiny_model, tmp_path):
    data = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2", num_hidden_layers=1)).read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(data), len(data) // 40)]:
        cut = tmp_path / f"{length}.gguf"
        cut.write_bytes(data[:length])
        message = refusal(cut)
        assert "not a readable GGUF file" in message
        assert "\n" not in message


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a model at all", b"GGUF" + b"\xff" * 64, bytes(64)])
def test_a_file_that_is_none_is_refused(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    assert "not a readable GGUF file" in refusal(tmp_path / "m.gguf")


def test_an_array_that_claims_to_be_longer_than_the_file_is_refused_at_once(tmp_path):
    head = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 1], "<u8").tobytes()
    field = (
        np.array([1], "<u8").tobytes() + b"x" + np.array([9, 4], "<u4").tobytes() + np.array([2**50], "<u8").tobytes()
    )
    (tmp_path / "m.gguf").write_bytes(head + field)
    assert "inside a field or tensor" in refusal(tmp_path / "m.gguf")


def test_a_file_that_is_not_there_is_one_message(tmp_path):
    assert "No such file" in refusal(tmp_path / "m.gguf")


def test_a_file_is_parsed_once_until_it_changes(tiny_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"))
    first = read_gguf(path)
    assert read_gguf(path) is first
    shutil.copy(write_gguf(tmp_path / "n.gguf", tiny_model("qwen2", num_hidden_layers=1)), path)
    assert read_gguf(path) is not first


@pytest.mark.real
def test_smollm2_is_that_of_transformers(smollm2):
    same_settings(smollm2.gguf, smollm2.llama)
    ours, theirs = open_source(smollm2.gguf), open_source(smollm2.llama)
    assert ours.shapes == theirs.shapes
    for key in theirs.shapes:
        np.testing.assert_array_equal(whole(ours, key), whole(theirs, key), err_msg=key)


def test_the_declared_weights_are_all_there(tiny_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen3", head_dim=32))
    declared = {key for _, weight in leaves_with_path(Model.create(read_config(path)).weights) for key in weight.keys}
    assert declared == set(open_source(path).shapes)
