"""Every method that PEFT has: its adapters in ours and ours in it give the same logits, merged ones too, and ten steps
of training give its losses.

A method has rows in CASES; what is compared is the same for all. Methods with more to show have files of their own.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.config import make_config, tune_section
from jaxtune.mesh import single_device_mesh
from jaxtune.program import build
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_config import read_config, to_peft
from jaxtune.tune.peft_io import save_adapter
from jaxtune.tune.peft_tensors import TENSORS_NAME
from jaxtune.tune.virtual import EMBEDDINGS, ENCODER_FILE
from tests.tune.support import (
    SIZES,
    after_virtual,
    difference,
    logits,
    peer_logits,
    peer_model,
    randomised,
    shaken,
    tuned,
)

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

TOLERANCE = 1e-4
QWEN2 = {"family": "qwen2", "tied": True}
LLAMA = {"family": "llama", "tied": False}
BIASED = {"family": "llama", "tied": False, "attention_bias": True, "mlp_bias": True}
QWEN3 = {"family": "qwen3", "tied": True, "head_dim": 8}
SPLIT = ["q_proj", "o_proj", "down_proj"]  # by outputs, and by inputs, where a mesh has a tensor axis

# name -> (base model, options of the section)
CASES = {
    "ia3": (QWEN2, {"method": "ia3"}),
    "ia3 on maps with biases": (BIASED, {"method": "ia3", "targets": ["q_proj", "o_proj", "up_proj", "down_proj"]}),
    "ia3 in some layers, a norm saved": (QWEN2, {"method": "ia3", "layers": [0, 2], "modules_to_save": ["norm"]}),
    "prompt": (QWEN2, {"method": "prompt", "num_virtual_tokens": 5}),
    "P-tuning with an MLP": (LLAMA, {"method": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 24}),
    "P-tuning with an LSTM": (
        QWEN2,
        {"method": "p_tuning", "num_virtual_tokens": 6, "encoder_reparameterization_type": "LSTM"},
    ),
    "P-tuning with an LSTM of one layer": (
        LLAMA,
        {
            "method": "p_tuning",
            "num_virtual_tokens": 3,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 10,
            "encoder_num_layers": 1,
        },
    ),
    "prefix": (QWEN2, {"method": "prefix", "num_virtual_tokens": 5}),
    "prefix of normalised keys": (QWEN3, {"method": "prefix", "num_virtual_tokens": 2}),
    "prefix with a projection": (
        LLAMA,
        {"method": "prefix", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 24},
    ),
    "ia3 without feed-forward modules": (LLAMA, {"method": "ia3", "targets": ["v_proj"], "feedforward_modules": []}),
    "dora": (QWEN2, {"method": "dora", "rank": 4, "targets": "all-linear"}),
    "dora on the ends, a rank by pattern": (
        LLAMA,
        {"method": "dora", "targets": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"layers.1.*": 3}},
    ),
    "dora in some layers, rsLoRA": (QWEN2, {"method": "dora", "layers": [0, 2], "use_rslora": True, "bias": "all"}),
    # Not rank 4: a weight's fourth and fifth singular values are so near that either side's rounding, which depends on
    # the CPU, turns their vectors.
    "pissa": (QWEN2, {"method": "pissa", "rank": 3, "targets": "all-linear"}),
    "pissa, ranks by pattern, rsLoRA": (
        LLAMA,
        {
            "method": "pissa",
            "targets": ["q_proj", "lm_head"],
            "use_rslora": True,
            "rank_pattern": {"layers.1.*": 3},
            "alpha_pattern": {"layers.2.*": 3.0},
        },
    ),
    "adalora": (QWEN2, {"method": "adalora", "init_r": 4, "target_r": 2, "total_step": 10, "targets": "all-linear"}),
    "adalora in some layers": (LLAMA, {"method": "adalora", "total_step": 5, "layers": [0, 2], "alpha": 16}),
    "oft": (QWEN2, {"method": "oft", "targets": SPLIT, "oft_block_size": 8}),
    "oft, exact, all biases": (
        QWEN2,
        {"method": "oft", "oft_block_size": 8, "use_cayley_neumann": False, "bias": "all", "layers": [0, 2]},
    ),
    "oft by rank, with 3 terms, on the head": (
        LLAMA,
        {
            "method": "oft",
            "targets": ["q_proj", "lm_head"],
            "oft_block_size": 0,
            "rank": 4,
            "num_cayley_neumann_terms": 3,
        },
    ),
    "oft with a shared matrix": (
        BIASED,
        {"method": "oft", "targets": SPLIT, "oft_block_size": 4, "block_share": True, "bias": "oft_only"},
    ),
    "vera": (QWEN2, {"method": "vera", "targets": SPLIT, "rank": 6, "d_initial": 0.3}),
    "vera on the head, without its matrices in the file": (
        LLAMA,
        {
            "method": "vera",
            "targets": ["q_proj", "v_proj", "lm_head"],
            "rank": 3,
            "exclude": ["layers.1.self_attn.q_proj"],
            "save_projection": False,
            "projection_prng_key": 7,
        },
    ),
    "vera in some layers, all biases": (QWEN2, {"method": "vera", "rank": 4, "layers": [0, 2], "bias": "all"}),
    "layernorm": (QWEN2, {"method": "layernorm"}),
    "layernorm of heads in some layers, the head saved": (
        {"family": "qwen3", "tied": False},
        {
            "method": "layernorm",
            "targets": r".*layers\.[12]\..*(q_norm|input_layernorm)",
            "modules_to_save": ["lm_head"],
        },
    ),
    "trainable tokens": (QWEN2, {"method": "trainable_tokens", "token_indices": [40, 5, 13]}),
    "trainable tokens of an embedding alone": (LLAMA, {"method": "trainable_tokens", "token_indices": [40, 5, 13]}),
    "trainable tokens of embedding and head": (
        LLAMA,
        {
            "method": "trainable_tokens",
            "token_indices": [7, 44, 0, 30, 21, 2, 12, 13],
            "targets": ["embed_tokens", "lm_head"],
        },
    ),
    "loha": (QWEN2, {"method": "loha", "targets": SPLIT, "rank": 2, "alpha": 3}),
    "loha with patterns, in some layers": (
        LLAMA,
        {
            "method": "loha",
            "targets": ["q_proj", "lm_head"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"layers.0.*": 2.5},
            "layers": [0, 2],
        },
    ),
    "lokr": (
        QWEN2,
        {"method": "lokr", "targets": SPLIT, "rank": 2, "alpha": 3, "rank_pattern": {"layers.0.self_attn.q_proj": 3}},
    ),
    "lokr, both low-rank, by a factor": (
        LLAMA,
        {
            "method": "lokr",
            "targets": ["q_proj", "down_proj"],
            "rank": 1,
            "decompose_both": True,
            "decompose_factor": 4,
            "layers": [0, 1],
            "init": "lycoris",
        },
    ),
    "lokr, both whole": (QWEN2, {"method": "lokr", "rank": 16, "exclude": ["layers.1.self_attn.q_proj"]}),
}
UNMERGEABLE = {"prompt", "p_tuning", "prefix"}  # methods that no weight can take up
TRAINED = [
    "ia3",
    "ia3 on maps with biases",
    "dora",
    "oft",
    "oft, exact, all biases",
    "vera",
    "loha",
    "lokr",
    "prompt",
    "P-tuning with an MLP",
    "P-tuning with an LSTM",
    "prefix",
    "prefix with a projection",
    "layernorm",
    "trainable tokens",
    "trainable tokens of embedding and head",
]
STEPS, LR = 10, 1e-2

each = pytest.mark.parametrize(("base", "options"), CASES.values(), ids=list(CASES))


def peer_of(made, base):
    """peft's model for the same section, with its own first values."""
    from peft import PeftConfig, get_peft_model

    return get_peft_model(peer_model(**base), PeftConfig.from_peft_type(**trains(made)))


