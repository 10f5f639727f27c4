"""Full tuning and freezing: which weights train. The peer is transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tune
from jaxtune.config import tune_section
from jaxtune.errors import AdapterError
from jaxtune.models.decoder import Model
from jaxtune.models.weights import leaves_with_path
from tests.tune.support import TOKENS, base_params, model_config, peer_model, settings_id, tuned


def trained(tied: bool = True, **settings) -> set[str]:
    """Hugging Face keys of what trains, from the mask that the step gets."""
    section = tune_section(**settings)
    config, stacks = tune.layout(section, model_config(tied=tied))
    weights = Model.create(config, stacks).weights
    params, mask = tune.apply(section, base_params(weights, tied=tied), weights, 0)
    declared, masks = dict(leaves_with_path(weights)), dict(leaves_with_path(mask))
    assert declared.keys() == masks.keys() == dict(leaves_with_path(params)).keys()
    return {key for path, weight in declared.items() if masks[path] for key in weight.keys}


ALL = trained(method="full")


def in_layers(*layers: int) -> set[str]:
    return {key for key in ALL if any(f"layers.{layer}." in key for layer in layers)}


def test_full_trains_every_weight():
    assert len(ALL) == 2 + 3 * (2 + 7 + 3)
    assert trained(tied=False, method="full") == ALL | {"lm_head.weight"}


def test_the_padding_token_s_row_trains_like_any_other():
    """transformers, which makes `pad_token_id` the embedding's `padding_idx`, gives it no gradient."""
    import torch

    made, peer, pad = tuned(tune_section(method="full"), tied=False), peer_model(tied=False), int(TOKENS[0, 0])
    peer.get_input_embeddings().padding_idx = pad
    peer(torch.tensor(TOKENS)).logits.square().mean().backward()
    theirs = peer.get_input_embeddings().weight.grad.numpy()

    def loss(params):
        where = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        hidden, _ = made.model.hidden(params, TOKENS, where, jnp.ones_like(TOKENS))
        return jnp.mean(made.model.logits(params, hidden) ** 2)

    ours = np.asarray(jax.jit(jax.grad(loss))(made.params)["embed"]["weight"])
    assert not theirs[pad].any() and np.abs(ours[pad]).max() > 0.1 * np.abs(theirs).max()
    rest = np.arange(len(ours)) != pad
    np.testing.assert_allclose(ours[rest], theirs[rest], atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze_embedding": True}, ALL - {"model.embed_tokens.weight"}),
        ({"freeze_first": 1}, ALL - in_layers(0)),
        ({"freeze_first": 2, "freeze_embedding": True}, in_layers(2) | {"model.norm.weight"}),
        ({"freeze_last": 2}, ALL - in_layers(1, 2)),
        ({"freeze_first": 1, "freeze_last": 1}, ALL - in_layers(0, 2)),
        ({"freeze_first": 3}, {"model.embed_tokens.weight", "model.norm.weight"}),
        ({"freeze_patterns": [r"\.bias$", "embed"]}, {k for k in ALL if "bias" not in k and "embed" not in k}),
        ({"train_patterns": ["norm"]}, {k for k in ALL if "norm" in k}),
        ({"train_patterns": [r"layers\.2\."], "freeze_patterns": ["mlp"]}, {k for k in in_layers(2) if "mlp" not in k}),
        ({"train_patterns": [r"layers\.1\.mlp", "norm"], "freeze_last": 1}, None),
    ],
    ids=settings_id,
)
def test_what_is_frozen_does_not_train_and_the_rest_does(settings, expected):
    if expected is None:
        expected = {k for k in ALL if "norm" in k or "layers.1.mlp" in k} - in_layers(2)
    assert trained(method="freeze", **settings) == expected


def test_freezing_the_embedding_of_an_untied_model_leaves_the_head_training():
    assert trained(tied=False, method="freeze", freeze_embedding=True) == ALL - {"model.embed_tokens.weight"} | {
        "lm_head.weight"
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["nothing is frozen", "method: full"]),
        ({"freeze_first": 4}, ["freeze_first", "4 layers", "has 3"]),
        ({"freeze_last": 4}, ["freeze_last", "4 layers", "has 3"]),
        ({"freeze_patterns": ["q_prj"]}, ["freeze_patterns", "q_prj", 'did you mean "q_proj"']),
        ({"train_patterns": [r"layers\.0\.self_atn"]}, ["train_patterns", 'did you mean "self_attn"']),
        ({"train_patterns": ["lm_head"]}, ["train_patterns", "tied head has no name"]),
        ({"freeze_patterns": ["("]}, ["freeze_patterns", "not a regular expression"]),
        ({"freeze_patterns": ["model"]}, ["every weight is frozen"]),
        ({"train_patterns": ["mlp"], "freeze_embedding": True}, ["freeze_embedding", "would train anyway"]),
        ({"train_patterns": ["layers.0"], "freeze_patterns": ["layers.1"]}, ["freeze_patterns", "would train anyway"]),
    ],
    ids=settings_id,
)
def test_a_setting_that_matches_nothing_or_does_nothing_is_named(settings, words):
    with pytest.raises(AdapterError) as error:
        tune.layout(tune_section(method="freeze", **settings), model_config())
    assert all(word in str(error.value) for word in words), str(error.value)
