"""Logits equal transformers' within 1e-4 of the largest, in float32, for every setting that the decoder has."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.assemble import FULL, Source, assemble
from jaxtune.config import ModelSection
from jaxtune.mesh import single_device_mesh
from tests.peer import VOCAB

LENGTH = 80
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2 all kv heads": ("qwen2", {"num_key_value_heads": 4}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama dynamic": (
        "llama",
        {
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama own head size": ("llama", {"head_dim": 32}),
    "llama gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral sliding": ("mistral", {"sliding_window": 24}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 biases, yarn": ("qwen3", {"attention_bias": True, "rope_parameters": YARN}),
}


def our_logits(path, tokens, positions=None, segments=None):
    assembled = assemble(Source.open(ModelSection(path=str(path))), FULL, single_device_mesh())
    model = assembled.model
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    hidden, _ = model.hidden(assembled.params, jnp.array(tokens), jnp.array(positions), jnp.array(segments))
    return np.asarray(model.logits(assembled.params, hidden))


def peer_logits(path, tokens, **inputs):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), **inputs).logits.numpy()


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def draw(rows=2, length=LENGTH, vocab=VOCAB):
    return np.random.default_rng(0).integers(0, vocab, (rows, length))


@pytest.mark.parametrize("case", CASES)
def test_settings(tiny_model, case):
    family, settings = CASES[case]
    path = tiny_model(family, **settings)
    assert_close(our_logits(path, draw()), peer_logits(path, draw()))


@pytest.mark.parametrize("variant", ["bfloat16", "float16", "many files"])
def test_files(tiny_model, variant):
    settings = {"max_shard_size": "60KB"} if variant == "many files" else {"dtype": variant}
    path = tiny_model("llama", **settings)
    assert ((path / "model.safetensors.index.json").exists()) == (variant == "many files")
    assert_close(our_logits(path, draw()), peer_logits(path, draw()))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "default"])
def test_old_and_new_rope_fields_mean_the_same(tiny_model, tmp_path, kind):
    scaling = {"linear": {"factor": 3.0}, "dynamic": {"factor": 2.0}, "yarn": YARN, "llama3": LLAMA3, "default": {}}[
        kind
    ]
    new = {**scaling, "rope_type": kind, "rope_theta": 2e4}
    path = tiny_model("llama", max_position_embeddings=48, rope_parameters=new)
    config = json.loads((path / "config.json").read_text())
    theta = config["rope_parameters"].pop("rope_theta")
    old = config.pop("rope_parameters")
    config |= {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": old.pop("rope_type"), **old},
    }
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    copied = tmp_path / "model.safetensors"
    copied.unlink()
    copied.write_bytes((path / "model.safetensors").read_bytes())
    np.testing.assert_array_equal(our_logits(tmp_path, draw()), our_logits(path, draw()))


def test_packed_documents_have_the_logits_that_they_have_alone(tiny_model):
    path = tiny_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    tokens = draw(rows=1)
    lengths = [30, 50]
    packed = our_logits(
        path,
        tokens,
        np.concatenate([np.arange(n) for n in lengths])[None],
        np.repeat([1, 2], lengths)[None],
    )
    alone = [peer_logits(path, part) for part in np.split(tokens, [30], axis=1)]
    assert_close(packed, np.concatenate(alone, axis=1))


@pytest.mark.real
@pytest.mark.parametrize("form", ["llama", "qwen2", "gguf"])
def test_smollm2(smollm2, form):
    tokens = draw(rows=1, length=64, vocab=49152)
    assert_close(our_logits(getattr(smollm2, form), tokens), peer_logits(smollm2.llama, tokens))
