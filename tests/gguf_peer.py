"""GGUF files written from tiny Hugging Face models, as llama.cpp's converters write them, with the gguf library."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file

ROWS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONTROL, NORMAL, UNKNOWN, USER, UNUSED, BYTE = 3, 1, 2, 4, 5, 6


def ggml_name(key: str) -> str:
    stem, kind = key.rsplit(".", 1)
    if stem in OTHERS:
        return f"{OTHERS[stem]}.{kind}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{ROWS[rest]}.{kind}"


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama's q and k rows: the two halves of a head's rotary dimensions side by side."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path, source: Path, kind: str = "F32", fields: dict | None = None, tensors: dict | None = None
) -> Path:
    """The model in the directory `source` as a .gguf whose matrices are of type `kind`.

    fields: put over those of the file, the architecture's without its prefix; None leaves a field out.
    tensors: more of them, or None for one to leave out.
    """
    config = json.loads((source / "config.json").read_text())
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
    writer = GGUFWriter(path, architecture)
    for name, value in (_model_fields(config) | _word_fields(source) | (fields or {})).items():
        if value is not None:
            _add(writer, name if name.startswith(("tokenizer.", "split.")) else f"{architecture}.{name}", value)
    arrays = {ggml_name(key): array for key, array in load_file(source / "model.safetensors").items()}
    heads = {".attn_q.": config["num_attention_heads"], ".attn_k.": config["num_key_value_heads"]}
    for name, array in (arrays | (tensors or {})).items():
        if array is None:
            continue
        if architecture == "llama":
            turned = [count for part, count in heads.items() if part in name]
            array = interleave(array, turned[0]) if turned else array
        _add_tensor(writer, name, array, kind if array.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    kind = GGMLQuantizationType[kind]
    if array.dtype != np.float32 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


def _model_fields(config: dict) -> dict:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }


def _word_fields(source: Path) -> dict:
    """The fields of the tokenizer in `source`, padded with unused tokens to the size of the embedding."""
    file = json.loads((source / "tokenizer.json").read_text())
    size = json.loads((source / "config.json").read_text())["vocab_size"] if (source / "config.json").exists() else 0
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = source / "chat_template.jinja"
    return {
        **byte_level_fields(file, size),
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.chat_template": template.read_text() if template.exists() else settings.get("chat_template"),
        "tokenizer.ggml.eos_token_id": token_id(file, settings["eos_token"]),
        "tokenizer.ggml.padding_token_id": token_id(file, settings.get("pad_token")),
    }


def token_id(file: dict, token: str | None) -> int | None:
    added = {item["content"]: item["id"] for item in file["added_tokens"]}
    return None if token is None else {**file["model"]["vocab"], **added}[token]


def byte_level_fields(file: dict, size: int = 0) -> dict:
    """Tokens, types and merges of a tokenizer.json of byte-level BPE."""
    ids = dict(file["model"]["vocab"])
    types = dict.fromkeys(ids, NORMAL)
    for item in file["added_tokens"]:
        ids[item["content"]] = item["id"]
        types[item["content"]] = CONTROL if item["special"] else USER
    size = max(size, max(ids.values()) + 1)
    tokens = [f"[PAD{i}]" for i in range(size)]
    for token, i in ids.items():
        tokens[i] = token
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(token, UNUSED) for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }


def _add(writer: GGUFWriter, name: str, value) -> None:
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)
