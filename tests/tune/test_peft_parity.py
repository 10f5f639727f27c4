"""Our adapters in peft and peft's in ours give the same logits; merged models likewise."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.config import tune_section
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_io import save_adapter
from tests.tune.support import difference, logits, peer_adapter, peer_logits, peer_model, randomised, tuned

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

TOLERANCE = 1e-4
QWEN2_TIED = {"family": "qwen2", "tied": True}
LLAMA = {"family": "llama", "tied": False}
LLAMA_BIASED = {"family": "llama", "tied": False, "attention_bias": True, "mlp_bias": True}
QWEN3 = {"family": "qwen3", "tied": True, "head_dim": 8}

CASES = {
    "the seed recipe": (QWEN2_TIED, {"rank": 8, "alpha": 32, "dropout": 0.1}),
    "every linear map": (LLAMA, {"targets": "all-linear"}),
    "every linear map but one": (QWEN3, {"targets": "all-linear", "exclude": ["o_proj"]}),
    "exclusion by regex": (LLAMA, {"targets": ["up_proj", "q_proj"], "exclude": r".*\.0\..*"}),
    "a regex": (QWEN2_TIED, {"targets": r".*\.(q_proj|down_proj)"}),
    "whole names": (LLAMA, {"targets": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"]}),
    "rsLoRA, gaussian": (QWEN2_TIED, {"rank": 3, "alpha": 7.5, "use_rslora": True, "init": "gaussian"}),
    "rank by pattern": (
        QWEN2_TIED,
        {"rank": 4, "rank_pattern": {"model.layers.1.self_attn.q_proj": 6, "v_proj": 2, "^model.layers.2.*q_proj": 1}},
    ),
    "alpha by pattern": (LLAMA, {"alpha_pattern": {"layers.0.self_attn.q_proj": 3.5, "layers.[12].*v_proj": 40}}),
    "rank, alpha and rsLoRA": (
        LLAMA,
        {"use_rslora": True, "rank_pattern": {"layers.0.*": 3}, "alpha_pattern": {"q_proj": 5, "layers.0.*": 9}},
    ),
    "some layers": (QWEN2_TIED, {"layers": [0, 2]}),
    "one layer, and the head": (LLAMA, {"layers": 1, "targets": ["q_proj", "lm_head"]}),
    "the embedding": (LLAMA, {"targets": ["q_proj", "embed_tokens"]}),
    "the embedding of a tied model": (QWEN2_TIED, {"targets": ["embed_tokens"]}),
    "the head": (LLAMA, {"targets": ["lm_head", "v_proj"]}),
    "the head of a tied model": (QWEN2_TIED, {"targets": ["lm_head", "v_proj"], "alpha": 3}),
    "both ends of a tied model": (QWEN2_TIED, {"targets": ["lm_head", "embed_tokens"], "use_rslora": True}),
    "all biases": (QWEN2_TIED, {"bias": "all"}),
    "all biases, also of MLP and output": (LLAMA_BIASED, {"bias": "all", "targets": ["q_proj", "down_proj"]}),
    "the targets' biases": (QWEN2_TIED, {"bias": "lora_only", "layers": [1]}),
    "the targets' biases, also of the MLP": (LLAMA_BIASED, {"bias": "lora_only", "targets": ["o_proj", "up_proj"]}),
    "saved norms": (QWEN3, {"modules_to_save": ["norm"]}),
    "a saved head": (LLAMA, {"modules_to_save": ["lm_head"]}),
    "a saved head of a tied model": (QWEN2_TIED, {"modules_to_save": ["lm_head"]}),
    "a saved embedding of a tied model": (QWEN2_TIED, {"modules_to_save": ["embed_tokens"]}),
    "both ends saved of a tied model": (QWEN2_TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a saved head, an adapted embedding": (
        QWEN2_TIED,
        {"targets": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "a saved linear map of one layer": (LLAMA, {"modules_to_save": ["model.layers.1.mlp.gate_proj"]}),
    "saved MLPs": (QWEN2_TIED, {"modules_to_save": ["mlp"]}),
    "a saved map with a bias, all biases": (QWEN2_TIED, {"modules_to_save": ["k_proj"], "bias": "all"}),
}
# peft adds the delta to the one array that head and embedding share there: the head moves with the embedding.
PEER_MERGES_WRONG = {
    "the embedding of a tied model",
    "the head of a tied model",
    "both ends of a tied model",
    "a saved head, an adapted embedding",
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_gives_the_same_logits_in_peft_and_in_ours(case, tmp_path):
    from peft import PeftModel

    base, settings = CASES[case]
    section = tune_section(**settings)

    ours = randomised(tuned(section, **base))
    expected = logits(ours.model, ours.params)
    save_adapter(tmp_path / "ours", ours.section, ours.model.weights, ours.params, "base")
    plain = logits_of_base(base)
    assert difference(expected, plain) > 0.01, "the adapter changes nothing: the comparison would prove nothing"
    theirs = PeftModel.from_pretrained(peer_model(**base), tmp_path / "ours").eval()
    assert difference(expected, peer_logits(theirs)) < TOLERANCE

    peer_adapter(section, **base).save_pretrained(tmp_path / "theirs")
    # Loaded again, since peft sorts the patterns when it saves them, which can change which one matches first.
    theirs = PeftModel.from_pretrained(peer_model(**base), tmp_path / "theirs").eval()
    ours = tuned(tune_section(adapter=str(tmp_path / "theirs")), **base)
    expected = peer_logits(theirs)
    assert difference(expected, plain) > 0.01
    assert difference(logits(ours.model, ours.params), expected) < TOLERANCE

    whole = merged(ours.params)
    assert difference(logits(ours.model, whole), expected) < TOLERANCE
    if case not in PEER_MERGES_WRONG:
        assert difference(logits(ours.model, whole), peer_logits(theirs.merge_and_unload())) < TOLERANCE


def logits_of_base(base: dict) -> np.ndarray:
    return peer_logits(peer_model(**base))


@pytest.mark.parametrize("case", CASES)
def test_peft_writes_the_tensors_that_we_write(case, tmp_path):
    base, settings = CASES[case]
    section = tune_section(**settings)
    ours = tuned(section, **base)
    save_adapter(tmp_path / "ours", section, ours.model.weights, ours.params)
    peer_adapter(section, **base).save_pretrained(tmp_path / "theirs")
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    copies = [name for name in theirs if name.endswith("base_layer.weight") or ".original_module." in name]
    copies += [name for name in theirs if ".modules_to_save." in name]
    assert mine.keys() == theirs.keys() - set(copies)
    assert {name: array.shape for name, array in mine.items()} == {name: theirs[name].shape for name in mine}
    assert all(array.dtype == np.float32 for array in mine.values())


def test_the_config_that_we_write_is_one_that_peft_writes(tmp_path):
    settings = {"rank": 4, "alpha": 8, "rank_pattern": {"v_proj": 2, "q_proj": 3}, "modules_to_save": ["norm"]}
    section = tune_section(
        **settings, dropout=0.25, use_rslora=True, layers=[0, 1], exclude=["layers.0.self_attn.v_proj"]
    )
    ours = tuned(section)
    save_adapter(tmp_path / "ours", section, ours.model.weights, ours.params, "some/base")
    peer_adapter(section).save_pretrained(tmp_path / "theirs")
    mine, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    theirs["base_model_name_or_path"] = "some/base"
    theirs["target_modules"].sort()
    assert mine == {key: theirs[key] for key in mine}
    # Of the keys that only peft writes none is on.
    rest = {
        key: theirs[key] for key in theirs.keys() - mine.keys() - {"peft_version", "megatron_core", "qalora_group_size"}
    }
    assert not any(rest.values()), rest
