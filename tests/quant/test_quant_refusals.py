"""What a quantised base refuses, each before a weight is read."""

import dataclasses
from types import SimpleNamespace

import pytest

from jaxtune.config import ModelSection, make_config
from jaxtune.errors import ConfigError, MeshError, ModelError
from jaxtune.mesh import axes_sharding, single_device_mesh
from jaxtune.models.decoder import Model
from jaxtune.models.families import parse_config, to_hf
from jaxtune.models.weights import leaves_with_path
from jaxtune.parallel.checks import check_fit
from jaxtune.quant.scheme import AtLoad, Quantizer, scheme_of, shapes_of
from tests.quant.support import CONFIG, LORA, configuration

SIZES = {"pipe": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1}
BITSANDBYTES = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def fit(config, model=CONFIG, **sizes):
    check_fit(config, SimpleNamespace(shape={**SIZES, **sizes}, size=8), model)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_double_quant_without_nf4_or_fp4_would_do_nothing(quantize):
    with pytest.raises(ConfigError, match="double_quant belongs to quantize nf4 and fp4"):
        make_config({"model": {"path": "-", "quantize": quantize, "double_quant": True}, "data": {"path": "-"}})


@pytest.mark.parametrize(
    "tune",
    [
        {"method": "full"},
        {"method": "freeze", "freeze_embedding": True},
        {"method": "lora", "targets": ["q_proj"], "modules_to_save": ["down_proj"]},
    ],
    ids=lambda tune: tune["method"],
)
@pytest.mark.parametrize("model", [CONFIG, dataclasses.replace(CONFIG, hf=BITSANDBYTES)], ids=["at load", "checkpoint"])
def test_a_quantised_weight_does_not_train(tune, model):
    with pytest.raises(ConfigError, match=r"would train model\.layers.*a quantised weight cannot train"):
        fit(configuration(None if model.hf else "nf4", tune=tune), model)
    fit(configuration(tune=tune))


def test_an_adapter_s_refusal_names_the_setting_that_would_train_the_weight():
    tune = {"method": "lora", "targets": ["q_proj"], "modules_to_save": ["down_proj"]}
    with pytest.raises(ConfigError, match=r"tune\.modules_to_save over model\.quantize: nf4 .* leave it out there"):
        fit(configuration("nf4", tune=tune))


PARTLY = {
    "bitsandbytes nf4": {"load_in_4bit": True, "llm_int8_skip_modules": ["down_proj"]},
    "bitsandbytes int8": {"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj"]},
    "gptq": {"bits": 4, "group_size": 32, "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.gate_proj"]]},
    "awq": {"bits": 4, "group_size": 32, "modules_to_not_convert": ["down_proj"]},
}


@pytest.mark.parametrize("name", PARTLY)
def test_a_linear_map_that_the_settings_leave_unquantised_may_train(name):
    settings = {"quant_method": name.split()[0], **PARTLY[name]}
    model = dataclasses.replace(CONFIG, hf={"quantization_config": settings})
    fit(configuration(tune={"method": "lora", "targets": ["q_proj"], "modules_to_save": ["down_proj"]}), model)
    fit(configuration(tune={"method": "freeze", "train_patterns": ["down_proj.weight"]}), model)
    with pytest.raises(
        ConfigError, match=r"would train model\.layers\.0\.mlp\.up_proj\.weight, .*1\.mlp\.up_proj\.weight,"
    ):
        fit(configuration(tune={"method": "freeze", "train_patterns": ["down_proj", "up_proj"]}), model)


def test_what_is_not_quantised_may_train_over_a_quantised_base():
    fit(configuration("nf4", tune={**LORA, "bias": "all"}))
    fit(configuration("nf4", tune={"method": "freeze", "train_patterns": ["norm"]}))


def test_float8_over_a_quantised_base_is_refused():
    with pytest.raises(ConfigError, match=r"precision\.matmul float8 over model\.quantize: int8"):
        fit(configuration("int8", precision={"matmul": "float8"}))


def test_a_mesh_that_cannot_share_out_the_codes_is_refused_with_the_numbers():
    narrow = dataclasses.replace(CONFIG, hidden_size=72)  # 36 bytes a row
    fit(configuration("nf4"), narrow, fsdp=4)
    fit(configuration("int8"), narrow, fsdp=8)
    with pytest.raises(MeshError, match=r"mesh \{fsdp 8\}: the quantised codes of .*\[\d+, 36\], and 36 .* among 8"):
        fit(configuration("nf4", train={"batch_size": 16}), narrow, fsdp=8)


def test_rows_of_odd_length_do_not_fit_in_bytes():
    weights = Model.create(dataclasses.replace(CONFIG, intermediate_size=95)).weights
    odd = next(weight for _, weight in leaves_with_path(weights) if "down_proj" in weight.key)
    with pytest.raises(ModelError, match="rows of 95 numbers"):
        shapes_of(AtLoad("nf4"), odd, "float32")


def test_a_model_that_is_written_unquantised_says_nothing_of_its_base_s_format():
    hf = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        **BITSANDBYTES,
    }
    config = parse_config(hf)
    assert scheme_of(ModelSection(path="-"), config, "-").name == "bitsandbytes fp4"
    assert "quantization_config" not in to_hf(config)


def test_a_skipped_module_stays_as_it_is_in_a_plan():
    settings = {**BITSANDBYTES["quantization_config"], "llm_int8_skip_modules": ["lm_head", "mlp.up_proj"]}
    model = dataclasses.replace(CONFIG, hf={"quantization_config": settings})
    scheme = scheme_of(ModelSection(path="-"), model, "-")
    quantizer = Quantizer(scheme, axes_sharding(single_device_mesh(), model))
    kinds = {
        weight.key.split(".")[-2]: type(shapes_of(quantizer.scheme, weight, "float32")).__name__
        for _, weight in leaves_with_path(Model.create(model).weights)
        if weight.is_linear
    }
    assert kinds.pop("up_proj") == "ShapeDtypeStruct"
    assert set(kinds.values()) == {"FourBit"}
