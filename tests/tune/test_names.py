"""Our matching of module names is peft's, function by function."""

from types import SimpleNamespace

import pytest

from jaxtune.models.decoder import Model
from jaxtune.tune import names
from jaxtune.tune.names import Modules
from tests.tune.support import model_config, peer_model

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def modules() -> Modules:
    return Modules.of(Model.create(model_config("qwen2", tied=False)).weights)


def ours(name, targets, exclude=None, saved=(), layers=None) -> bool:
    return (
        names.is_named(name, targets)
        and not (exclude and names.is_named(name, exclude))
        and not names.in_saved(name, saved)
        and names.in_layers(name, targets, layers)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["proj"]},
        {"targets": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"targets": ["lm_head", "embed_tokens"]},
        {"targets": r".*\.(q|v)_proj"},
        {"targets": "q_proj"},
        {"targets": r"model\.layers\.[02]\..*_proj"},
        {"targets": ["q_proj", "up_proj"], "exclude": ["layers.0.self_attn.q_proj"]},
        {"targets": ["q_proj", "up_proj"], "exclude": r".*\.1\..*"},
        {"targets": ["q_proj", "up_proj", "lm_head"], "saved": ["mlp"]},
        {"targets": ["q_proj", "up_proj"], "saved": ["layers.1"]},
        {"targets": ["q_proj"], "saved": ["proj"]},
        {"targets": ["q_proj", "lm_head", "embed_tokens"], "layers": [0, 2]},
        {"targets": ["q_proj", "model.layers.0.mlp.up_proj", "model.embed_tokens"], "layers": 1},
    ],
    ids=str,
)
def test_a_module_is_targeted_when_peft_targets_it(modules, settings):
    from peft.tuners.tuners_utils import check_target_module_exists

    config = SimpleNamespace(
        target_modules=settings["targets"],
        exclude_modules=settings.get("exclude"),
        modules_to_save=settings.get("saved"),
        layers_to_transform=settings.get("layers"),
    )
    for name in modules.all:
        found = check_target_module_exists(config, name)
        theirs = bool(found) and "Excluded" not in type(found).__name__
        assert ours(name, **settings) == theirs, name


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"^model.layers.0.self_attn.q_proj": 1, "q_proj": 2},
        {"q_proj": 2, "^model.layers.0.self_attn.q_proj": 1},
        {"layers.[01].*": 1, "self_attn.(q|k)_proj": 2},
        {"roj": 1, "model.*": 2},
        {"mlp": 1},
    ],
    ids=str,
)
def test_a_pattern_decides_for_a_module_when_it_does_in_peft(modules, patterns):
    from peft.utils.other import get_pattern_key

    for name in modules.all:
        assert names.by_pattern(name, patterns, None) == patterns.get(get_pattern_key(list(patterns), name)), name


def test_the_modules_that_we_know_are_those_of_the_peer(modules):
    import torch

    kinds = {name: type(module) for name, module in peer_model("qwen2", tied=False).named_modules() if name}
    assert set(modules.linears) | {modules.head} == {name for name, kind in kinds.items() if kind is torch.nn.Linear}
    assert [modules.embedding] == [name for name, kind in kinds.items() if kind is torch.nn.Embedding]
    # The rest has no weights.
    assert set(modules.others) <= set(kinds)
    assert {name.rpartition(".")[2] for name in kinds.keys() - set(modules.all)} == {"act_fn", "rotary_emb"}
