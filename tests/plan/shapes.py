"""Settings for the tests of plans: a small model, and the shape of a large one."""

import math

import jax

from jaxtune.config import make_config
from jaxtune.mesh import make_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.plan.program import make_step
from jaxtune.plan.target import GENERIC, Target

SMALL = ModelConfig("qwen2", 512, 64, 128, 4, 8, 2, 8, 256)
# Qwen2.5-72B
LARGE = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "architectures": ["Qwen2ForCausalLM"],
}


def config(**sections):
    """A configuration of a model and data that are not there."""
    own = {"tune": {"method": "full"}, "data": {"max_length": 64}, "train": {"batch_size": 16}, "mesh": {"fsdp": 1}}
    tree = {name: {**own.get(name, {}), **sections.get(name, {})} for name in {**own, **sections}}
    tree["data"]["path"] = "nowhere.json"
    return make_config({"model": {"path": "nowhere"}, **tree})


def target(count):
    return Target("cpu", jax.devices()[:count], GENERIC)


def step_of(settings, model=SMALL):
    """The step on as many of the fake devices as its mesh has."""
    count = math.prod(size for size in settings.mesh.sizes.values())
    return make_step(settings, model, make_mesh(settings.mesh, jax.devices()[:count]))
