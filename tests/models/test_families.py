"""A Hugging Face config means here what it means in transformers, or is refused by the field's name."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxtune.errors import ModelError
from jaxtune.models.config import Rope
from jaxtune.models.families import FAMILIES, parse_config, read_config, to_hf
from jaxtune.models.rope import frequencies

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64


def config(model_type="llama", **fields):
    return {"model_type": model_type, **SIZES, **fields}


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "every head its own kv": {"num_key_value_heads": 4},
    "kv heads null": {"num_key_value_heads": None},
    "own head size": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu"},
    "eps and init": {"rms_norm_eps": 1e-5, "initializer_range": 0.05},
    "old theta": {"rope_theta": 500000},
    "old linear": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "old yarn": {"rope_theta": 1e6, "rope_scaling": YARN},
    "old yarn, factor from lengths": {"rope_scaling": YARN | {"factor": None}},
    "old yarn, original beside it": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "old yarn, finetuned": {"rope_scaling": YARN | {"finetuned": True}},
    "old llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "old null": {"rope_theta": 1e6, "rope_scaling": None},
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "new yarn": {"rope_parameters": YARN | {"rope_theta": 1e6, "truncate": False, "beta_fast": 16}},
    "new yarn, truncate null": {"rope_parameters": YARN | {"rope_theta": 1e6, "truncate": None}},
    "new llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "new without theta": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "new and old theta agree": {"rope_theta": 7e4, "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}},
}


def assert_means_the_same(hf):
    """Compare with transformers' own config class, and with its rotary frequencies."""
    hf = json.loads(json.dumps(hf))
    peer, ours = AutoConfig.for_model(**json.loads(json.dumps(hf))), parse_config(hf)
    assert ours.num_kv_heads == peer.num_key_value_heads
    assert ours.head_dim == getattr(peer, "head_dim", None) or peer.hidden_size // peer.num_attention_heads
    assert ours.tied == peer.tie_word_embeddings
    assert ours.norm_eps == peer.rms_norm_eps
    assert ours.init_std == peer.initializer_range
    assert ours.max_positions == peer.max_position_embeddings
    kind = peer.rope_parameters["rope_type"]
    assert (ours.rope.type, ours.rope.theta) == (kind, peer.rope_parameters["rope_theta"])
    if kind != "default":
        want, scale = ROPE_INIT_FUNCTIONS[kind](peer)
        inverse, factor = frequencies(ours.rope, ours.head_dim, ours.max_positions)
        assert inverse == pytest.approx(want.numpy(), rel=1e-6)
        assert factor == pytest.approx(scale)


EVERY = [(f, v) for f in FAMILIES for v in VARIANTS if (f, v) != ("mistral", "kv heads null")]  # refused there


@pytest.mark.parametrize(("model_type", "variant"), EVERY)
def test_a_config_means_what_it_means_in_transformers(model_type, variant):
    assert_means_the_same(config(model_type, **VARIANTS[variant]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_have_the_familys_defaults(model_type):
    absent = ("num_key_value_heads", "max_position_embeddings")
    hf = {k: v for k, v in config(model_type, num_attention_heads=32, hidden_size=64).items() if k not in absent}
    assert_means_the_same(hf)


@pytest.mark.parametrize(("model_type", "variant"), EVERY)
def test_to_hf_gives_the_same_settings_back_here_and_in_transformers(model_type, variant):
    ours = parse_config(config(model_type, **VARIANTS[variant]))
    written = json.loads(json.dumps(to_hf(ours)))
    assert parse_config(written) == ours
    assert parse_config(to_hf(dataclasses.replace(ours, hf={}))) == ours
    assert_means_the_same(written)


def test_to_hf_keeps_the_original_fields_and_follows_what_was_changed():
    ours = parse_config(config("qwen2", eos_token_id=7, use_cache=False, tie_word_embeddings=True, auto_map={}))
    changed = dataclasses.replace(ours, tied=False, vocab_size=200, rope=Rope(theta=123.0), windows=(8, None, 8, None))
    written = to_hf(changed)
    assert (written["eos_token_id"], written["use_cache"]) == (7, False)
    assert "auto_map" not in written
    assert "head_dim" not in written
    assert parse_config(written) == changed
    assert written["architectures"] == ["Qwen2ForCausalLM"]


WINDOWS = [
    ("qwen2", {}, [None] * 4),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, [None, None, 16, 16]),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, [4096] * 4),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2}, [None] * 4),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        [8, None, 8, None],
    ),
    ("mistral", {}, [4096] * 4),
    ("mistral", {"sliding_window": None}, [None] * 4),
    ("mistral", {"sliding_window": 5}, [5] * 4),
    ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4}, [5] * 4),
    ("llama", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, [None] * 4),
]


@pytest.mark.parametrize(("model_type", "fields", "windows"), WINDOWS)
def test_windows_by_layer_are_those_of_transformers(model_type, fields, windows):
    hf = config(model_type, **fields)
    peer = AutoConfig.for_model(**json.loads(json.dumps(hf)))
    types = getattr(peer, "layer_types", None)
    if model_type == "mistral":
        types = ["full_attention" if peer.sliding_window is None else "sliding_attention"] * 4
    assert list(parse_config(hf).windows) == windows
    if model_type != "llama":
        assert [peer.sliding_window if t == "sliding_attention" else None for t in types] == windows


