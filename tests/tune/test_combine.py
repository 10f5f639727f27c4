"""Adapters made into one are peft's add_weighted_adapter, way by way; what is wrong is said first."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.config import tune_section
from jaxtune.errors import AdapterError, ConfigError
from jaxtune.tune import combine as module
from jaxtune.tune import peft_io
from jaxtune.tune.combine import combine
from jaxtune.tune.peft_io import load_adapter, save_adapter
from tests.tune.support import difference, logits, peer_logits, peer_model, randomised, tuned

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")
NAMES = ["one", "two", "three"]
WEIGHTS = [0.7, -0.4, 1.2]
SECTIONS = [
    {"rank": 4, "alpha": 8},
    {"rank": 4, "alpha": 2, "targets": ["q_proj", "v_proj", "down_proj"]},
    {"rank": 4, "alpha": 6, "use_rslora": True},
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """Three adapters of one model, of other scales and targets."""
    home, made = tmp_path_factory.mktemp("adapters"), []
    for number, options in enumerate(SECTIONS):
        one = randomised(tuned(tune_section(**options), seed=number))
        save_adapter(home / str(number), one.section, one.model.weights, one.params)
        made.append(home / str(number))
    return made


@pytest.fixture(scope="module")
def peer(adapters):
    """peft's model with all three."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(peer_model(), adapters[0], adapter_name=NAMES[0])
    for name, directory in zip(NAMES[1:], adapters[1:], strict=True):
        model.load_adapter(directory, adapter_name=name)
    return model.eval()


def effect(tensors) -> dict[str, np.ndarray]:
    """B A of each module: two adapters of one effect may differ in A and B."""
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def peer_effect(peer, way, **options):
    name = re.sub(r"\W+", "_", f"{way} {options}").strip("_")
    peer.add_weighted_adapter(NAMES, WEIGHTS, name, combination_type=way, **options)
    config = peer.peft_config[name]
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    named = {key.replace(f".{name}.", "."): x for key, x in peer.named_parameters() if f".{name}." in key}
    found = effect({key: tensor.detach().numpy() for key, tensor in named.items()})
    return {key: delta * scale for key, delta in found.items()}


@pytest.mark.parametrize(
    ("way", "options", "theirs"),
    [
        ("linear", {}, {}),
        ("cat", {}, {}),
        ("svd", {}, {}),
        ("svd", {"rank": 3}, {"svd_rank": 3}),
        ("ties", {"density": 0.5}, {"density": 0.5}),
        ("ties", {"density": 0.7, "sign": "frequency"}, {"density": 0.7, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}, {"density": 0.3}),
        ("ties_svd", {"density": 0.5}, {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.5, "rank": 6}, {"density": 0.5, "svd_rank": 6}),
    ],
)
def test_what_it_makes_is_peft_s(tmp_path, adapters, peer, way, options, theirs):
    combine(adapters, WEIGHTS, tmp_path / "one", way, **options)
    ours, expected = effect(load_file(tmp_path / "one" / "adapter_model.safetensors")), peer_effect(peer, way, **theirs)
    assert ours.keys() == expected.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-5 * np.abs(expected[name]).max(), rtol=1e-4)


@pytest.mark.parametrize("way", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_with_peft_s_draws_is_peft_s(tmp_path, adapters, peer, monkeypatch, way):
    """The two draw from other generators, so here both keep the same numbers: every other one."""
    import peft.utils.merge_utils as theirs
    import torch

    def ours(x, density, random):
        return (x * (np.arange(x.size).reshape(x.shape) % 2) / density).astype(np.float32)

    def pruned(tensor, density, rescale):
        return tensor * (torch.arange(tensor.numel()).reshape(tensor.shape) % 2) / density

    monkeypatch.setattr(module, "_drop_at_random", ours)
    monkeypatch.setattr(theirs, "random_pruning", pruned)
    combine(adapters, WEIGHTS, tmp_path / "one", way, density=0.5)
    found, expected = (
        effect(load_file(tmp_path / "one" / "adapter_model.safetensors")),
        peer_effect(peer, way, density=0.5),
    )
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * np.abs(expected[name]).max(), rtol=1e-4)


