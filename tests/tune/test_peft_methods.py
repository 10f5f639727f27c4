"""Every method that PEFT has: its adapters in ours and ours in it give the same logits, merged ones too, and ten steps
of training give its losses.

A method has rows in CASES; what is compared is the same for all. Methods with more to show have files of their own.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import make_config, tune_section
from jaxtune.mesh import single_device_mesh
from jaxtune.program import build
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_config import to_peft
from jaxtune.tune.peft_io import save_adapter
from tests.tune.support import SIZES, difference, logits, peer_logits, peer_model, randomised, tuned

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

TOLERANCE = 1e-4
QWEN2 = {"family": "qwen2", "tied": True}
LLAMA = {"family": "llama", "tied": False}
BIASED = {"family": "llama", "tied": False, "attention_bias": True, "mlp_bias": True}
SPLIT = ["q_proj", "o_proj", "down_proj"]  # by outputs, and by inputs, where a mesh has a tensor axis

# name -> (base model, options of the section)
CASES = {
    "ia3": (QWEN2, {"method": "ia3"}),
    "ia3 on maps with biases": (BIASED, {"method": "ia3", "targets": ["q_proj", "o_proj", "up_proj", "down_proj"]}),
    "ia3 in some layers, a norm saved": (QWEN2, {"method": "ia3", "layers": [0, 2], "modules_to_save": ["norm"]}),
    "ia3 without feed-forward modules": (LLAMA, {"method": "ia3", "targets": ["v_proj"], "feedforward_modules": []}),
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
UNMERGEABLE: set[str] = set()  # methods that no weight can take up
TRAINED = ["ia3", "ia3 on maps with biases", "oft", "oft, exact, all biases", "vera", "loha", "lokr"]
STEPS, LR = 10, 1e-2

each = pytest.mark.parametrize(("base", "options"), CASES.values(), ids=list(CASES))


def peer_of(made, base):
    """peft's model for the same section, with its own first values."""
    from peft import PeftConfig, get_peft_model

    return get_peft_model(peer_model(**base), PeftConfig.from_peft_type(**trains(made)))


def trains(made):
    return {**to_peft(made.section, made.model.weights, None), "inference_mode": False}


def shaken(model):
    """Random numbers in everything that trains."""
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.2
    return model.eval()


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
    made = tuned(tune_section(method=options["method"], adapter=str(tmp_path)), **base)
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
    return tokens, np.where(draw.random(tokens.shape) < 0.5, tokens, -100)


def our_batch(step):
    tokens, labels = batch(step)
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    arrays = {
        "tokens": tokens,
        "targets": np.maximum(targets, 0),
        "mask": (targets != -100).astype(np.float32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
        "segments": np.ones_like(tokens),
    }
    return {name: jnp.asarray(array)[None] for name, array in arrays.items()}


def our_losses(made):
    optim = {"lr": LR, "schedule": "constant", "warmup": 0, "clip_norm": None}
    config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, "tune": made.section, "optim": optim})
    program = build(config, made.model, single_device_mesh(), made.params, made.mask, STEPS)
    state, losses = program.state, []
    for step in range(1, STEPS + 1):
        state, metrics = program.train_step(state, program.frozen, our_batch(step), jnp.int32(step))
        losses.append(float(metrics["loss"]))
    return losses


def peer_losses(model):
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for step in range(1, STEPS + 1):
        tokens, labels = (torch.tensor(x) for x in batch(step))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_follow_peft_s(tmp_path, name):
    base, options = CASES[name]
    made = tuned(tune_section(**options), **base)
    save_adapter(tmp_path / "start", made.section, made.model.weights, made.params)
    model = loaded(tmp_path / "start", base, is_trainable=True).train()
    expected = peer_losses(model)
    assert expected[-1] < 0.98 * expected[0]
    np.testing.assert_allclose(our_losses(made), expected, rtol=1e-4)
