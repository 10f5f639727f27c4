"""Twenty AdamW steps follow torch's: transformers, with peft where there is an adapter, on the same batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.assemble import Source, assemble
from jaxtune.config import ModelSection, OptimSection, make_config, tune_section
from jaxtune.mesh import single_device_mesh
from jaxtune.program import build
from jaxtune.tune.peft_io import save_adapter
from tests.peer import VOCAB

STEPS, ROWS, TIME = 20, 4, 32
OPTIM = OptimSection(lr=1e-2, warmup=0.1, weight_decay=0.1, clip_norm=1.0)


def batch(step):
    """One of four batches: rows of different lengths, some tokens supervised, as (tokens, labels, real)."""
    draw = np.random.default_rng(step % 4)
    tokens = draw.integers(3, VOCAB, (ROWS, TIME))
    real = np.arange(TIME) < draw.integers(TIME // 2, TIME + 1, (ROWS, 1))
    labels = np.where(real & (draw.random((ROWS, TIME)) < 0.5), tokens, -100)
    return np.where(real, tokens, 0), labels, real


def ours(tokens, labels, real):
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    arrays = {
        "tokens": tokens,
        "targets": np.maximum(targets, 0),
        "mask": (targets != -100).astype(np.float32),
        "positions": np.broadcast_to(np.arange(TIME), tokens.shape),
        "segments": real.astype(np.int32),
    }
    return {name: jnp.asarray(array)[None] for name, array in arrays.items()}


def our_losses(path, section, adapter=None):
    assembled = assemble(Source.open(ModelSection(path=str(path))), section, single_device_mesh())
    if adapter is not None:
        save_adapter(adapter, section, assembled.model.weights, assembled.params, str(path))
    tree = {"model": {"path": "-"}, "data": {"path": "-"}, "tune": section.model_dump(), "optim": OPTIM.model_dump()}
    program = build(make_config(tree), assembled.model, assembled.mesh, assembled.params, assembled.mask, STEPS)
    step, state, frozen = program.train_step, program.state, program.frozen
    losses = []
    for number in range(1, STEPS + 1):
        state, metrics = step(state, frozen, ours(*batch(number)), jnp.int32(number))
        losses.append(float(metrics["loss"]))
    return losses


def torch_losses(model):
    import torch
    from transformers import get_scheduler

    model.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in named if p.ndim > 1]
    groups = [
        {"params": decays, "weight_decay": OPTIM.weight_decay},
        {"params": [p for name, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    losses = []
    for number in range(1, STEPS + 1):
        tokens, labels, real = (torch.tensor(x) for x in batch(number))
        loss = model(input_ids=tokens, labels=labels, attention_mask=real.long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], OPTIM.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_follow(losses, expected):
    assert expected[-4] < 0.98 * expected[0]  # it did train; the batches repeat
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_full_tuning(tiny_model, family):
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny_model(family, tie_word_embeddings=family == "qwen2")
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert_follow(our_losses(path, tune_section(method="full")), torch_losses(peer))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
def test_lora(tiny_model, tmp_path, targets):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = tiny_model("qwen2")
    section = tune_section(method="lora", rank=4, alpha=16, targets=targets)
    losses = our_losses(path, section, adapter=tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    peer = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    assert_follow(losses, torch_losses(peer))