def test_dare_keeps_the_share_that_was_asked_for_and_the_expected_value():
    x = np.ones((400, 500), np.float32)
    kept = module._drop_at_random(x, 0.25, np.random.default_rng(0))
    assert (kept != 0).mean() == pytest.approx(0.25, abs=0.01) and kept.mean() == pytest.approx(1, abs=0.02)


def test_cat_has_the_logits_of_the_sum(tmp_path, adapters):
    """Also in peft, which reads the result."""
    from peft import PeftModel

    combine(adapters, [1, 1, 1], tmp_path / "sum", "cat")
    made = tuned(tune_section(adapter=str(tmp_path / "sum")))
    theirs = PeftModel.from_pretrained(peer_model(), tmp_path / "sum").eval()
    assert difference(logits(made.model, made.params), peer_logits(theirs)) < 1e-4
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)


@pytest.mark.parametrize(("second", "expected"), [("org/base", "org/base"), ("org/other", None)])
def test_the_base_model_is_named_where_all_have_the_same(tmp_path, adapters, second, expected):
    for name, base in (("a", "org/base"), ("b", second)):
        shutil.copytree(adapters[0], tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base, "revision": "v1"}))
    combine([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "both", "linear")
    stored = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == (expected, expected and "v1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"way": "avarage"}, "allowed: linear, cat, svd"),
        ({"way": "ties"}, "density goes with"),
        ({"way": "linear", "density": 0.5}, "density goes with"),
        ({"way": "ties", "density": 1.5}, "above 0, up to 1"),
        ({"way": "cat", "rank": 4}, "only with a way that ends in svd"),
        ({"way": "ties", "density": 0.5, "sign": "loudest"}, "total or frequency"),
        ({"way": "dare_linear", "density": 0.5, "sign": "total"}, "only with ties and dare_ties; way is dare_linear"),
        ({"way": "linear", "sign": "frequency"}, "only with ties and dare_ties; way is linear"),
        (
            {"way": "svd", "seed": 0},
            "and only with dare_linear and dare_ties, which draw; way is svd",
        ),
        ({"way": "ties_svd", "density": 0.5, "seed": 1}, "only with dare_linear and dare_ties"),
        ({"way": "dare_linear", "density": 0.5, "seed": -(2**40)}, "seed -1099511627776: 0 or more"),
        ({"weights": [1.0]}, "a weight each"),
        ({"weights": [float("nan"), 1.0, 1.0]}, "weights nan, 1, 1; allowed: finite numbers"),
        ({"weights": [1.0, float("inf"), 1.0]}, "finite numbers"),
    ],
)
def test_an_option_that_is_wrong_or_would_do_nothing_is_named(tmp_path, adapters, options, words):
    weights = options.pop("weights", WEIGHTS)
    with pytest.raises(ConfigError, match=words):
        combine(adapters, weights, tmp_path / "one", **options)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("way", ["svd", "cat", "linear"])
def test_weights_that_float32_cannot_hold_are_told(tmp_path, adapters, way):
    with pytest.raises(AdapterError, match="more than float32 holds; give smaller weights"):
        combine(adapters, [1e200, 1.0, 1.0], tmp_path / "one", way)
    assert not (tmp_path / "one").exists()


def test_home_is_found(tmp_path, adapters, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(adapters[0]).parent))
    names = [f"~/{Path(directory).name}" for directory in adapters]
    section = combine(names, WEIGHTS, tmp_path / "one", "cat")
    assert section == combine(adapters, WEIGHTS, tmp_path / "two", "cat")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AdapterError, match="one: is there already"):
        combine(adapters, WEIGHTS, "~/one", "cat")


def test_an_adapter_that_is_there_is_not_written_over(tmp_path, adapters):
    before = (Path(adapters[0]) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="is there already; give a new directory"):
        combine(adapters, WEIGHTS, adapters[0], "cat")
    assert (Path(adapters[0]) / "adapter_model.safetensors").read_bytes() == before