def trains(made):
    return {**to_peft(made.section, made.model.weights, None), "inference_mode": False}


def loaded(directory, base, **options):
    from peft import PeftModel

    return PeftModel.from_pretrained(peer_model(**base), directory, **options)


def assert_merged_alike(made, model):
    """Our merged weights and peft's give the same logits. model: with the same adapter, which is given up."""
    if made.section.method not in UNMERGEABLE:
        ours = logits(made.model, merged(made.params))
        assert difference(ours, peer_logits(model.merge_and_unload())) < TOLERANCE


@each
def test_an_adapter_that_peft_made_computes_the_same_here(tmp_path, base, options):
    model = shaken(peer_of(tuned(tune_section(**options), **base), base))
    model.save_pretrained(tmp_path)
    made = tuned(read_config(tmp_path), **base)
    expected = peer_logits(model)
    assert difference(peer_logits(peer_model(**base)), expected) > 0.01  # it does something
    assert difference(logits(made.model, made.params), expected) < TOLERANCE
    assert_merged_alike(made, model)


@each
def test_an_adapter_of_ours_computes_the_same_in_peft(tmp_path, base, options):
    made = randomised(tuned(tune_section(**options), **base))
    save_adapter(tmp_path / "adapter", made.section, made.model.weights, made.params)
    model = loaded(tmp_path / "adapter", base).eval()
    ours = logits(made.model, made.params)
    assert difference(ours, peer_logits(peer_model(**base))) > 0.01
    assert difference(ours, peer_logits(model)) < TOLERANCE
    assert_merged_alike(made, model)