def test_a_window_counts_the_token_itself_as_in_transformers_masks():
    seen = sliding_window_causal_mask_function(3)
    assert [bool(seen(0, 0, torch.tensor(10), torch.tensor(key))) for key in (7, 8, 9, 10, 11)] == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("model_type", "fields", "qkv", "out", "mlp"),
    [
        ("qwen2", {}, True, False, False),
        ("mistral", {}, False, False, False),
        ("llama", {}, False, False, False),
        ("llama", {"attention_bias": True}, True, True, False),
        ("llama", {"mlp_bias": True}, False, False, True),
        ("qwen3", {}, False, False, False),
        ("qwen3", {"attention_bias": True}, True, True, False),
    ],
)
def test_biases_are_the_familys(model_type, fields, qkv, out, mlp):
    ours = parse_config(config(model_type, **fields))
    assert (ours.qkv_bias, ours.out_bias, ours.mlp_bias) == (qkv, out, mlp)
    assert ours.qk_norm == (model_type == "qwen3")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_that_transformers_writes_is_accepted(model_type):
    written = AutoConfig.for_model(**config(model_type)).to_dict()
    parse_config(json.loads(json.dumps(written)))


def test_the_fields_of_a_published_config_are_accepted():
    parse_config(
        config(
            "llama",
            is_llama_config=True,
            rope_interleaved=False,
            pretraining_tp=1,
            torch_dtype="bfloat16",
            _name_or_path="x",
            unknown_but_null=None,
            **{"transformers.js_config": {"kv_cache_dtype": {}}},
        )
    )


REFUSED = [
    ({"model_type": "qwen4"}, "model_type", 'did you mean "qwen'),
    ({"model_type": None}, "model_type", "supported: llama"),
    ({"attention_dropout": 0.1}, "attention_dropout", "allowed: 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "allowed: 1"),
    ({"pretraining_tp": 2}, "pretraining_tp", "allowed: 1"),
    ({"quantization_config": "nf4"}, "quantization_config", "expected an object"),
    ({"attention_multiplier": 0.1}, "attention_multiplier", "not supported"),
    ({"no_such_field": False}, "no_such_field", "not supported"),
    ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map", "never run"),
    ({"hidden_act": "sillu"}, "hidden_act", 'did you mean "silu"'),
    ({"hidden_size": "32"}, "hidden_size", "whole number"),
    ({"hidden_size": 32.0}, "hidden_size", "whole number"),
    ({"hidden_size": True}, "hidden_size", "whole number"),
    ({"hidden_size": None}, "hidden_size", "whole number"),
    ({"vocab_size": 10**30}, "vocab_size", "whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "from 1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads", "must divide"),
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads", "must divide hidden_size"),
    ({"head_dim": 7}, "head_dim", "odd"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps", "not below 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
    ({"sliding_window": 8}, "sliding_window", "allowed: null"),
    ({"use_sliding_window": True}, "use_sliding_window", "allowed: false"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types", "no window"),
    ({"layer_types": ["linear_attention"] * 4}, "layer_types", "expected full_attention"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types", "4 layers"),
    ({"layer_types": 4}, "layer_types", "list of strings"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, "type", "supported: default"),
    ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "type", 'allowed: "linear"'),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor", "missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor", "at least 1"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast", "no such setting"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section", "no such setting"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor", "missing"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor", "more than"),
    ({"rope_scaling": [1]}, "rope_scaling", "object"),
    ({"rope_theta": -1}, "rope_theta", "number"),
    ({"rope_theta": 1.0}, "rope_theta", "above 1"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta", "keep one"),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_scaling", "keep one"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention", "no such setting"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}}, "256", "9"),
]


@pytest.mark.parametrize(("fields", "name", "says"), REFUSED)
def test_a_field_that_cannot_be_followed_is_refused_by_name(fields, name, says):
    with pytest.raises(ModelError) as refusal:
        parse_config(config(**fields), "here/config.json")
    message = str(refusal.value)
    assert message.startswith("here/config.json")
    assert name in message
    assert says in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sizes": 48}, 'model.overrides: hidden_sizes is 48; no such field .* did you mean "hidden_size"?'),
        ({"hidden_size": "48"}, "model.overrides: hidden_size is '48'; expected a whole number"),
        ({"rope_scaling": {"type": "new"}}, "model.overrides: rope_scaling: type is 'new'; supported"),
        ({"num_hidden_layers": 2, "layer_types": ["x"]}, "model.overrides: layer_types"),
        ({"hidden_size": 62}, "config.json with model.overrides: num_attention_heads is 4; .* divide hidden_size, 62"),
    ],
)
def test_what_an_override_breaks_is_not_blamed_on_the_file(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(config(head_dim=None)))
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path, fields)


@pytest.mark.parametrize(
    ("model_type", "fields"), [("qwen2", {"attention_bias": False}), ("mistral", {"mlp_bias": True})]
)
def test_a_bias_that_the_family_cannot_have_is_refused(model_type, fields):
    with pytest.raises(ModelError, match=next(iter(fields))):
        parse_config(config(model_type, **fields))


def test_a_tokenizers_own_code_is_no_reason_to_refuse_the_model():
    parse_config(config(auto_map={"AutoTokenizer": ["x.Y", None]}))


def test_the_file_is_read_from_a_directory_and_overrides_win(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert read_config(tmp_path).num_layers == 4
    changed = read_config(tmp_path, {"num_hidden_layers": 2, "tie_word_embeddings": True})
    assert (changed.num_layers, changed.tied, changed.hf["num_hidden_layers"]) == (2, True, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"rms_norm_eps": NaN}', "the number NaN"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json") as refusal:
        read_config(tmp_path)
    assert says in str(refusal.value)


def test_a_config_that_links_out_of_its_directory_is_refused(tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps(config()))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to("../secret.json")
    with pytest.raises(ModelError, match="outside"):
        read_config(model)
