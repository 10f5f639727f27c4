"""Hugging Face configs in and out: every model family is a row of settings of the one decoder.

A config field is used, known to change nothing, or refused by name; none is skipped. The defaults and
their order of precedence are those of transformers 5.23.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.errors import ModelError, listing, nearest
from jaxtune.files import inside, read_json
from jaxtune.models.config import ModelConfig
from jaxtune.models.fields import Fields
from jaxtune.models.rope_config import read_rope, write_rope


@dataclass(frozen=True)
class Family:
    """What transformers' class of this model_type fixes, and what it reads from the config."""

    architecture: str
    qkv_bias: bool | None = None  # None: as the config's attention_bias says, the output projection too
    mlp_bias: bool = False  # reads mlp_bias
    qk_norm: bool = False
    windows: str = "none"  # none | every layer | by layer
    defaults: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", mlp_bias=True, defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        qkv_bias=False,
        windows="every layer",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        windows="by layer",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        windows="by layer",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
    ),
}

QUANTIZE_CONFIG = "quantize_config.json"

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """The settings in the config.json of a directory, or in a .gguf file.

    overrides: Hugging Face fields put over those of the file.

    Raises:
        ModelError: an unknown model_type, or a field that is wrong or that the decoder cannot follow.
    """
    if path.suffix == ".gguf":
        from jaxtune.gguf_io import read_gguf_config

        hf, where = read_gguf_config(path), str(path)
    else:
        file = inside(path, "config.json", ModelError, str(path))
        hf, where = _with_quantize_config(path, read_json(file, ModelError)), str(file)
    return parse_config({**hf, **(overrides or {})}, where, tuple(overrides or ()))


def _with_quantize_config(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Older GPTQ models have their quantization_config in a file of its own."""
    if hf.get("quantization_config") is not None or not (path / QUANTIZE_CONFIG).exists():
        return hf
    settings = read_json(inside(path, QUANTIZE_CONFIG, ModelError, str(path)), ModelError)
    return {**hf, "quantization_config": {"quant_method": "gptq", **settings}}


def parse_config(hf: dict[str, Any], where: str = "config.json", overrides: tuple[str, ...] = ()) -> ModelConfig:
    """The settings in a config.json that is already read; `where` names it in errors.

    overrides: names of the fields in it that come from `model.overrides`.
    """
    fields = Fields(hf, where, overrides)
    model_type = fields.text("model_type", "")
    if model_type not in FAMILIES:
        allowed = listing(FAMILIES, 20)
        fields.refuse("model_type", f"supported: {allowed}{nearest(model_type, FAMILIES)}")
    family = FAMILIES[model_type]
    fields.defaults = family.defaults
    _refuse_own_code(fields)
    fields.table("quantization_config")  # quant/checkpoints.py reads it
    config = ModelConfig(
        model_type=model_type,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        max_positions=fields.whole("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", False),
        activation=_activation(fields),
        qk_norm=family.qk_norm,
        init_std=fields.number("initializer_range", 0.02),
        windows=_windows(fields, family),
        hf=hf,
        **_heads(fields),
        **_biases(fields, family),
        rope=read_rope(fields),
    )
    if config.rope.type == "dynamic" and config.head_dim == 2:
        fields.refuse("rope_scaling", "dynamic scaling needs head_dim above 2")
    fields.refuse_the_rest()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json to write: the fields that were read, with the settings of `config` over them."""
    family = FAMILIES[config.model_type]
    hf = {
        **config.hf,
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
    }
    if "head_dim" in hf or family.defaults.get("head_dim") or config.head_dim * config.num_heads != config.hidden_size:
        hf["head_dim"] = config.head_dim
    if ACTIVATIONS.get(hf.get("hidden_act", "")) != config.activation:
        names = {"gelu_tanh": "gelu_pytorch_tanh"}
        hf["hidden_act"] = names.get(config.activation, config.activation)
    if family.qkv_bias is None:
        hf["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        hf["mlp_bias"] = config.mlp_bias
    for name in ("auto_map", "quantization_config"):
        hf.pop(name, None)
    hf = _with_windows(hf, family, config.windows)
    return write_rope(hf, config.rope)


def _refuse_own_code(fields: Fields) -> None:
    own = fields.table("auto_map") or {}
    if any(name in own for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")):
        fields.refuse("auto_map", "this model is defined by Python code in its repository, which is never run here")


def _activation(fields: Fields) -> str:
    name = fields.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        fields.refuse("hidden_act", f"supported: {listing(ACTIVATIONS, 20)}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _heads(fields: Fields) -> dict[str, Any]:
    heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    kv_heads = fields.whole("num_key_value_heads", heads)
    head_dim = fields.whole("head_dim", 0, low=0)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"must divide num_attention_heads, {heads}")
    if not head_dim:
        if hidden % heads:
            fields.refuse("num_attention_heads", f"without head_dim it must divide hidden_size, {hidden}")
        head_dim = hidden // heads
    if head_dim % 2:
        fields.refuse("head_dim", f"{head_dim} is odd; rotary positions need an even one")
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}


def _biases(fields: Fields, family: Family) -> dict[str, Any]:
    if family.qkv_bias is None:
        attention = fields.flag("attention_bias", False)
        biases = {"qkv_bias": attention, "out_bias": attention}
    else:
        fields.only("attention_bias", family.qkv_bias)
        biases = {"qkv_bias": family.qkv_bias, "out_bias": False}
    if family.mlp_bias:
        return {**biases, "mlp_bias": fields.flag("mlp_bias", False)}
    fields.only("mlp_bias", False)
    return biases


def _windows(fields: Fields, family: Family) -> tuple[int | None, ...]:
    """By layer, how many positions back a token sees, itself counted: key k is seen from query q if q - k < w."""
    layers = fields.whole("num_hidden_layers")
    switched_on = fields.flag("use_sliding_window", False)
    first = fields.whole("max_window_layers", 28, low=0)
    width = fields.whole("sliding_window", 0, low=0) or None
    if family.windows == "none":
        fields.only("sliding_window", None)
        fields.only("use_sliding_window", False)
        width = None
    if family.windows == "by layer":
        width = width if switched_on else None
    else:
        first = 0
    plain = [width if layer >= first else None for layer in range(layers)]
    return tuple(_by_layer_types(fields, plain, width, family))


def _by_layer_types(fields: Fields, plain: list, width: int | None, family: Family) -> list[int | None]:
    """The windows as `layer_types` has them, where it is given."""
    types = fields.items("layer_types")
    if types is None:
        return plain
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != len(plain):
        fields.refuse("layer_types", f"expected full_attention or sliding_attention for each of {len(plain)} layers")
    if "sliding_attention" in types and width is None:
        fields.refuse("layer_types", "sliding_attention, but no window is set (use_sliding_window, sliding_window)")
    windows = [width if kind == "sliding_attention" else None for kind in types]
    if family.windows != "by layer" and windows != plain:
        fields.refuse("layer_types", f"{family.architecture} has the same attention in every layer")
    return windows


def _with_windows(hf: dict, family: Family, windows: tuple[int | None, ...]) -> dict:
    """`hf` with the fields that give these windows."""
    widths = {width for width in windows if width is not None}
    assert len(widths) <= 1, f"one window width for all layers, found {windows}"
    width = next(iter(widths), None)
    if family.windows == "every layer":
        return {**hf, "sliding_window": width}
    if family.windows == "none":
        return hf
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return {**hf, "use_sliding_window": width is not None, "sliding_window": width, "layer_types": types}
