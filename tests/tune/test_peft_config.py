"""adapter_config.json: everything that the newest peft writes is read, what we do not have is refused by name."""

import json
from pathlib import Path

import pytest

from jaxtune import tune
from jaxtune.config import make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError
from jaxtune.tune.peft_config import is_resolved, read_config, resolve, to_peft, warn_of_another_base
from tests.tune.support import tuned

OURS = {
    "rank": 4,
    "alpha": 6,
    "dropout": 0.25,
    "targets": ["v_proj", "q_proj"],
    "exclude": ["layers.0.self_attn.q_proj"],
    "use_rslora": True,
    "bias": "lora_only",
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"q_proj": 9.5},
    "layers": [0, 1],
    "modules_to_save": ["norm"],
}


def written(directory: Path, **changes) -> Path:
    """A directory whose adapter_config.json is the newest peft's default one, with changes."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    config.save_pretrained(directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(AdapterError) as error:
        read_config(directory)
    return str(error.value)


def test_the_newest_peft_s_defaults_are_read(tmp_path):
    section = read_config(written(tmp_path))
    assert (
        section.model_dump()
        == tune_section(rank=8, alpha=8, targets=["q_proj"], adapter=str(tmp_path), method="lora").model_dump()
    )


def test_a_config_of_2023_is_read(tmp_path):
    old = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "enable_lora": None, "merge_weights": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**old, "lora_alpha": 4}))
    section = read_config(tmp_path)
    assert (section.rank, section.alpha, section.bias, section.use_rslora) == (2, 4, "none", False)


def test_every_setting_survives_the_way_out_and_in(tmp_path):
    section = tune_section(**OURS)
    tree = to_peft(section, tuned(section).model.weights, "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(tree))
    expected = {**section.model_dump(), "targets": ["q_proj", "v_proj"], "adapter": str(tmp_path)}
    assert read_config(tmp_path).model_dump() == expected


def test_patterns_keep_the_order_in_which_they_are_tried():
    patterns = {"v_proj": 2, "self_attn.*": 3}
    section = tune_section(rank_pattern=patterns, alpha_pattern=patterns)
    tree = json.loads(json.dumps(to_peft(section, tuned(section).model.weights, None)))
    assert list(tree["rank_pattern"]) == list(tree["alpha_pattern"]) == list(patterns)
    assert list(tree) == sorted(tree)


def test_all_linear_is_written_as_the_names_that_it_means():
    section = tune_section(targets="all-linear", layers=[1])
    tree = to_peft(section, tuned(section, "llama", tied=False).model.weights, None)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert tree["target_modules"] == names and tree["layers_to_transform"] == [1]


@pytest.mark.parametrize(("alpha", "kind"), [(32, int), (32.0, int), (2.5, float)])
def test_a_whole_alpha_is_written_as_an_integer(alpha, kind):
    section = tune_section(alpha=alpha)
    assert type(to_peft(section, tuned(section).model.weights, None)["lora_alpha"]) is kind


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["x"]},
        {"use_qalora": True},
        {"use_bdlora": {"x": 1}},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": {"x": 1}},
        {"ensure_weight_tying": True},
        {"kasa_config": {"beta": 1e-4}},
        {"a_key_of_tomorrow": 0},
        {"a_key_of_tomorrow": 0.5},
    ],
    ids=str,
)
def test_an_option_that_we_do_not_have_is_refused_by_name(tmp_path, changes):
    ((name, value),) = changes.items()
    message = refused(written(tmp_path, **changes))
    assert f"{name} = {value!r}" in message and "adapter_config.json" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"inference_mode": False, "task_type": None, "revision": "abc", "auto_mapping": {"x": "y"}},
        {"base_model_name_or_path": "somewhere/else", "peft_version": "9.9", "runtime_config": {"x": 1}},
        {"a_key_of_tomorrow": None, "another": False, "third": [], "fourth": {}},
        {"layers_pattern": "layers", "layers_to_transform": [0]},
        {"layers_pattern": [], "layers_to_transform": []},
        {"exclude_modules": [], "modules_to_save": []},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_an_option_without_effect_on_the_adapter_is_accepted(tmp_path, changes):
    assert read_config(written(tmp_path, **changes)).targets == ["q_proj"]


def test_what_does_nothing_may_stand_in_a_peft_s_file_and_what_cannot_be_is_told(tmp_path):
    """PEFT's own defaults, with init_r lowered, are a target_r above it."""
    from peft import AdaLoraConfig, OFTConfig

    on = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    blocks = {"r": 0, "oft_block_size": 8, **on}
    for number, config in enumerate(
        [
            AdaLoraConfig(init_r=4, total_step=10, **on),
            OFTConfig(use_cayley_neumann=False, num_cayley_neumann_terms=7, **blocks),
            OFTConfig(block_share=True, module_dropout=0.1, **blocks),
        ]
    ):
        config.save_pretrained(tmp_path / str(number))
        assert read_config(tmp_path / str(number)).targets == ["q_proj"]
    OFTConfig(**blocks).save_pretrained(tmp_path / "none")
    file = tmp_path / "none" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "oft_block_size": 0}))
    assert "oft_block_size 0 and rank 0" in refused(tmp_path / "none")


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "lora_ga", "mica", 1.5])
def test_an_adapter_that_changed_its_base_is_refused(tmp_path, init):
    message = refused(written(tmp_path, init_lora_weights=init))
    assert f"init_lora_weights {init!r}" in message and "base" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "POLY"}, ["peft_type 'POLY'", "LORA"]),
        ({"peft_type": None}, ["peft_type None"]),
        ({"peft_type": []}, ["peft_type '[]'"]),
        ({"r": 0}, ["r:", "greater than 0", "found 0"]),
        ({"r": "8"}, ["r:", "found '8'"]),
        ({"lora_alpha": -1}, ["lora_alpha:"]),
        ({"lora_dropout": 1.0}, ["lora_dropout:"]),
        ({"bias": "some"}, ["bias:", "found 'some'"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern:"]),
        ({"target_modules": None}, ["target_modules is empty"]),
        ({"target_modules": 3}, ["target_modules:"]),
        ({"layers_pattern": "blocks"}, ["layers_pattern 'blocks'"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(tmp_path, changes, words):
    message = refused(written(tmp_path, **changes))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", ["not valid JSON"]), ("[]", ["expected a JSON object"]), ('{"r": NaN}', ["not valid JSON"])],
)
def test_a_damaged_config_is_named(tmp_path, text, words):
    (tmp_path / "adapter_config.json").write_text(text)
    assert all(word in refused(tmp_path) for word in words)


def test_a_missing_directory_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    assert refused(Path("n" * 300)) == f"{'n' * 300}: cannot be read: File name too long"


def test_an_adapter_one_directory_deeper_is_pointed_out(tmp_path):
    written(tmp_path / "french")
    assert "there is one in french" in refused(tmp_path)


def test_the_adapter_s_settings_win(tmp_path):
    section = tune_section(adapter=str(written(tmp_path, r=3, lora_alpha=5)))
    assert not is_resolved(section)
    resolved = resolve(section)
    assert (resolved.rank, resolved.alpha, resolved.targets) == (3, 5, ["q_proj"])
    assert is_resolved(resolved) and resolve(resolved) == resolved


def test_a_method_that_is_not_named_is_the_adapter_s(tmp_path):
    adapter = str(written(tmp_path, use_dora=True))
    assert tune_section(adapter=adapter).method == resolve(tune_section(adapter=adapter)).method == "dora"
    with pytest.raises(ConfigError, match=r"tune.method: 'lora', the adapter has 'dora'"):
        resolve(tune_section(adapter=adapter, method="lora"))
    tree = {"model": {"path": "-"}, "data": {"path": "-"}, "tune": {"adapter": adapter, "vera_r": 4}}
    with pytest.raises(ConfigError, match=r"tune.vera_r: unknown key"):
        make_config(tree)
    assert tune_section(adapter=str(tmp_path / "none")).method == "lora"


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(written(tmp_path / "dora", use_dora=True).parent))
    assert tune_section(adapter="~/dora").method == resolve(tune_section(adapter="~/dora")).method == "dora"


def test_a_setting_that_agrees_with_the_adapter_s_may_stand_beside_it(tmp_path):
    written(tmp_path, r=3, target_modules=["v_proj", "q_proj"])
    resolve(tune_section(adapter=str(tmp_path), rank=3, targets=["q_proj", "v_proj"]))


@pytest.mark.parametrize("where", ["resolve", "layout"])
def test_settings_that_contradict_the_adapter_s_are_all_named(tmp_path, where):
    section = tune_section(adapter=str(written(tmp_path, r=3)), rank=4, alpha=8, dropout=0.5)
    with pytest.raises(ConfigError) as error:
        resolve(section) if where == "resolve" else tune.layout(section, None)
    assert "tune.rank: 4, the adapter has 3" in str(error.value)
    assert "tune.dropout: 0.5, the adapter has 0.0" in str(error.value)
    assert "alpha" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "model", "told"),
    [
        ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", True),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", False),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", True),
        ("Qwen/Qwen2.5-0.5B", "/models/qwen2.5-0.5b/", False),
        ("Qwen/Qwen2.5-0.5B", "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b2c", False),
        ("Qwen/Qwen2.5-0.5B", "/models/Qwen2.5-0.5B-Q8_0.gguf", False),
        ("/models/Qwen2.5-0.5B", "smollm2.gguf", True),
        (None, "meta-llama/Llama-3.2-1B", False),
    ],
)
def test_a_base_model_of_another_name_is_said(tmp_path, capsys, base, model, told):
    adapter = written(tmp_path / "french", base_model_name_or_path=base)
    warn_of_another_base(adapter, model)
    said = f"Warning: {adapter}: made for {base}, and now on {model}; on weights that are not the same"
    assert (said in capsys.readouterr().out) == told
