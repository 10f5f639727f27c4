"""LoRA+ moves every number as peft's create_loraplus_optimizer does."""

import numpy as np
import pytest

from jaxtune.config import make_tune, tune_section
from jaxtune.errors import ConfigError
from jaxtune.tune import rates
from jaxtune.tune.peft_io import save_adapter
from tests.tune.support import tuned
from tests.tune.test_peft_methods import BIASED, LR, loaded, our_losses, peer_losses

RATIO, OF_EMBEDDING = 4.0, 3e-3


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ten_steps_follow_peft_s(tmp_path, method):
    import torch
    from peft.optimizers import create_loraplus_optimizer

    section = tune_section(
        method=method,
        rank=4,
        targets=["q_proj", "down_proj", "embed_tokens"],
        bias="all",
        loraplus_lr_ratio=RATIO,
        loraplus_lr_embedding=OF_EMBEDDING,
    )
    made = tuned(section, **BIASED)
    save_adapter(tmp_path / "start", made.section, made.model.weights, made.params)
    model = loaded(tmp_path / "start", BIASED, is_trainable=True).train()
    own = {"loraplus_lr_ratio": RATIO, "loraplus_lr_embedding": OF_EMBEDDING}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR / 4, **own)
    expected = peer_losses(model, optimizer)
    assert expected[-1] < 0.95 * expected[0]
    np.testing.assert_allclose(our_losses(made, LR / 4), expected, rtol=1e-4)


def test_each_number_has_the_rate_of_its_group():
    made = tuned(tune_section(method="dora", targets=["q_proj", "embed_tokens"], loraplus_lr_ratio=8.0))
    found = rates(made.section, made.model.weights, made.mask, 1e-3)
    table, linear = found["embed"]["weight"], found["stacks"]["0"]["attention"]["q_proj"]["weight"]
    assert (table.a, table.b, table.magnitude) == (1e-3, 1e-3, 8.0)
    assert (linear.a, linear.b, linear.magnitude) == (1.0, 8.0, 8.0)


def test_a_rate_of_the_embedding_without_lora_plus_does_nothing_and_is_refused():
    with pytest.raises((ConfigError, ValueError), match="loraplus_lr_embedding would do nothing without"):
        make_tune({"method": "lora", "loraplus_lr_embedding": 1e-5})
