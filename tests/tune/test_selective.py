"""LayerNorm tuning and BitFit: what trains, what is refused, and PEFT's files of the former. The peer is peft 0.21."""

import json

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune import tune
from jaxtune.errors import AdapterError
from jaxtune.models.decoder import Model
from jaxtune.models.weights import leaves_with_path
from jaxtune.tune.peft_io import load_adapter, save_adapter
from jaxtune.tune.selective import BitFitSection, LayerNormSection, target_norms
from tests.runs import sections, unfinish
from tests.tune.support import (
    base_params,
    difference,
    logits,
    model_config,
    peer_logits,
    peer_model,
    randomised,
    tuned,
)

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

CASES = {
    "default": ("qwen2", {}),
    "final norm only": ("llama", {"targets": ["norm"]}),
    "heads' norms": ("qwen3", {"targets": ["q_norm", "k_norm", "post_attention_layernorm"]}),
    "regex": ("qwen2", {"targets": r".*layers\.[12]\.input_layernorm"}),
    "excluded": ("qwen2", {"exclude": ["model.norm"], "modules_to_save": ["embed_tokens"]}),
}


def trained_keys(made):
    found = []
    for path, weight in leaves_with_path(made.model.weights):
        flag = made.mask
        for part in path:
            flag = flag[part]
        found += [key for key in weight.keys if flag]
    return found


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case, tmp_path):
    from peft import PeftModel

    family, options = CASES[case]
    made = randomised(tuned(LayerNormSection(**options), family))
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    peer = PeftModel.from_pretrained(peer_model(family), tmp_path / "a")
    ours = logits(made.model, made.params)
    assert difference(ours, peer_logits(peer)) < 1e-4
    assert difference(ours, peer_logits(peer.merge_and_unload())) < 1e-4
    assert difference(ours, peer_logits(peer_model(family))) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_pefts(case, tmp_path):
    import torch
    from peft import LNTuningConfig, get_peft_model

    family, options = CASES[case]
    section = LayerNormSection(**options)
    config = LNTuningConfig(
        task_type="CAUSAL_LM",
        target_modules=section.targets,
        exclude_modules=section.exclude,
        modules_to_save=section.modules_to_save or None,
    )
    peer = get_peft_model(peer_model(family), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in peer.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.2
    peer.save_pretrained(tmp_path)
    read, _ = load_adapter(tmp_path)
    assert read.method == "layernorm"
    made = tuned(read, family)
    assert difference(logits(made.model, made.params), peer_logits(peer.eval())) < 1e-4


def test_layers_that_an_adapter_leaves_alone_stay_as_they_were_in_one_stack(tmp_path):
    section = LayerNormSection(targets=r".*layers\.1\.input_layernorm")
    made = randomised(tuned(section))
    save_adapter(tmp_path / "a", section, made.model.weights, made.params)
    again = tune.resolve(LayerNormSection(adapter=str(tmp_path / "a")))
    config, stacks = tune.layout(again, model_config(), one_stack=True)
    model = Model.create(config, stacks)
    params, _ = tune.apply(again, base_params(model.weights), model.weights, 0)
    np.testing.assert_allclose(logits(model, params), logits(made.model, made.params), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["input_layernrom"]}, "did you mean"),
        ({"targets": ["q_proj"]}, "no norm; norms are norm, input_layernorm"),
        ({"exclude": ["input_layernorm", "post_attention_layernorm", "norm"]}, "leaves no norm"),
        ({"exclude": ["q_proj"]}, 'tune.exclude: "q_proj" excludes no target'),
        ({"modules_to_save": ["("]}, 'tune.modules_to_save: "[(]" is not a regular expression'),
        ({"modules_to_save": ["(?i)lm_head"]}, r'tune.modules_to_save: "\(\?i\)lm_head" stands within'),
        ({"exclude": ["layernorm"]}, "tune.exclude"),
        ({"targets": "["}, "regular expression"),
    ],
)
def test_what_names_no_norm_is_refused(options, message):
    weights = Model.create(model_config()).weights
    with pytest.raises(AdapterError, match=message):
        target_norms(LayerNormSection(**options), weights)


def test_bitfit_trains_every_bias_and_nothing_else():
    keys = trained_keys(tuned(BitFitSection()))
    assert len(keys) == 9 and all(key.endswith("_proj.bias") for key in keys)


def test_bitfit_on_a_model_without_biases_is_refused():
    with pytest.raises(AdapterError, match="has none"):
        tuned(BitFitSection(), "llama")


@pytest.mark.parametrize("section", [LayerNormSection(), BitFitSection()])
def test_what_trains_is_float32_over_a_narrow_base(section):
    config, stacks = tune.layout(section, model_config())
    model = Model.create(config, stacks)
    params, mask = tune.apply(section, base_params(model.weights, dtype="bfloat16"), model.weights, 0)
    for array, trains in zip(jax.tree.leaves(params), jax.tree.leaves(mask)):
        assert array.dtype == ("float32" if trains else "bfloat16")


def test_biases_train_over_a_quantised_base_which_stays_as_it_is(tiny_model, tmp_path):
    narrow = {"precision": {"params": "bfloat16"}, "mesh": {"fsdp": 1, "data": 8}}
    tree = sections(tiny_model("qwen2"), tmp_path, steps=2, tune={"method": "bitfit"}, **narrow)
    tree["model"]["quantize"] = "nf4"
    rows, run = jaxtune.train(tree), tmp_path / "run"
    assert rows[-1]["loss"] < rows[0]["loss"]
    tokens = np.arange(12)[None]
    finished = jaxtune.load_model(run).logits(tokens)  # of model/, in bfloat16
    assert all("quantization" not in key for key in json.loads((run / "model" / "config.json").read_text()))
    unfinish(run)
    from_checkpoint = jaxtune.load_model(run).logits(tokens)
    assert difference(finished, from_checkpoint) < 5e-2