def batch(step):
    """Rows of equal length; half of the tokens are supervised: (tokens, labels)."""
    draw = np.random.default_rng(step % 3)
    tokens = draw.integers(0, SIZES["vocab_size"], (4, 16))
    labels = np.where(draw.random(tokens.shape) < 0.5, tokens, -100)
    labels[:, 0] = -100  # peft would predict it from the last virtual token, but not of a prefix
    return tokens, labels


def our_batch(step, model):
    tokens, labels = batch(step)
    before = len(model.virtual_ids)
    tokens, labels = after_virtual(model, tokens), np.pad(labels, ((0, 0), (before, 0)), constant_values=-100)
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    arrays = {
        "tokens": tokens,
        "targets": np.maximum(targets, 0),
        "mask": (targets != -100).astype(np.float32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
        "segments": np.ones_like(tokens),
    }
    return {name: jnp.asarray(array)[None] for name, array in arrays.items()}


def our_run(made, lr=LR):
    """(losses, the last state) of a run of STEPS steps."""
    optim = {"lr": lr, "schedule": "constant", "warmup": 0, "clip_norm": None}
    config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, "tune": made.section, "optim": optim})
    program = build(config, made.model, single_device_mesh(), made.params, made.mask, STEPS)
    state, losses = program.state, []
    for step in range(1, STEPS + 1):
        state, metrics = program.train_step(state, program.frozen, our_batch(step, made.model), jnp.int32(step))
        losses.append(float(metrics["loss"]))
    return losses, state


def our_losses(made, lr=LR):
    return our_run(made, lr)[0]


def peer_losses(model, optimizer=None):
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    losses = []
    for step in range(1, STEPS + 1):
        tokens, labels = (torch.tensor(x) for x in batch(step))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def started(made, base, directory):
    """peft's model in training, with the same start. Its prompts train only where they are new."""
    if not made.model.virtual_ids:
        return loaded(directory, base, is_trainable=True)
    model, encoder = peer_of(made, base), directory / ENCODER_FILE
    state = load_file(encoder if encoder.exists() else directory / TENSORS_NAME)
    names = {EMBEDDINGS: "embedding.weight"}
    tensors = {names.get(name, name): torch_array(array) for name, array in state.items()}
    model.prompt_encoder["default"].load_state_dict(tensors)
    return model


def torch_array(array):
    import torch

    return torch.tensor(array)


@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_follow_peft_s(tmp_path, name):
    base, options = CASES[name]
    made = tuned(tune_section(**options), **base)
    save_adapter(tmp_path / "start", made.section, made.model.weights, made.params)
    model = started(made, base, tmp_path / "start").train()
    expected = peer_losses(model)
    assert expected[-1] < 0.98 * expected[0]
    np.testing.assert_allclose(our_losses(made), expected, rtol=1e-4)