def test_of_two_that_write_one_directory_the_second_is_refused(tmp_path, adapters, monkeypatch):
    def meanwhile(*arguments):
        monkeypatch.undo()
        with pytest.raises(AdapterError, match="one: another process writes it"):
            combine(adapters, WEIGHTS, tmp_path / "one", "svd", rank=1)
        write(*arguments)

    write = peft_io._write_files
    monkeypatch.setattr(peft_io, "_write_files", meanwhile)
    section = combine(adapters, WEIGHTS, tmp_path / "one", "cat")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert load_adapter(tmp_path / "one")[0].rank == section.rank > 1


def test_the_base_weight_that_peft_stores_with_a_head_s_factors_is_no_part_of_the_adapter(tmp_path):
    """Two of one model, held in other types, are one; two of different models are refused."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "other": torch.float32}.items():
        model = peer_model(tied=False).to(dtype)
        if name == "other":
            model.lm_head.weight.data += 0.1
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    stored = load_file(tmp_path / "float32" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored
    combine([tmp_path / "float32", tmp_path / "bfloat16"], [1, 0], tmp_path / "made", "linear")
    made = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert made.keys() == {key for key in stored if ".lora_" in key}
    for name, change in effect(made).items():
        np.testing.assert_allclose(change, effect(stored)[name] * config.lora_alpha / config.r, atol=1e-6)
    with pytest.raises(AdapterError, match=r"lm_head.base_layer.weight is another weight than in .*different base"):
        combine([tmp_path / "float32", tmp_path / "other"], [1, 1], tmp_path / "none", "linear")


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_peft_was_asked_to_store_are_no_part_of_the_adapter(tmp_path, tied):
    """`save_embedding_layers` writes the base model's own under the names that they would have if they trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    for name in ("plain", "whole", "other"):
        base = peer_model(tied=tied)
        torch.manual_seed(0)
        model = get_peft_model(base, config).eval()
        if name == "other":
            model.get_input_embeddings().weight.data += 0.1
        model.save_pretrained(tmp_path / name, save_embedding_layers=name != "plain")
        if name == "whole":
            expected = peer_logits(model)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "whole" / "adapter_model.safetensors")
    made = tuned(tune_section(adapter=str(tmp_path / "whole")), tied=tied)
    assert difference(logits(made.model, made.params), expected) < 1e-4
    combine([tmp_path / "plain", tmp_path / "whole"], [0.5, 0.5], tmp_path / "both", "cat")
    made = tuned(tune_section(adapter=str(tmp_path / "both")), tied=tied)
    assert difference(logits(made.model, made.params), expected) < 1e-4
    with pytest.raises(AdapterError, match=r"weight is another weight than in .*different base"):
        combine([tmp_path / "whole", tmp_path / "other"], [1, 1], tmp_path / "none", "linear")


def test_adapters_that_cannot_be_added_up_are_refused(tmp_path, adapters):
    for name, options in {
        "rank": {"rank": 2},
        "pattern": {"rank": 4, "rank_pattern": {"q_proj": 2}},
        "saved": {"modules_to_save": ["norm"]},
        "head": {"modules_to_save": ["lm_head"]},
        "ia3": {"method": "ia3"},
    }.items():
        one = tuned(tune_section(**options))
        save_adapter(tmp_path / name, one.section, one.model.weights, one.params)
    for name, words in {
        "rank": r"ranks must agree.* take svd or cat",
        "pattern": r"q_proj: way linear .* found \[4, 2\]",
        "saved": "train whole",
        "head": "lm_head.weight is no factor .* train whole",
        "ia3": "only plain LoRA",
    }.items():
        with pytest.raises(AdapterError, match=words):
            combine([adapters[0], tmp_path / name], [1, 1], tmp_path / "one", "linear")
    with pytest.raises(AdapterError, match=r"ranks must agree.* take ties_svd"):
        combine([adapters[0], tmp_path / "rank"], [1, 1], tmp_path / "one", "ties", density=0.5)
