"""Models in .gguf files: their settings as a Hugging Face config, their weights under Hugging Face keys.

The field and tensor names are those of llama.cpp's converters. The tokenizer is gguf_tokenizer.py's work.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import ModelError, listing, nearest
from jaxtune.gguf_file import GGUF, read_gguf
from jaxtune.models.config import Rope
from jaxtune.models.rope import frequencies
from jaxtune.safetensors_io import Index

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # a Mistral is written as a llama

# Field, without the architecture's prefix -> Hugging Face field.
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
# Fields that are checked elsewhere or say nothing about the mathematics; and those that must have one value.
KNOWN = {"vocab_size", "rope.dimension_count", "attention.value_length", "tensor_data_layout"}
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "pooling_type": 0}
TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The fields of a .gguf file as a Hugging Face config.json would have them.

    Raises:
        ModelError: another architecture, or a field that the decoder cannot follow.
    """
    file = read_gguf(path)
    name = file.architecture
    if name not in ARCHITECTURES:
        allowed = f"{listing(ARCHITECTURES)}{nearest(name, ARCHITECTURES)}"
        raise ModelError(f"{path}: general.architecture is {name!r}; supported: {allowed}")
    own = {key.removeprefix(name + "."): value for key, value in file.fields.items() if key.startswith(name + ".")}
    _refuse_unknown(path, name, own)
    hf = {theirs: own[ours] for ours, theirs in FIELDS.items() if ours in own}
    hf["model_type"] = "mistral" if name == "llama" and "sliding_window" in hf else name
    if name != "llama" and hf.get("sliding_window"):
        hf |= {"use_sliding_window": True, "max_window_layers": 0}  # the file has one width, of all layers
    _set_defaults(hf)
    if "token_embd.weight" in file.tensors:
        hf["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = "output.weight" not in file.tensors
    if name != "qwen2" and hf["model_type"] != "mistral":
        hf["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if hf["model_type"] == "llama":
        hf["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    _check_head_dim(path, own, hf)
    hf["rope_scaling"] = _rope_scaling(file, own, hf)
    ids = {theirs: file.fields.get(f"tokenizer.ggml.{ours}") for theirs, ours in TOKEN_IDS.items()}
    return {**hf, **ids}


def _set_defaults(hf: dict[str, Any]) -> None:
    """What llama.cpp takes for the heads that a file says nothing of; the families' configs have defaults of their own.

    Where they do not fit together, the config's reader says so.
    """
    heads, hidden = hf.get("num_attention_heads"), hf.get("hidden_size")
    if heads:
        hf.setdefault("num_key_value_heads", heads)
    if heads and hidden and hidden % heads == 0:
        hf.setdefault("head_dim", hidden // heads)


def _refuse_unknown(path: Path, name: str, own: dict[str, Any]) -> None:
    for key, value in own.items():
        if key in FIELDS and type(value) in (int, float):
            continue
        if key in KNOWN or key.startswith("rope.scal") or NEUTRAL.get(key, ...) == value:
            continue
        raise ModelError(
            f"{path}: {name}.{key} is {value!r:.200}; it may change what the model computes: not supported"
        )


def _check_head_dim(path: Path, own: dict[str, Any], hf: dict[str, Any]) -> None:
    """Keys, values and rotary positions have the same size of head."""
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // max(1, hf.get("num_attention_heads", 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ModelError(f"{path}: {key} is {own[key]}, the head size {head_dim}; supported: both the same")


def _rope_scaling(file: GGUF, own: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any] | None:
    scaling = {key.removeprefix("rope.scaling."): v for key, v in own.items() if key.startswith("rope.scaling.")}
    scaling.pop("finetuned", None)
    # As llama.cpp has it: the older scale_linear counts where there is no factor; without a type it is linear's.
    if "rope.scale_linear" in own:
        scaling.setdefault("factor", own["rope.scale_linear"])
    kind = scaling.pop("type", "linear" if scaling.get("factor", 1) not in (0, 1) else "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3(file, hf)
    names = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    names |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"} if kind == "yarn" else {}
    unknown = set(scaling) - set(names)
    if kind == "none":
        unknown = {key for key in unknown & {"attn_factor"} if scaling[key] != 1}  # the others do nothing then
    if kind not in ("none", "linear", "yarn") or unknown:
        found = f"{kind} with {listing(sorted(scaling)) or 'nothing'}"
        raise ModelError(f"{file.path}: rope.scaling is {found}; supported: none, linear, yarn with {listing(names)}")
    if kind == "none":
        return None
    if kind == "linear":
        scaling.pop("original_context_length", None)
    return {"rope_type": kind, **{names[key]: value for key, value in scaling.items()}}


def _llama3(file: GGUF, hf: dict[str, Any]) -> dict[str, Any]:
    """llama3's settings, found again from the factors that the converter computed from them.

    The file has only the factors. The published models share three of the four settings, and the fourth is
    the largest factor; what they give must be the file's own numbers.
    """
    shape = file.tensors[ROPE_FACTORS].shape
    factors = file.read_rows(ROPE_FACTORS, 0, shape[0]) if len(shape) == 1 else np.empty(0)
    if not factors.size or not np.isfinite(factors).all() or not (factors > 0).all():
        raise ModelError(f"{file.path}: {ROPE_FACTORS} is no row of factors above 0; the file is damaged")
    factor, original = float(factors.max()), 8192
    rope = Rope("llama3", hf.get("rope_theta", 10000.0), factor, original, low_freq_factor=1.0, high_freq_factor=4.0)
    head_dim = 2 * len(factors)
    scaled = frequencies(rope, head_dim, original)[0]
    plain = frequencies(Rope(theta=rope.theta), head_dim, original)[0]
    if not np.allclose(plain / scaled, factors, rtol=1e-4) or math.isclose(factor, 1.0):
        raise ModelError(f"{file.path}: {ROPE_FACTORS} is not that of a Llama 3 model; use its Hugging Face directory")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


class GGUFSource:
    """The weights of a .gguf file, each part dequantised to float32 when it is read."""

    def __init__(self, path: Path):
        self.where = str(path)
        self.file = read_gguf(path)
        self.names = {_key(name): name for name in self.file.tensors if name != ROPE_FACTORS}
        self.shapes = {key: self.file.tensors[name].shape for key, name in self.names.items()}
        own = self.file.architecture
        heads = self.file.fields.get(f"{own}.attention.head_count", 1)
        turned = own == "llama"  # the others keep Hugging Face's order of rotary dimensions
        kv_heads = self.file.fields.get(f"{own}.attention.head_count_kv", heads)
        self.heads = {"attn_q": heads, "attn_k": kv_heads} if turned else {}

    def read(self, key: str, index: Index) -> np.ndarray:
        """The part `index` of the weight `key`, in float32."""
        name = self.names[key]
        start, stop, _ = index[0].indices(self.shapes[key][0])
        heads = self.heads.get(name.split(".")[-2])
        if heads is None:
            return self.file.read_rows(name, start, stop)[(slice(None), *index[1:])]
        rows = _stored_rows(self.shapes[key][0] // heads, start, stop)
        first, last = int(rows.min(initial=start)), int(rows.max(initial=start)) + 1
        return self.file.read_rows(name, first, last)[rows - first][(slice(None), *index[1:])]


def _stored_rows(head_dim: int, start: int, stop: int) -> np.ndarray:
    """Where rows start..stop of Hugging Face's q or k lie in a llama file.

    Within a head, dimension i and its rotary partner i + D/2 are stored side by side, as 2i and 2i + 1.
    """
    rows = np.arange(start, stop)
    head, row = np.divmod(rows, head_dim)
    half, i = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * i + half


def _key(name: str) -> str:
    """The Hugging Face key of a tensor; an unknown name stays, and is then reported as an unknown weight."""
    stem, _, kind = name.rpartition(".")
    if stem in TENSORS:
        return f"{TENSORS[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None or layer[2] not in LAYER_TENSORS:
        return name
    return f"model.layers.{layer[1]}.{LAYER_TENSORS[layer[2]]}.{kind}"
